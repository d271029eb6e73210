"""Whole steps of parameters in the compiled kernel: one pass over the memory, in place.

Where all that a chain does to a direction is scalar, and weight decay,

    p' = p + s d + r p,    d = sign(g), or the direction that COSMIC's tier 2 makes of g and its moments,

the program need only find the scalars s and r; the kernel then updates the parameter and its moments. So a program is
split: what the kernel does is taken out, and the rest runs as any program does, before it.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.linear import Reader, Scalar
from chainrule.bridges.lowering.nodes import args_of, first_arg, is_scalar, return_, value_of
from chainrule.bridges.lowering.passes.simplify import drop_dead
from chainrule.bridges.lowering.step_program import KernelMove, StepProgram
from chainrule.native import _kernel
from chainrule.native.primitives import step_of

SIGN = ("sign", ())
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class _Found(NamedTuple):
    """One parameter that the kernel can update."""

    results: tuple[int, ...]
    """Positions of the program's results that it makes: the new parameter, then the new state."""
    tensors: dict[str, int]
    """Role -> position of the input."""
    kind: tuple[str, Any]
    """Name and parameters of its tier-2 primitive, or `SIGN`."""
    numbers: tuple[tuple[Scalar, ...], ...]
    """s, r, and for tier 2 the numbers of the call from b1 on, each as factors."""


def take_kernel_moves(program: StepProgram) -> StepProgram:
    """Before: the whole step is in the graph. After: what the kernel does is in `moves`, and the graph has one result
    more, the scalars that the moves need, written into the first of `buffers`.
    """
    steps = any(node.target in (ops.sign, ops.kernel_call) for node in program.graph.nodes)
    if _kernel is None or not program.on_cpu or not steps:
        return program
    found = _find(program)
    if not found:
        return program
    factors = list(dict.fromkeys(f for m in found for p in m.numbers for f in p))
    nodes = [f for f in factors if isinstance(f, fx.Node)]
    constants = [f for f in factors if not isinstance(f, fx.Node)]
    values = np.array([*(0.0 for _ in nodes), *constants, 1.0], np.float32)
    by_kind: dict[Any, list[_Found]] = {}
    for move in found:
        by_kind.setdefault(move.kind, []).append(move)
    moves = [
        _together(kind, alike, [*nodes, *constants], values) for kind, alike in by_kind.items()
    ]
    # The largest last: it leaves nothing of the others in the cache.
    inputs = program.inputs
    moves.sort(key=lambda m: sum(value_of(inputs[i]).numel() for i in m.tensors["parameters"]))
    program.moves = moves
    _take_out(program, {r for m in found for r in m.results}, nodes, values)
    return program


def _together(
    kind: tuple[str, Any], found: list[_Found], factors: list[Scalar], values: np.ndarray
) -> KernelMove:
    """The moves of one kind as one call."""
    column = {f: k for k, f in enumerate(factors)}
    one = len(factors)  # the position of a 1
    width = max(len(product) for m in found for product in m.numbers)
    columns = [
        [[column[f] for f in p] + [one] * (width - len(p)) for p in m.numbers] for m in found
    ]
    tensors = {role: [m.tensors[role] for m in found] for role in found[0].tensors}
    return KernelMove(kind, tensors, values, np.array(columns, np.intp).swapaxes(0, 1))


def _take_out(
    program: StepProgram, taken: set[int], scalars: list[fx.Node], values: np.ndarray
) -> None:
    """Leaves the results out that the kernel makes, and adds the scalars as the last."""
    graph, results = program.graph, program.results
    kept = [i for i in range(len(results)) if i not in taken]
    inputs = program.inputs
    with graph.inserting_after(inputs[-1]):
        buffer = graph.placeholder("scalars")
    with graph.inserting_before(graph.output_node()):
        found = (torch.stack, (scalars,)) if scalars else (torch.zeros, (0,))
        stacked = graph.call_function(*found)
    buffer.meta["aval"] = jax.ShapeDtypeStruct((len(scalars),), jnp.float32)
    buffer.meta["val"] = stacked.meta["val"] = torch.empty(len(scalars), device="meta")
    return_(graph, [*(results[i] for i in kept), stacked])
    drop_dead(graph)
    program.targets = (*(program.targets[i] for i in kept), len(inputs))
    program.buffers.append(torch.from_numpy(values)[: len(scalars)])


# ---- what the kernel can do ------------------------------------------------------------------


def _find(program: StepProgram) -> list[_Found]:
    inputs, results = program.inputs, program.results
    position = {node: i for i, node in enumerate(inputs)}
    target_of = {inputs[t]: i for i, t in enumerate(program.targets)}
    found: list[_Found] = []
    calls: dict[fx.Node, dict[int, _Found]] = {}
    for i, (result, target) in enumerate(zip(results, program.targets, strict=True)):
        parameter = inputs[target]
        read = _scaled_direction(result, parameter)
        if read is None:
            continue
        direction, *numbers = read
        source = first_arg(direction) if direction.args else direction
        if direction.target is ops.sign and source in position:
            alike = value_of(source).shape == value_of(parameter).shape
            if source not in target_of and alike:
                tensors = {"parameters": target, "gradients": position[source]}
                found.append(_Found((i,), tensors, SIGN, tuple(numbers)))
        elif direction.target is operator.getitem and source.target is ops.kernel_call:
            k: int = args_of(direction)[1]
            move = _tier2(source, k, target_of, results, position)
            if move is not None:
                calls.setdefault(source, {})[k] = _Found(
                    (i, *move.results),
                    {"parameters": target, **move.tensors},
                    move.kind,
                    (*numbers, *move.numbers),
                )
    for call, own in calls.items():
        _, params, operands = args_of(call)
        if len(own) == len(step_of(dict(params)["roles"], operands).roles["gradients"]):
            found.extend(own.values())
    return found


def _tier2(
    call: fx.Node,
    k: int,
    target_of: dict[fx.Node, int],
    results: Sequence[fx.Node],
    position: dict[fx.Node, int],
) -> _Found | None:
    """Tensor k of a tier-2 call whose new state is what the program returns for the old."""
    name, params, operands = args_of(call)
    if name != "chainrule_tier2":
        return None
    given = step_of(dict(params)["roles"], operands)
    numbers = list(given.numbers.values())
    gradients = given.roles["gradients"]
    n = len(gradients)
    is_direction = numbers[:2] == [-1.0, 0.0] and "parameters" not in given.roles
    for_all = all(not isinstance(x, fx.Node) or x.meta["aval"].ndim == 0 for x in numbers)
    if k >= n or not (is_direction and for_all):
        return None
    if gradients[k] not in position or gradients[k] in target_of:
        return None
    outputs = {args_of(user)[1]: user for user in call.users}
    made = []
    for offset, role in enumerate(given.state.values(), start=1):
        i = target_of.get(role[k])
        if i is None or results[i] is not outputs.get(offset * n + k):
            return None
        made.append(i)
    tensors = {role: position[nodes[k]] for role, nodes in given.roles.items()}
    return _Found(tuple(made), tensors, (name, params), tuple((x,) for x in numbers[2:]))


def _opens(node: fx.Node) -> bool:
    """Roundings to another dtype in between are left out: the kernel rounds once. It has no division by a scalar."""
    values = [value_of(node), value_of(node.all_input_nodes[0])]
    floats = all(value.dtype in _FLOATS for value in values)
    return floats and values[0].ndim > 0 and node.target is not torch.div


def _is_factor(x: Any) -> bool:
    if isinstance(x, fx.Node):
        return is_scalar(value_of(x)) and value_of(x).dtype == torch.float32
    return isinstance(x, (int, float))


_READER = Reader(_opens, _is_factor)


def _scaled_direction(
    result: fx.Node, parameter: fx.Node
) -> tuple[fx.Node, tuple[Scalar, ...], tuple[Scalar, ...]] | None:
    """d, s and r if `result` is parameter + s d + r parameter."""
    value = value_of(parameter)
    if value.ndim == 0 or value.dtype not in _FLOATS or result.target is not torch.add:
        return None
    x, y = args_of(result) if len(result.args) == 2 and not result.kwargs else (None, None)
    if y is parameter:
        x, y = y, x
    if x is not parameter or not isinstance(y, fx.Node):
        return None
    terms = _READER.terms(y)
    if terms is None:
        return None
    decay = terms.pop(parameter).factors if parameter in terms else (0.0,)
    if len(terms) != 1:
        return None
    ((direction, part),) = terms.items()
    if value_of(direction).shape != value.shape:
        return None
    return direction, part.factors, decay
