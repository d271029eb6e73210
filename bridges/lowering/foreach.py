"""Eager steps in which alike pieces of all leaves run as one `torch._foreach_*` call an equation.

Memory passes are what an eager step costs, so a result takes over the memory of an operand that
nobody reads again, an input that a piece renews is renewed in place, and multiply-add patterns
are one operation (`fuse`). On a CPU, elementwise pieces run part by part, so that what they make
on the way stays in the cache.
"""

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.fuse import fuse
from chainrule.bridges.lowering.pieces import (
    POINTWISE,
    Piece,
    Program,
    by_kind,
    cut,
    fake_values,
    is_array,
)
from chainrule.bridges.lowering.program import Lowered
from chainrule.bridges.lowering.recompute import recompute
from chainrule.bridges.lowering.release import dissolve_with

Step = Callable[[Sequence[Tensor]], None]
_Call = Callable[[list[Any], Sequence[int]], Any]
"""Makes the column of a node from the columns before it, for some of the pieces."""

# pyright: reportPrivateImportUsage=false
_BINARY: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {
    torch.add: (torch._foreach_add, torch._foreach_add_),
    torch.sub: (torch._foreach_sub, torch._foreach_sub_),
    torch.mul: (torch._foreach_mul, torch._foreach_mul_),
    torch.div: (torch._foreach_div, torch._foreach_div_),
    torch.maximum: (torch._foreach_maximum, torch._foreach_maximum_),
    torch.minimum: (torch._foreach_minimum, torch._foreach_minimum_),
    torch.clamp_min: (torch._foreach_clamp_min, torch._foreach_clamp_min_),
    torch.clamp_max: (torch._foreach_clamp_max, torch._foreach_clamp_max_),
}
_UNARY: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {
    torch.abs: (torch._foreach_abs, torch._foreach_abs_),
    torch.neg: (torch._foreach_neg, torch._foreach_neg_),
    torch.sqrt: (torch._foreach_sqrt, torch._foreach_sqrt_),
    torch.rsqrt: (torch._foreach_rsqrt, torch._foreach_rsqrt_),
    torch.exp: (torch._foreach_exp, torch._foreach_exp_),
    torch.expm1: (torch._foreach_expm1, torch._foreach_expm1_),
    torch.log: (torch._foreach_log, torch._foreach_log_),
    torch.log1p: (torch._foreach_log1p, torch._foreach_log1p_),
    torch.sign: (torch._foreach_sign, torch._foreach_sign_),
    torch.sigmoid: (torch._foreach_sigmoid, torch._foreach_sigmoid_),
    torch.tanh: (torch._foreach_tanh, torch._foreach_tanh_),
    torch.reciprocal: (torch._foreach_reciprocal, torch._foreach_reciprocal_),
}
_FUSED: dict[Any, tuple[Callable[..., Any], Callable[..., Any]]] = {
    torch.lerp: (torch._foreach_lerp, torch._foreach_lerp_),
    torch.addcmul: (torch._foreach_addcmul, torch._foreach_addcmul_),
    torch.addcdiv: (torch._foreach_addcdiv, torch._foreach_addcdiv_),
}
_BATCHED = {**_BINARY, **_UNARY, **_FUSED}
_TAKES_SHARED = {torch.mul, torch.div, torch.add}
"""Their second operand may be one 0-d tensor for all tensors of the list."""
_KEYWORDS = {torch.add: {"alpha"}, torch.addcmul: {"value"}, torch.addcdiv: {"value"}}
_PART = 1 << 18
"""Elements that run together on a CPU: the tensors of an expression then fit into a few megabytes."""
_NUMBER = {torch.mul: 1, torch.div: 1, torch.lerp: 2}
"""Position of the operand that may be a number for all tensors, or one for each."""


def foreach_step(lowered: Lowered, targets: Sequence[int], device: torch.device) -> Step:
    """The program as a function of its flat inputs that renews them in place, batched over leaves.

    Args:
      lowered: the program; it is left as it is.
      targets: for every output, the position of the input that it renews.
      device: of the inputs.

    Returns:
      A function of the flat inputs.
    """
    lowered = dataclasses.replace(lowered, graph=copy.deepcopy(lowered.graph))
    host = reads_are_free(device)
    graph, values = lowered.graph.graph, fake_values(lowered, device)
    fuse(graph, values, host=host)
    if host:
        recompute(graph, values, targets)
    program = cut(graph, targets, values)
    batches = [_Batch(kind, program, host) for stage in program.stages for kind in by_kind(stage)]
    renewed = {pair for batch in batches for pair in batch.olds.items()}
    constants = {
        node: getattr(lowered.graph, str(node.target)) for node in graph.find_nodes(op="get_attr")
    }
    pairs = zip(program.results, targets, strict=True)
    left = [(r, program.placeholders[t]) for r, t in pairs]
    left = [(r, old) for r, old in left if r is not old and (r, old) not in renewed]
    # An output that is another input unchanged must be read before that input is renewed.
    borrowed = [r for r, _ in left if r.op == "placeholder"]

    @torch.no_grad()
    def step(inputs: Sequence[Tensor]) -> None:
        env: dict[fx.Node, Any] = {
            **constants,
            **dict(zip(program.placeholders, inputs, strict=True)),
        }
        kept = {r: env[r].clone() for r in borrowed}
        for batch in batches:
            batch(env)
        if left:
            news = [kept[r] if r in kept else env[r] for r, _ in left]
            torch._foreach_copy_([env[old] for _, old in left], news)

    dissolve_with(step, lowered.graph)
    return step


def reads_are_free(device: torch.device) -> bool:
    """Whether a scalar tensor can be read as a number without waiting for a device."""
    return device.type == "cpu"


def _is_elementwise(piece: Piece, values: dict[fx.Node, Any]) -> bool:
    """Whether parts of a piece's tensors can be computed one after the other."""
    return piece.flat and all(
        n.target in POINTWISE or not any(is_array(values[x]) for x in (n, *n.all_input_nodes))
        for n in piece.nodes
    )


def _parts(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]] | None:
    """Parts of all tensors, scalars whole; None where tensors are of several sizes, which torch broadcasts, or do not
    lie alike in memory, without gaps.
    """
    columns = [_flat(x) if x.ndim else x for x in tensors]
    arrays = [x for x in tensors if x.ndim]
    alike = len({x.stride() for x in arrays}) == 1 or all(x.is_contiguous() for x in arrays)
    one_size = len({x.numel() for x in arrays}) == 1
    if not (alike and one_size) or any(x is None for x in columns):
        return None
    split = (x.split(_PART) if x.ndim else repeat(x) for x in columns if x is not None)
    return zip(*split, strict=False)


def _flat(x: Tensor) -> Tensor | None:
    """A tensor as a vector in the order of its memory; None if it has gaps."""
    ordered = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
    return ordered.view(-1) if ordered.is_contiguous() else None


def _given(value: Any, number: dict[fx.Node, int], at: int, lists: list[Any]) -> Any:
    """An argument of a node of the piece `at` of those that run, with the results so far for nodes."""
    if isinstance(value, fx.Node):
        return lists[number[value]][at]
    if isinstance(value, (tuple, list)):
        return type(value)(_given(v, number, at, lists) for v in value)
    return value


class _Batch:
    """The pieces of one kind, run together: each of its steps is one call for all of them."""

    def __init__(self, pieces: Sequence[Piece], program: Program, host: bool):
        first = pieces[0]
        self.pieces, self.values, self.host = pieces, program.values, host
        # Column k holds the k-th input or node of every piece.
        self.columns = [
            list(column) for column in zip(*((*p.inputs, *p.nodes) for p in pieces), strict=True)
        ]
        self.number = {column[0]: k for k, column in enumerate(self.columns)}
        self.batched = {node for node in first.nodes if self._is_batched(node)}
        self.heirs, kept = self._heirs(first)
        self.olds: dict[fx.Node, fx.Node] = {
            p.outputs[i]: old
            for p in pieces
            for (i, old), (_, model) in zip(p.renews, first.renews, strict=True)
            if model in kept
        }
        """For each node that is computed in the memory of an input, the input."""
        self.steps = [
            self._batch(n) if n in self.batched else self._one_by_one(n) for n in first.nodes
        ]
        self.outputs = [self.number[n] for n in first.outputs]
        self.dead = self._dead(first)
        self.groups = [(list(range(len(pieces))), False)]
        if host and _is_elementwise(first, program.values):
            self.groups = list(self._groups())

    def __call__(self, env: dict[fx.Node, Any]) -> None:
        for pieces, in_parts in self.groups:
            columns = self.columns[: len(self.pieces[0].inputs)]
            given = [[env[column[i]] for i in pieces] for column in columns]
            parts = _parts([x for (x,) in given]) if in_parts else None
            if parts is None:
                results = self._run(given, pieces)
            else:
                results = self._by_parts(pieces[0], parts, env)
            for k, result in zip(self.outputs, results, strict=True):
                env.update(zip((self.columns[k][i] for i in pieces), result, strict=True))

    def _run(self, given: list[list[Any]], pieces: Sequence[int]) -> list[list[Any]]:
        """The outputs of some pieces; whatever nobody reads again is freed on the way."""
        lists: list[Any] = [*given]
        for step, dead in zip(self.steps, self.dead, strict=True):
            lists.append(step(lists, pieces))
            for k in dead:
                lists[k] = None
        return [lists[k] for k in self.outputs]

    def _dead(self, piece: Piece) -> list[list[int]]:
        """For each node of a piece the columns that it is the last to read."""
        last = {s: n for n in piece.nodes for s in n.all_input_nodes}
        dead: dict[fx.Node, list[int]] = {node: [] for node in piece.nodes}
        for node in set(piece.nodes) & last.keys() - set(piece.outputs):
            dead[last[node]].append(self.number[node])
        return list(dead.values())

    def _groups(self) -> Iterator[tuple[list[int], bool]]:
        """Pieces that run together; a large one alone, and in parts."""
        together: list[int] = []
        room = _PART
        for i, piece in enumerate(self.pieces):
            size = max((self.values[n].numel() for n in (*piece.nodes, *piece.inputs)), default=0)
            if size > _PART:
                yield [i], True
                continue
            if size > room:
                yield together, False
                together, room = [], _PART
            together.append(i)
            room -= size
        if together:
            yield together, False

    def _by_parts(
        self, i: int, parts: Iterator[Sequence[Tensor]], env: dict[fx.Node, Any]
    ) -> list[list[Any]]:
        """The outputs of a piece, found part by part."""
        nodes = [self.columns[k][i] for k in self.outputs]
        outputs: list[Any] = [env[self.olds[n]] if n in self.olds else None for n in nodes]
        places: dict[int, Sequence[Tensor]] = {}
        for number, part in enumerate(parts):
            found = self._run([[x] for x in part], [i])
            for j, (node, (result,)) in enumerate(zip(nodes, found, strict=True)):
                if node in self.olds:
                    continue
                if result.ndim == 0:
                    outputs[j] = result
                    continue
                if number == 0:  # in memory like the tensors that it is made of
                    model = next(env[x] for x in self.pieces[i].inputs if env[x].ndim)
                    outputs[j] = torch.empty_like(model, dtype=result.dtype)
                    places[j] = _flat(outputs[j]).split(_PART)  # pyright: ignore
                places[j][number].copy_(result)
        return [[output] for output in outputs]

    def _is_batched(self, node: fx.Node) -> bool:
        """Whether one foreach call does for all pieces what `node` does for the first."""
        result = self.values[node]
        if (
            node.target not in _BATCHED
            or not isinstance(result, Tensor)
            or result.ndim == 0
            or set(node.kwargs) - _KEYWORDS.get(node.target, set())
        ):
            return False
        column = self.columns[self.number[node]]
        for j, arg in (*enumerate(node.args), *node.kwargs.items()):
            if not isinstance(arg, fx.Node):
                others = {repr(n.args[j] if isinstance(j, int) else n.kwargs[j]) for n in column}
                if j == 0 or len(others) > 1:
                    return False
                continue
            value = self.values[arg]
            if value.dtype != result.dtype:
                return False
            if value.ndim > 0:
                continue
            shared = len(set(self.columns[self.number[arg]])) == 1
            if self.host and (j == _NUMBER.get(node.target) or j == "value"):
                continue
            if self.host and j == "alpha" and shared:
                continue
            if j != 1 or not shared or node.target not in _TAKES_SHARED or node.kwargs:
                return False
        return True

    def _heirs(self, piece: Piece) -> tuple[dict[fx.Node, int], set[fx.Node]]:
        """Which operand (0 or 1) hands its memory to each node, and the inputs renewed that way."""
        last = {s: n for n in piece.nodes for s in n.all_input_nodes}
        outputs = set(piece.outputs)
        heirs: dict[fx.Node, int] = {}

        def heir(x: fx.Node) -> tuple[fx.Node, int] | None:
            """The last reader of `x`, if it may be computed in its memory."""
            node = last.get(x)
            if (
                node is None
                or node not in self.batched
                or node in heirs
                or list(node.args).count(x) != 1
            ):
                return None
            index = node.args.index(x)
            commutes = (
                node.target in (torch.mul, torch.maximum, torch.minimum, torch.add)
                and not node.kwargs
            )
            if index > 1 or (index == 1 and not commutes):
                return None
            a, b = self.values[x], self.values[node]
            return (node, index) if a.shape == b.shape and a.dtype == b.dtype else None

        kept = set()
        for i, old in piece.renews:
            chain: dict[fx.Node, int] = {}
            current = old
            while (found := heir(current)) is not None and found[0] not in chain:
                current, chain[found[0]] = found
                if current in outputs:
                    break
            if chain and current is piece.outputs[i]:
                heirs |= chain
                kept.add(old)
        for node in piece.nodes:
            # Only these make memory of their own; what others read must stay as it is.
            if node.target in _BATCHED and node in self.batched and node not in outputs:
                found = heir(node)
                if found is not None:
                    heirs[found[0]] = found[1]
        return heirs, kept

    def _batch(self, node: fx.Node) -> _Call:
        index = self.heirs.get(node)
        in_place = index is not None
        call, args = _BATCHED[node.target][in_place], [*node.args]
        if index == 1:
            args[0], args[1] = args[1], args[0]
        given = [self._operand(arg, node.target) for arg in args]
        named = {name: self._operand(arg, node.target) for name, arg in node.kwargs.items()}

        def step(lists: list[Any], _: Sequence[int]) -> Any:
            operands = [operand(lists) for operand in given]
            keywords = {name: operand(lists) for name, operand in named.items()}
            if isinstance(keywords.get("value"), list):
                operands.append(keywords.pop("value"))
            result = call(*operands, **keywords)
            return operands[0] if in_place else result

        return step

    def _operand(self, arg: Any, target: Any) -> Callable[[list[Any]], Any]:
        """What a foreach call takes for an operand: a list of tensors, a number or numbers, or a 0-d tensor."""
        if not isinstance(arg, fx.Node):
            return lambda lists: arg
        k, host = self.number[arg], self.host
        if self.values[arg].ndim > 0:
            return operator.itemgetter(k)
        if (
            target is torch.add and not self.host
        ):  # CUDA's form with one tensor reads it on the host
            return operator.itemgetter(k)
        if len(set(self.columns[k])) == 1:
            return lambda lists: lists[k][0].item() if host else lists[k][0]
        return lambda lists: [x.item() for x in lists[k]]

    def _one_by_one(self, node: fx.Node) -> _Call:
        column = self.columns[self.number[node]]
        numbers = [{n: k for k, n in enumerate((*p.inputs, *p.nodes))} for p in self.pieces]

        def step(lists: list[Any], pieces: Sequence[int]) -> Any:
            results = []
            for at, i in enumerate(pieces):
                n = column[i]
                kwargs = {k: _given(a, numbers[i], at, lists) for k, a in n.kwargs.items()}
                args = [_given(a, numbers[i], at, lists) for a in n.args]
                results.append(n.target(*args, **kwargs))  # pyright: ignore
            return results

        return step
