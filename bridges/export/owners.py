"""Which parameter each value of a program is of, and sums over all of them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import fx

from chainrule.bridges.export.examples import Example, Program
from chainrule.bridges.export.expressions import Where
from chainrule.bridges.lowering.nodes import args_of

FOLDS = {torch.add, torch.mul, torch.maximum, torch.minimum, torch.bitwise_and, torch.bitwise_or}
"""What adds one parameter's value after the other to a sum of some kind."""
NOBODY: frozenset[int] = frozenset()
Kinds = Sequence[Sequence[int]]
"""For each example the kind of each of its parameters."""


class Leaf(NamedTuple):
    """A parameter of an example."""

    example: int
    index: int


class Lists:
    """The parameters of all examples: how many there are of a set of kinds, and which place each has there."""

    def __init__(self, examples: Sequence[Example], kinds: Kinds, sets: list[frozenset[int]]):
        self.kinds, self.sets = kinds, sets
        self.shapes = [[tuple(s.shape) for s in e.structs] for e in examples]
        self.leaves: dict[int, list[Leaf]] = {k: [] for k in sorted(sets[0])}
        for e, own in enumerate(kinds):
            for i, kind in enumerate(own):
                self.leaves[kind].append(Leaf(e, i))

    def places(self, kind: int | None) -> list[Where]:
        """Where the numbers of a kind, or of all, are evaluated."""
        if kind is None:
            return [Where(None, self.totals(e)) for e in range(len(self.kinds))]
        return [
            Where(
                self.shapes[leaf.example][leaf.index],
                self.totals(leaf.example) | self.standing(leaf),
            )
            for leaf in self.leaves[kind]
        ]

    def members(self, example: int, k: int) -> list[int]:
        return [i for i, kind in enumerate(self.kinds[example]) if kind in self.sets[k]]

    def totals(self, example: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for k in range(len(self.sets)):
            own = self.members(example, k)
            found[f"count_{k}"] = len(own)
            found[f"size_{k}"] = sum(_numel(self.shapes[example][i]) for i in own)
        return found

    def standing(self, leaf: Leaf) -> dict[str, int]:
        found: dict[str, int] = {}
        for k in range(len(self.sets)):
            own = self.members(leaf.example, k)
            if leaf.index in own:
                place = own.index(leaf.index)
                found[f"place_{k}"] = place
                before = own[:place]
                found[f"offset_{k}"] = sum(_numel(self.shapes[leaf.example][i]) for i in before)
        return found

    def counts(self, k: int) -> list[int]:
        return [len(self.members(e, k)) for e in range(len(self.kinds))]

    def set_of(self, indices: Sequence[Sequence[int]]) -> int | None:
        """The number of the set that the parameters with these indices are, in every example."""
        wanted = {self.kinds[e][i] for e, own in enumerate(indices) for i in own}
        found = frozenset(wanted)
        for e, own in enumerate(indices):
            if list(own) != [i for i, kind in enumerate(self.kinds[e]) if kind in found]:
                return None
        if found not in self.sets:
            self.sets.append(found)
        return self.sets.index(found)


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def owners(program: Program) -> dict[fx.Node, frozenset[int]]:
    """The parameters that each node is of; none if it is shared, several where a sum over them is under way."""
    own: dict[fx.Node, frozenset[int]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            leaf = program.inputs[node].leaf
            own[node] = NOBODY if leaf is None else frozenset({leaf})
            continue
        given = [own[x] for x in node.all_input_nodes]
        single = frozenset[int]().union(*(o for o in given if len(o) == 1))
        if _continues(node, own):
            own[node] = frozenset[int]().union(*given)
        else:
            own[node] = single if len(single) == 1 else NOBODY
    return own


def _continues(node: fx.Node, own: Mapping[fx.Node, frozenset[int]]) -> bool:
    """Whether a node adds the value of another parameter to a sum."""
    if node.target not in FOLDS or node.kwargs or len(node.args) != 2:
        return False
    x, y = args_of(node)
    if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)) or len(own[y]) != 1 or not own[x]:
        return False
    return not own[x] & own[y] and (len(own[x]) == 1 or x.target is node.target)


def terms_of(
    node: fx.Node, own: Mapping[fx.Node, frozenset[int]]
) -> tuple[fx.Node | None, list[tuple[int, fx.Node]]]:
    """What a sum over parameters begins with, and its terms with their parameters, in order."""
    terms: list[tuple[int, fx.Node]] = []
    target, rest = node.target, node
    while rest.target is target and not rest.kwargs and len(rest.args) == 2:
        x, y = args_of(rest)
        if not (isinstance(x, fx.Node) and isinstance(y, fx.Node)) or len(own[y]) != 1:
            break
        (index,) = own[y]
        if any(index == i for i, _ in terms):
            break
        terms.append((index, y))
        rest = x
        if len(own[x]) == 1:
            terms.append((next(iter(own[x])), x))
            return None, terms[::-1]
    return rest, terms[::-1]
