"""Alike pieces of all leaves as one `torch._foreach_*` call an operation.

Memory passes are what an eager step costs, so a result takes over the memory of an operand that nobody reads again, and
an input that a piece updates is updated in place. On a CPU, elementwise pieces run part by part, so that what they make
on the way stays in the cache.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.backends import parts
from chainrule.bridges.lowering.backends.body import Ref, filled, without_nodes
from chainrule.bridges.lowering.backends.liveness import aliases_of, last_reads
from chainrule.bridges.lowering.executor import Registers
from chainrule.bridges.lowering.nodes import args_of, is_array, value_of
from chainrule.bridges.lowering.op_info import Batched, info
from chainrule.bridges.lowering.passes.partition import Piece

_Column = Callable[[list[Any], Sequence[int]], Any]
"""Makes what a node is in some of the pieces, given what the inputs and nodes before it are in them."""


class Batch:
    """The pieces of one kind, run together: each operation is one call for all of them."""

    def __init__(self, pieces: Sequence[Piece], registers: Registers, host: bool):
        first = pieces[0]
        columns = _Columns(pieces, host)
        aliases = aliases_of(first, columns.batched)
        self.steps = [
            columns.together(n, aliases.operand.get(n))
            if n in columns.batched
            else columns.one_by_one(n)
            for n in first.nodes
        ]
        self.dead = _dead(first, columns.number)
        in_place = {i for i, old in first.updates if old in aliases.updated}
        self.written = [
            (piece.outputs[i], old) for piece in pieces for i, old in piece.updates if i in in_place
        ]
        updated = dict(self.written)
        self.inputs = [
            [registers[n] for n in own] for own in zip(*(p.inputs for p in pieces), strict=True)
        ]
        self.outputs = [
            (columns.number[first.outputs[j]], [registers[n] for n in own])
            for j, own in enumerate(zip(*(p.outputs for p in pieces), strict=True))
        ]
        self.olds = [
            [registers[updated[n]] if n in updated else None for n in piece.outputs]
            for piece in pieces
        ]
        """For each output of each piece the register of the input that it is computed in."""
        self.groups = [(list(range(len(pieces))), False)]
        if host:
            self.groups = list(_groups(pieces, _is_elementwise(first)))

    def __call__(self, memory: list[Any]) -> None:
        for pieces, in_parts in self.groups:
            self.run_group(pieces, in_parts, memory)

    def run_group(self, pieces: Sequence[int], in_parts: bool, memory: list[Any]) -> None:
        """Runs some pieces together, or one in parts."""
        given = [[memory[column[i]] for i in pieces] for column in self.inputs]
        cut = parts.split([x for (x,) in given]) if in_parts else None
        if cut is None:
            results = self.run(given, pieces)
        else:
            results = self._by_parts(pieces[0], cut, memory)
        for (_, column), result in zip(self.outputs, results, strict=True):
            for i, value in zip(pieces, result, strict=True):
                memory[column[i]] = value

    def run(self, given: list[list[Any]], pieces: Sequence[int]) -> list[list[Any]]:
        """The outputs of some pieces; whatever nobody reads again is freed on the way."""
        lists: list[Any] = [*given]
        for step, dead in zip(self.steps, self.dead, strict=True):
            lists.append(step(lists, pieces))
            for k in dead:
                lists[k] = None
        return [lists[k] for k, _ in self.outputs]

    def _by_parts(
        self, i: int, cut: Iterator[Sequence[Tensor]], memory: list[Any]
    ) -> list[list[Any]]:
        """The outputs of a piece, found part by part."""
        olds = self.olds[i]
        outputs: list[Any] = [None if old is None else memory[old] for old in olds]
        own: dict[int, Sequence[Tensor]] = {}
        for number, part in enumerate(cut):
            found = self.run([[x] for x in part], [i])
            for j, (old, (result,)) in enumerate(zip(olds, found, strict=True)):
                if old is not None:
                    continue
                if result.ndim == 0:
                    outputs[j] = result
                    continue
                if number == 0:  # in memory like the tensors that it is made of
                    arrays = (memory[column[i]] for column in self.inputs)
                    model = next(x for x in arrays if x.ndim)
                    outputs[j] = torch.empty_like(model, dtype=result.dtype)
                    own[j] = parts.split_whole(outputs[j])
                own[j][number].copy_(result)
        return [[output] for output in outputs]


def _is_elementwise(piece: Piece) -> bool:
    """Whether parts of a piece's tensors can be computed one after the other."""
    return piece.flat and all(
        info(n).elementwise or not any(is_array(value_of(x)) for x in (n, *n.all_input_nodes))
        for n in piece.nodes
    )


def _dead(piece: Piece, number: dict[fx.Node, int]) -> list[list[int]]:
    """For each node of a piece the columns that it is the last to read."""
    last = last_reads(piece)
    dead: dict[fx.Node, list[int]] = {node: [] for node in piece.nodes}
    for node in set(piece.nodes) & last.keys() - set(piece.outputs):
        dead[last[node]].append(number[node])
    return list(dead.values())


def _groups(pieces: Sequence[Piece], in_parts: bool) -> Iterator[tuple[list[int], bool]]:
    """Pieces that run together; a large one alone, so that the next reuses its memory, and in parts if it can be."""
    together: list[int] = []
    room = parts.PART
    for i, piece in enumerate(pieces):
        values = map(value_of, (*piece.nodes, *piece.inputs))
        size = max((x.numel() for x in values if isinstance(x, Tensor)), default=0)
        if size > parts.PART:
            yield [i], in_parts
            continue
        if size > room:
            yield together, False
            together, room = [], parts.PART
        together.append(i)
        room -= size
    if together:
        yield together, False


class _Columns:
    """Alike pieces side by side: column k holds the k-th input or node of each."""

    def __init__(self, pieces: Sequence[Piece], host: bool):
        self.pieces, self.host = pieces, host
        self.columns = [
            list(column) for column in zip(*((*p.inputs, *p.nodes) for p in pieces), strict=True)
        ]
        self.number = {column[0]: k for k, column in enumerate(self.columns)}
        self.batched = {node for node in pieces[0].nodes if self._is_batched(node)}
        """Nodes of the first piece for which one call does in all pieces what they do in theirs."""

    def together(self, node: fx.Node, in_place: int | None) -> _Column:
        """One call for all pieces; `in_place` is the position of the operand that it writes into."""
        batched: Any = info(node).batched
        call, args = batched.call, list(args_of(node))
        if in_place is not None:
            call = batched.in_place
            args[0], args[in_place] = args[in_place], args[0]
        given = [self._operand(arg, batched) for arg in args]
        named = {name: self._operand(arg, batched) for name, arg in node.kwargs.items()}

        def column(lists: list[Any], _: Sequence[int]) -> Any:
            operands = [operand(lists) for operand in given]
            keywords = {name: operand(lists) for name, operand in named.items()}
            if isinstance(keywords.get("value"), list):
                operands.append(keywords.pop("value"))
            result = call(*operands, **keywords)
            return operands[0] if in_place is not None else result

        return column

    def one_by_one(self, node: fx.Node) -> _Column:
        """A call for each piece."""
        calls = []
        for piece, n in zip(self.pieces, self.columns[self.number[node]], strict=True):
            position = {x: Ref(k) for k, x in enumerate((*piece.inputs, *piece.nodes))}
            args, kwargs = (without_nodes(x, position) for x in (n.args, dict(n.kwargs)))
            calls.append((n.target, args, kwargs))

        def column(lists: list[Any], pieces: Iterable[int]) -> Any:
            results = []
            for at, i in enumerate(pieces):
                function, args, kwargs = calls[i]

                def read(k: int, at: int = at) -> Any:
                    return lists[k][at]

                named = {name: filled(x, read) for name, x in kwargs.items()}
                results.append(function(*(filled(x, read) for x in args), **named))
            return results

        return column

    def _is_batched(self, node: fx.Node) -> bool:
        batched, result = info(node).batched, value_of(node)
        if batched is None or not is_array(result) or set(node.kwargs) - batched.keywords:
            return False
        column = self.columns[self.number[node]]
        for key, arg in (*enumerate(args_of(node)), *node.kwargs.items()):
            if not isinstance(arg, fx.Node):
                others = {
                    repr(n.kwargs[key] if isinstance(key, str) else n.args[key]) for n in column
                }
                if key == 0 or len(others) > 1:
                    return False
                continue
            value = value_of(arg)
            if value.dtype != result.dtype:
                return False
            if value.ndim == 0 and not self._takes_scalar(arg, key, batched, bool(node.kwargs)):
                return False
        return True

    def _takes_scalar(self, arg: fx.Node, key: int | str, batched: Batched, scaled: bool) -> bool:
        """Whether a 0-d tensor can be the operand at `key`: a number on the host, or one tensor for all."""
        shared = self._is_shared(arg)
        if self.host and (key in (batched.number, "value") or (key == "alpha" and shared)):
            return True
        return key == 1 and shared and batched.shares and not scaled

    def _is_shared(self, arg: fx.Node) -> bool:
        return len(set(self.columns[self.number[arg]])) == 1

    def _operand(self, arg: Any, batched: Batched) -> Callable[[list[Any]], Any]:
        """What a call takes for an operand: a list of tensors, a number or numbers, or a 0-d tensor."""
        if not isinstance(arg, fx.Node):
            return lambda lists: arg
        k = self.number[arg]
        if value_of(arg).ndim > 0:
            return operator.itemgetter(k)
        if batched.number is None and not self.host:
            return operator.itemgetter(k)  # CUDA's form with one tensor reads it on the host
        if not self._is_shared(arg):
            return lambda lists: [x.item() for x in lists[k]]
        if self.host:
            return lambda lists: lists[k][0].item()
        return lambda lists: lists[k][0]
