"""From programs for example lists of parameters to one for any list.

The programs of two lists, of different lengths and shapes, are compared from their results on: values that are the same
for all parameters of a kind are one; a number that differs must be an expression of the shapes, of a parameter's place
or of how many there are (`expressions`). Whatever else differs is `Unlike`: then the kinds are too coarse, or the chain
cannot be exported.
"""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.export.errors import Unlike
from chainrule.bridges.export.examples import Example, Program, Role
from chainrule.bridges.export.expressions import expression_of
from chainrule.bridges.export.generic import Folded, Gathered, Generic, PerLeaf, Value
from chainrule.bridges.export.owners import FOLDS, NOBODY, Kinds, Leaf, Lists, owners, terms_of
from chainrule.bridges.lowering.nodes import args_of, function_of

_MOST = 4096
"""Entries of an array that a file may hold."""

Nodes = tuple[fx.Node, ...]


def generalise(examples: Sequence[Example], kinds: Kinds) -> Generic:
    """The programs of all examples as one.

    Args:
      examples: of one chain, at least two with different lists.
      kinds: the parameters of a kind shall have one program; every example has at least two of each.

    Raises:
      Unlike: they have not.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(max(limit, 100_000))
    try:
        sets: list[frozenset[int]] = [frozenset(k for own in kinds for k in own)]
        found = [
            _Comparison(examples, [getattr(e, part) for e in examples], kinds, sets).results()
            for part in ("init", "step")
        ]
    finally:
        sys.setrecursionlimit(limit)
    return Generic(sets, *found)


class _Comparison:
    """One part of the examples: all `init`s, or all steps."""

    def __init__(
        self,
        examples: Sequence[Example],
        programs: Sequence[Program],
        kinds: Kinds,
        sets: list[frozenset[int]],
    ):
        self.programs, self.kinds, self.sets = programs, kinds, sets
        self.lists = Lists(examples, kinds, sets)
        self.leaves = self.lists.leaves
        self.own = [owners(program) for program in programs]
        self.known: dict[Any, Value] = {}

    def results(self) -> dict[tuple[int | None, str], Value]:
        found: dict[tuple[int | None, str], Value] = {}
        outputs = [program.outputs for program in self.programs]
        shared = [[r for r in own if r.leaf is None] for own in outputs]
        if any(roles != shared[0] for roles in shared):
            raise Unlike("the state of a group depends on how many parameters it has")
        for role in shared[0]:
            if role.kind == "group":
                nodes = tuple(own[role] for own in outputs)
                found[None, role.name] = self.shared(nodes)
        for kind, leaves in self.leaves.items():
            names = [
                [(r.kind, r.name) for r in outputs[leaf.example] if r.leaf == leaf.index]
                for leaf in leaves
            ]
            if any(own != names[0] for own in names):
                raise Unlike("the states of two parameters have different fields")
            for what, name in names[0]:
                nodes = tuple(outputs[e][Role(what, i, name)] for e, i in leaves)
                found[kind, name] = self.leaf(kind, nodes)
        return found

    # ---- values ------------------------------------------------------------------------------

    def leaf(self, kind: int, nodes: Nodes) -> Value:
        """The value that these nodes are for the parameters of a kind."""
        leaves = self.leaves[kind]
        of: list[set[fx.Node]] = [set() for _ in self.programs]
        for leaf, node in zip(leaves, nodes, strict=True):
            of[leaf.example].add(node)
        if all(len(own) == 1 for own in of):
            return self.shared(tuple(own.pop() for own in of))
        if (kind, nodes) not in self.known:
            self.known[kind, nodes] = self.of_leaf(kind, nodes)
        return self.known[kind, nodes]

    def of_leaf(self, kind: int, nodes: Nodes) -> Value:
        leaves = self.leaves[kind]
        if any(node.op == "placeholder" for node in nodes):
            roles = [
                self.programs[leaf.example].inputs.get(node)
                for leaf, node in zip(leaves, nodes, strict=True)
            ]
            own = [
                r is not None and r.leaf == leaf.index
                for r, leaf in zip(roles, leaves, strict=True)
            ]
            if not all(own) or len({(r.kind, r.name) for r in roles if r}) > 1:
                raise Unlike(_place(nodes[0], "a parameter reads what another does not"))
            return Value(kind, nodes[0], role=roles[0])
        return self.called(nodes, kind)

    def shared(self, nodes: Nodes) -> Value:
        """The value that these nodes, one an example, are for all parameters."""
        if (None, nodes) not in self.known:
            self.known[None, nodes] = self.of_all(nodes)
        return self.known[None, nodes]

    def of_all(self, nodes: Nodes) -> Value:
        first = nodes[0]
        if any(node.op == "placeholder" for node in nodes):
            roles = {p.inputs.get(node) for p, node in zip(self.programs, nodes, strict=True)}
            (role,) = roles if len(roles) == 1 else (None,)
            if role is None or role.leaf is not None:
                raise Unlike(_place(first, "a single parameter is read on behalf of others"))
            return Value(None, first, role=role)
        if any(node.op == "get_attr" for node in nodes):
            return Value(None, first, constant=self.array(nodes))
        folded = self.folded(nodes)
        if folded is not None:
            return Value(None, first, (folded,))
        return self.called(nodes, None)

    def called(self, nodes: Nodes, kind: int | None) -> Value:
        first = nodes[0]
        names = {tuple(node.kwargs) for node in nodes}
        if (
            len({node.target for node in nodes}) > 1
            or len(names) > 1
            or first.op != "call_function"
        ):
            other = next((n for n in nodes if n.target is not first.target), nodes[-1])
            raise Unlike(_place(first, f"{_called(first)} here, {_called(other)} there"))
        try:
            args = self.argument([args_of(node) for node in nodes], kind)
            kwargs = {
                name: self.argument([node.kwargs[name] for node in nodes], kind)
                for name in first.kwargs
            }
        except Unlike as error:
            raise Unlike(_place(first, str(error))) from None
        return Value(kind, first, args, kwargs)

    def argument(self, items: list[Any], kind: int | None) -> Any:
        if all(isinstance(x, fx.Node) for x in items):
            nodes = tuple(items)
            return self.shared(nodes) if kind is None else self.leaf(kind, nodes)
        if any(isinstance(x, fx.Node) for x in items):
            raise Unlike("a number here, a tensor there")
        first = items[0]
        has_nodes = [isinstance(x, (tuple, list)) and bool(_nodes_in(x)) for x in items]
        if any(has_nodes):
            if kind is None and isinstance(first, (tuple, list)):
                gathered = self.gathered(items)
                if gathered is not None:
                    return gathered
            if len({len(x) for x in items}) > 1:
                raise Unlike("lists of different lengths")
            return tuple(self.argument(list(column), kind) for column in zip(*items, strict=True))
        return expression_of(items, self.lists.places(kind))

    # ---- from parameters to what they share ----------------------------------------------------

    def gathered(self, lists: Sequence[Sequence[Any]]) -> Gathered | None:
        """Lists with a value of each parameter of a set; None if they are no such lists."""
        if not all(isinstance(x, fx.Node) for own in lists for x in own):
            return None
        owners = [[self.own[e].get(x, NOBODY) for x in own] for e, own in enumerate(lists)]
        if all(len(o) == 1 for own in owners for o in own):
            k = self.lists.set_of([[next(iter(o)) for o in own] for own in owners])
        elif len({len(own) for own in lists}) == 1:
            return None
        else:
            k = next(
                (k for k in range(len(self.sets)) if self.lists.counts(k) == [*map(len, lists)]),
                None,
            )
        return None if k is None else self.gather(k, lists)

    def gather(self, k: int, lists: Sequence[Sequence[fx.Node]]) -> Gathered:
        at = {
            Leaf(e, i): node
            for e, own in enumerate(lists)
            for i, node in zip(self.lists.members(e, k), own, strict=True)
        }
        values = {
            kind: self.leaf(kind, tuple(at[leaf] for leaf in self.leaves[kind]))
            for kind in sorted(self.sets[k])
        }
        return Gathered(k, values)

    def folded(self, nodes: Nodes) -> Folded | None:
        """What the nodes make one after the other of a value of each parameter; None if they do not."""
        target = nodes[0].target
        if target not in FOLDS or any(node.target is not target for node in nodes):
            return None
        found = [terms_of(node, own) for node, own in zip(nodes, self.own, strict=True)]
        if not all(len(terms) > 1 for _, terms in found):
            return None
        k = self.lists.set_of([[i for i, _ in terms] for _, terms in found])
        if k is None:
            return None
        firsts = [first for first, _ in found]
        if any(first is None for first in firsts) and any(first is not None for first in firsts):
            return None
        gathered = self.gather(k, [[node for _, node in terms] for _, terms in found])
        first = (
            None if firsts[0] is None else self.shared(tuple(f for f in firsts if f is not None))
        )
        return Folded(function_of(nodes[0]), first, gathered)

    def array(self, nodes: Nodes) -> Any:
        """An array that the programs bring: the same everywhere, or a number for each parameter of a set."""
        arrays = [
            array
            for program, node in zip(self.programs, nodes, strict=True)
            if node.op == "get_attr"
            and isinstance(array := program.attributes[str(node.target)], Tensor)
        ]
        if len(arrays) < len(nodes):
            raise Unlike(_place(nodes[0], "a branch or a loop, whose body is a program of its own"))
        first = arrays[0]
        if all(
            a.shape == first.shape and a.dtype == first.dtype and a.equal(first) for a in arrays
        ):
            if first.numel() > _MOST:
                raise Unlike(
                    _place(nodes[0], f"an array of {first.numel()} entries, more than {_MOST}")
                )
            return first
        for k in range(len(self.sets)):
            if all(a.shape == (n,) for a, n in zip(arrays, self.lists.counts(k), strict=True)):
                return self.numbers(k, [a.tolist() for a in arrays], first.dtype)
        raise Unlike(_place(nodes[0], "an array that depends on the parameters"))

    def numbers(self, k: int, lists: Sequence[Sequence[Any]], dtype: torch.dtype) -> PerLeaf:
        at = {
            Leaf(e, i): x
            for e, own in enumerate(lists)
            for i, x in zip(self.lists.members(e, k), own, strict=True)
        }
        codes = {
            kind: expression_of([at[leaf] for leaf in self.leaves[kind]], self.lists.places(kind))
            for kind in sorted(self.sets[k])
        }
        return PerLeaf(k, codes, dtype)


def _nodes_in(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _called(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _place(node: fx.Node, what: str) -> str:
    link = node.meta.get("link")
    return f"{link}: {what}" if link and not what.startswith(f"{link}: ") else what
