"""Whole steps of parameters in the compiled kernel: one pass over the memory, in place.

Where all that a chain does to a direction is scalar, and weight decay,

    p' = p + s d + r p,    d = sign(g), or the direction that COSMIC's tier 2 makes of g and its moments,

the program need only find the scalars s and r; the kernel then renews the parameter and its moments. So `kernel_step`
splits a program: what the kernel does is taken out, and the rest runs as any program does, before it.
"""

import copy
import dataclasses
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor, fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.kernel import buffers, kernel_call, run_tier2
from chainrule.bridges.lowering.pieces import fake_values
from chainrule.bridges.lowering.program import Lowered
from chainrule.bridges.lowering.release import dissolve, dissolve_with
from chainrule.bridges.lowering.scalars import scalar_step
from chainrule.bridges.lowering.simplify import drop_dead, unbind_vectors
from chainrule.native import _kernel, forms
from chainrule.native.primitives import TIER2_NUMBERS, step_of

Step = Callable[[Sequence[Tensor]], None]
Build = Callable[[Lowered, Sequence[int], torch.device], Step]
Factor = fx.Node | float
"""A scalar of the program: a 0-d node, or a number."""
Product = tuple[Factor, ...]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_SIGN = ("sign", ())
_SMALL = 1024
_COMPUTE_NOTHING = (torch.stack, torch.reshape, torch.narrow)
_HAND_OUT = (ops.unbind, kernel_call)


class _Move(NamedTuple):
    """One parameter that the kernel renews."""

    results: tuple[int, ...]
    """Positions of the program's results that it makes: the new parameter, then the new state."""
    tensors: dict[str, int]
    """Role -> position of the input."""
    kind: tuple[str, Any]
    """Name and parameters of its tier-2 primitive, or `_SIGN`."""
    numbers: tuple[Product, ...]
    """s, r, and for tier 2 the numbers of the call from b1 on."""


def kernel_step(
    build: Build, lowered: Lowered, targets: Sequence[int], device: torch.device
) -> Step:
    """`build(lowered, targets, device)`, but for what the kernel does.

    Args:
      build: makes a step of a program.
      lowered: the program.
      targets: for every output, the position of the input that it renews.
      device: of the inputs.

    Returns:
      A function of the flat inputs that renews them in place.
    """
    steps = any(node.target in (ops.sign, kernel_call) for node in lowered.graph.graph.nodes)
    if _kernel is None or device.type != "cpu" or not steps:
        return build(lowered, targets, device)
    module = copy.deepcopy(lowered.graph)
    _measure_together(module.graph)
    fakes = fake_values(dataclasses.replace(lowered, graph=module), device)
    moves = _moves(module.graph, fakes, targets)
    if not moves:
        dissolve(module)
        return build(lowered, targets, device)

    factors = list(dict.fromkeys(f for m in moves for p in m.numbers for f in p))
    nodes = [f for f in factors if isinstance(f, fx.Node)]
    numbers = [f for f in factors if not isinstance(f, fx.Node)]
    calls = [
        _Call([m for m in moves if m.kind == kind], [*nodes, *numbers])
        for kind in dict.fromkeys(m.kind for m in moves)
    ]
    # The largest last: it leaves nothing of the others in the cache.
    sizes = [aval.size for aval in lowered.in_avals]
    calls.sort(key=lambda call: sum(sizes[i] for i in call.tensors["parameters"]))
    rest, renewed = _without(lowered, module, fakes, moves, targets, nodes)
    if _is_small(module.graph, fakes):
        run = scalar_step(rest, renewed, fakes)
    else:
        run = build(rest, renewed, device)
    values = np.array([*(0.0 for _ in nodes), *numbers, 1.0], np.float32)
    found = torch.from_numpy(values)[: len(nodes)]

    @torch.no_grad()
    def step(inputs: Sequence[Tensor]) -> None:
        run([*inputs, found])
        for call in calls:
            call(inputs, values)

    dissolve_with(step, module)
    return step


def _measure_together(graph: fx.Graph) -> None:
    """One call for sums over single tensors that several calls take of inputs."""
    inputs = set(graph.find_nodes(op="placeholder"))
    alike: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=kernel_call):
        name, params, (c, *tensors) = node.args  # pyright: ignore
        of_one = name == "chainrule_sums" and dict(params)["kind"] in forms.OF_ONE  # pyright: ignore
        if of_one and not isinstance(c, fx.Node) and inputs.issuperset(tensors):
            alike.setdefault((params, c), []).append(node)
    for (params, c), calls in alike.items():
        if len(calls) > 1:
            _as_one(graph, params, c, calls)
    unbind_vectors(graph)


def _as_one(graph: fx.Graph, params: Any, c: Any, calls: list[fx.Node]) -> None:
    """One call in the place of several, and their parts of its vectors."""
    own: list[list[fx.Node]] = [node.args[2][1:] for node in calls]  # pyright: ignore
    tensors = [x for xs in own for x in xs]
    vectors: dict[Any, fx.Node] = {}
    with graph.inserting_before(calls[0]):
        whole = graph.call_function(kernel_call, ("chainrule_sums", params, [c, *tensors]))
        for user in calls[0].users:
            k = user.args[1]
            vectors[k] = graph.call_function(operator.getitem, (whole, k))
            vectors[k].meta["aval"] = user.meta["aval"].update(shape=(len(tensors),))
    start = 0
    for node, xs in zip(calls, own, strict=True):
        for user in list(node.users):
            with graph.inserting_before(user):
                part = graph.call_function(torch.narrow, (vectors[user.args[1]], 0, start, len(xs)))
            user.replace_all_uses_with(part)
            graph.erase_node(user)
        graph.erase_node(node)
        start += len(xs)


def _without(
    lowered: Lowered,
    module: fx.GraphModule,
    fakes: dict[fx.Node, Any],
    moves: Iterable[_Move],
    targets: Sequence[int],
    scalars: list[fx.Node],
) -> tuple[Lowered, list[int]]:
    """The program without the results of the moves, and with their scalars as a last input that it renews."""
    graph, taken = module.graph, {r for m in moves for r in m.results}
    output = graph.output_node()
    kept = [i for i in range(len(targets)) if i not in taken]
    results: list[Any] = [output.args[0][i] for i in kept]  # pyright: ignore
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        last = graph.placeholder("scalars")
    struct = jax.ShapeDtypeStruct((len(scalars),), jnp.float32)
    with graph.inserting_before(output):
        found = (torch.stack, (scalars,)) if scalars else (torch.zeros, (0,))
        results.append(graph.call_function(*found))
    fakes[last] = fakes[results[-1]] = torch.empty(len(scalars), device="meta")
    output.args = (tuple(results),)
    drop_dead(graph)
    module.recompile()
    inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    rest = dataclasses.replace(
        lowered,
        graph=module,
        in_avals=(*lowered.in_avals, struct),
        out_avals=(*(lowered.out_avals[i] for i in kept), struct),
        passthrough={i: inputs[r] for i, r in enumerate(results) if r in inputs},
    )
    return rest, [*(targets[i] for i in kept), len(lowered.in_avals)]


def _is_small(graph: fx.Graph, fakes: dict[fx.Node, Any]) -> bool:
    """Whether a program makes nothing but scalars and the like, of which each call costs more than the work."""
    made = [n for n in graph.nodes if n.op == "call_function"]
    free = {n for n in made if n.target in _COMPUTE_NOTHING}
    free |= {n for n in made if n.target is operator.getitem and n.args[0].target in _HAND_OUT}  # pyright: ignore
    sizes = (fakes[n].numel() for n in made if n not in free and isinstance(fakes[n], Tensor))
    return all(size <= _SMALL for size in sizes)


class _Call:
    """The moves of one kind, in one call."""

    def __init__(self, moves: Sequence[_Move], scalars: Sequence[Factor]):
        self.kind = moves[0].kind
        self.tensors = {role: [m.tensors[role] for m in moves] for role in moves[0].tensors}
        self.written = [role for role in self.tensors if role != "gradients"]
        column = {f: k for k, f in enumerate(scalars)}
        one = len(scalars)  # the position of a 1
        width = max(len(product) for m in moves for product in m.numbers)
        places = [
            [[column[f] for f in p] + [one] * (width - len(p)) for p in m.numbers] for m in moves
        ]
        self.numbers = np.array(places, np.intp).swapaxes(0, 1)

    def __call__(self, inputs: Sequence[Tensor], values: np.ndarray) -> None:
        """The moves of `inputs`; `values` are those of the scalars, and a 1."""
        scale, decay, *rest = values[self.numbers].prod(axis=2, dtype=np.float64)
        given = {role: [inputs[i] for i in places] for role, places in self.tensors.items()}
        tensors = {role: list(map(Tensor.contiguous, ts)) for role, ts in given.items()}
        # p + s d + r p is p - rate (d + weight_decay p)
        moves = scale != 0
        weight_decay = np.divide(decay, scale, out=np.zeros_like(scale), where=moves)
        only_decayed = () if moves.all() else np.flatnonzero(~moves)
        numbers = {"learning_rate": -scale, "weight_decay": weight_decay}
        if self.kind == _SIGN:
            _kernel.tier0(**{name: buffers(ts, name) for name, ts in tensors.items()}, **numbers)
        else:
            numbers |= dict(zip(TIER2_NUMBERS[2:], rest, strict=True))
            run_tier2(self.kind[1], tensors, numbers)
        for i in only_decayed:
            tensors["parameters"][i].mul_(1 + decay[i])
        for role in self.written:
            if any(map(operator.is_not, tensors[role], given[role])):
                for old, new in zip(given[role], tensors[role], strict=True):
                    old.copy_(new)


def _moves(graph: fx.Graph, values: dict[fx.Node, Any], targets: Sequence[int]) -> list[_Move]:
    """What the kernel can do of a program."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    position = {node: i for i, node in enumerate(placeholders)}
    results: Any = graph.output_node().args[0]
    renewing = {placeholders[t]: i for i, t in enumerate(targets)}
    moves: list[_Move] = []
    calls: dict[fx.Node, dict[int, _Move]] = {}
    for i, (result, target) in enumerate(zip(results, targets, strict=True)):
        parameter = placeholders[target]
        found = _scaled_direction(result, parameter, values)
        if found is None:
            continue
        direction, scale, decay = found
        if direction.target is ops.sign and direction.args[0] in position:
            gradient: Any = direction.args[0]
            if gradient not in renewing and values[gradient].shape == values[parameter].shape:
                tensors = {"parameters": target, "gradients": position[gradient]}
                moves.append(_Move((i,), tensors, _SIGN, (scale, decay)))
        elif direction.target is operator.getitem and direction.args[0].target is kernel_call:  # pyright: ignore
            call: Any = direction.args[0]
            k: Any = direction.args[1]
            move = _tier2_move(call, k, parameter, renewing, results, position)
            if move is not None:
                tensors = {"parameters": target, **move.tensors}
                numbers = (scale, decay, *move.numbers)
                whole = _Move((i, *move.results), tensors, move.kind, numbers)
                calls.setdefault(call, {})[k] = whole
    for call, found in calls.items():
        _, params, operands = call.args
        if len(found) == len(step_of(dict(params)["roles"], operands).roles["gradients"]):  # pyright: ignore
            moves.extend(found.values())
    return moves


def _tier2_move(call, k, parameter, renewing, results, position) -> _Move | None:
    """Tensor k of a tier-2 call whose new state is what the program returns for the old."""
    name, params, operands = call.args
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
    if gradients[k] not in position or gradients[k] in renewing:
        return None
    outputs = {user.args[1]: user for user in call.users}
    places = []
    for offset, role in enumerate(given.state.values(), start=1):
        place = renewing.get(role[k])
        if place is None or results[place] is not outputs.get(offset * n + k):
            return None
        places.append(place)
    tensors = {role: position[nodes[k]] for role, nodes in given.roles.items()}
    return _Move(tuple(places), tensors, (name, params), tuple((x,) for x in numbers[2:]))


def _scaled_direction(
    result: fx.Node, parameter: fx.Node, values: dict[fx.Node, Any]
) -> tuple[fx.Node, Product, Product] | None:
    """d, s and r if `result` is parameter + s d + r parameter."""
    value = values[parameter]
    if value.ndim == 0 or value.dtype not in _FLOATS or result.target is not torch.add:
        return None
    x, y = result.args if len(result.args) == 2 and not result.kwargs else (None, None)
    if y is parameter:
        x, y = y, x
    if x is not parameter or not isinstance(y, fx.Node):
        return None
    terms = _terms(y, values)
    if terms is None:
        return None
    decay = terms.pop(parameter, (0.0,))
    if len(terms) != 1:
        return None
    ((direction, scale),) = terms.items()
    return (direction, scale, decay) if values[direction].shape == value.shape else None


def _terms(node: fx.Node, values: dict[fx.Node, Any]) -> dict[fx.Node, Product] | None:
    """`node` as a sum of tensors times scalars; None if one tensor is in it twice.

    Roundings to another dtype in between are left out: the kernel rounds once.
    """

    def is_scalar(x: Any) -> bool:
        if isinstance(x, fx.Node):
            return values[x].ndim == 0 and values[x].dtype == torch.float32
        return isinstance(x, (int, float))

    args, plain = node.args, not node.kwargs
    if node.op == "call_function" and plain:
        if node.target is torch.Tensor.to and values[args[0]].dtype in _FLOATS:  # pyright: ignore
            return _terms(args[0], values)  # pyright: ignore
        if node.target is torch.neg:
            return _times(_terms(args[0], values), -1.0)  # pyright: ignore
        if node.target is torch.mul:
            x, y = args if is_scalar(args[1]) else args[::-1]
            if is_scalar(y) and isinstance(x, fx.Node):
                return _times(_terms(x, values), y)
        if node.target in (torch.add, torch.sub) and all(isinstance(a, fx.Node) for a in args):
            first, second = (_terms(a, values) for a in args)  # pyright: ignore
            if node.target is torch.sub:
                second = _times(second, -1.0)
            if first is None or second is None or first.keys() & second.keys():
                return None
            return first | second
    return {node: ()}


def _times(terms: dict[fx.Node, Product] | None, factor: Any) -> dict[fx.Node, Product] | None:
    return terms and {node: (*product, factor) for node, product in terms.items()}
