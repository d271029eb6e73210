"""Stages that read less memory: what is cheap to compute again is not carried from one to the next.

A chain that needs a scalar of a whole tensor before it can scale an update (an alignment, a trust ratio) falls into
stages with the tensor's update between them. Written and read again, that costs two passes over fresh memory; made
again from the moments, which are in memory anyway, it costs reading them. And a moment that a later stage reads is
updated there: the stage that sums over it then only reads.
"""

from typing import Any

from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import is_array, mark_like, return_, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.partition import SHARED, owners_and_ranks
from chainrule.bridges.lowering.passes.signature import reduces_all
from chainrule.bridges.lowering.passes.simplify import drop_dead
from chainrule.bridges.lowering.step_program import StepProgram

_WRITE_AND_READ = 2
"""Passes that carrying a tensor costs; it is computed again from no more new tensors than that."""
_FROM_THE_SYSTEM = 1 << 22
"""From so many elements in all on, memory for what is carried comes from the system in every step."""
_PAGES = 2
"""Passes that as much memory costs then."""


def rematerialise(program: StepProgram) -> StepProgram:
    """Before: later stages read elementwise results of earlier ones. After: they make them again from what is in
    memory, where that reads less; a copy has `meta["rank"]`, its stage.
    """
    _Rematerialise(program, in_one_loop=False).run()
    return program


def rematerialise_elements(program: StepProgram) -> StepProgram:
    """`rematerialise` before the kernel's programs of elements, for which to compute again costs little: what is
    carried costs its memory too.
    """
    sizes = [x.numel() for new, _ in program.updates if is_array(x := value_of(new))]
    pages = _PAGES if sum(sizes) >= _FROM_THE_SYSTEM else 0
    _Rematerialise(program, in_one_loop=False, carrying=_WRITE_AND_READ + pages).run()
    return program


def rematerialise_compiled(program: StepProgram) -> StepProgram:
    """`rematerialise` before Inductor, whose loop over a tensor on a CPU sums over it and updates it at once: an update
    stays where it was made, if that is such a loop and to make it later would read more.
    """
    _Rematerialise(program, in_one_loop=program.on_cpu).run()
    return program


class _Rematerialise:
    def __init__(self, program: StepProgram, in_one_loop: bool, carrying: int = _WRITE_AND_READ):
        self.graph, self.in_one_loop, self.carrying = program.graph, in_one_loop, carrying
        self.output = self.graph.output_node()
        self.results, self.olds = map(list, zip(*program.updates, strict=True))
        self.where = owners_and_ranks(self.graph)
        self.members: dict[Any, list[fx.Node]] = {}
        for node, place in self.where.items():
            self.members.setdefault(place, []).append(node)
        self.stored = set(self.results)
        self.updated_at = {
            old: self.where[new][1]
            for new, old in zip(self.results, self.olds, strict=True)
            if new is not old
        }
        self.copies: dict[tuple[fx.Node, int], fx.Node] = {}

    def run(self) -> None:
        for node in list(self.where):
            self.uncarry(node)
        for i, node in enumerate(self.results):
            self.sink(i, node)
        return_(self.graph, self.results)
        drop_dead(self.graph)

    def is_leafs(self, node: fx.Node) -> bool:
        """Whether a node computes a tensor of one leaf."""
        owner = self.where[node][0]
        return node.op == "call_function" and owner != SHARED and is_array(value_of(node))

    def uncarry(self, node: fx.Node) -> None:
        """Makes again what a node reads of earlier stages."""
        if not self.is_leafs(node):
            return
        owner, stage = self.where[node]
        for source in node.all_input_nodes:
            carried = self.is_leafs(source) and source not in self.stored
            if not carried or self.where[source][0] != owner or self.where[source][1] == stage:
                continue
            found = self.sources(source, stage)
            if found is not None and len(found - self.read(owner, stage)) <= self.carrying:
                node.replace_input_with(source, self.remade(source, stage))

    def sink(self, i: int, node: fx.Node) -> None:
        """Updates an input at the one later stage that reads what it becomes."""
        if not self.is_leafs(node) or not info(node).elementwise or node is self.olds[i]:
            return
        owner, stage = self.where[node]
        later = [u for u in node.users if u is not self.output and self.where[u] != (owner, stage)]
        readers = {self.where[u] for u in later}
        if len(readers) != 1 or self.results.count(node) > 1:
            return
        ((reader, last),) = readers
        if reader != owner or last < stage:
            return
        self.updated_at[self.olds[i]] = last
        found = [self.sources(s, last) for s in node.all_input_nodes]
        known = [sources for sources in found if sources is not None]
        more = set[fx.Node]().union(*known) - self.read(owner, last) - {self.olds[i]}
        stays = more and self.in_one_loop and _is_one_loop(self.members[owner, stage])
        if len(known) < len(found) or stays:
            self.updated_at[self.olds[i]] = stage
            return
        new = self.copy(node, last)
        for user in later:
            user.replace_input_with(node, new)
        self.stored ^= {node, new}
        self.results[i] = new

    def read(self, owner: Any, stage: int) -> set[fx.Node]:
        """The tensors in memory that a stage of a leaf reads."""
        read = {s for n in self.members[owner, stage] for s in n.all_input_nodes}
        return {s for s in read if s.op == "placeholder" or s in self.stored}

    def sources(self, node: fx.Node, stage: int) -> set[fx.Node] | None:
        """The tensors in memory that `node` can be computed from at a stage; None if it cannot."""
        if not is_array(value_of(node)):
            return set()
        if node.op == "placeholder":
            return {node} if self.updated_at.get(node, stage) >= stage else None
        if node in self.stored or self.where[node][1] == stage:
            return {node}
        if not info(node).elementwise and node.target is not ops.decode:
            return None
        found = [self.sources(s, stage) for s in node.all_input_nodes]
        known = [sources for sources in found if sources is not None]
        return set[fx.Node]().union(*known) if len(known) == len(found) else None

    def remade(self, node: fx.Node, stage: int) -> fx.Node:
        """`node`, or what it is at a stage that has to make it again."""
        carried = self.is_leafs(node) and node not in self.stored
        return self.copy(node, stage) if carried and self.where[node][1] != stage else node

    def copy(self, node: fx.Node, stage: int) -> fx.Node:
        if (node, stage) not in self.copies:
            with self.graph.inserting_after(node):
                new = self.graph.node_copy(node, lambda s: self.remade(s, stage))
            mark_like(new, node, value_of(node)).meta["rank"] = stage
            self.where[new] = place = self.where[node][0], stage
            self.members[place].append(new)
            self.copies[node, stage] = new
        return self.copies[node, stage]


def _is_one_loop(nodes: list[fx.Node]) -> bool:
    """Whether a stage of a leaf is element by element, up to sums of everything that no other element waits for."""
    late: set[fx.Node] = set()
    for node in nodes:
        if node.op != "call_function":
            continue
        waits, sums = not late.isdisjoint(node.all_input_nodes), reduces_all(node)
        fits = sums or info(node).elementwise
        if (waits or not fits) and (sums or is_array(value_of(node))):
            return False
        if waits or sums:
            late.add(node)
    return True
