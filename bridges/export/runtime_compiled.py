"""How an exported optimizer compiles a step as a whole: `_step` traced for one list of tensors, through Inductor."""

# pyright: reportPrivateUsage=false, reportUnusedFunction=false
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from chainrule.bridges.export.runtime_checks import _step
from chainrule.bridges.export.runtime_lists import _Entries, _Leaf
from chainrule.bridges.lowering.backends.early_copies import _copy_early

# ------------------------------------------------------------------------------------------------


_THREADED = 1 << 13
"""So many elements are worth more than one thread."""
_SHAPE, _DTYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")
_SCALED: Mapping[str, Callable[..., Tensor]] = {
    "add": lambda scale, x, y: x + scale * y,
    "sub": lambda scale, x, y: x - scale * y,
    "addcmul": lambda scale, x, y, z: x + scale * (y * z),
    "addcdiv": lambda scale, x, y, z: x + scale * (y / z),
}


class _NumbersStay(TorchFunctionMode):
    """Numbers stay tensors: a compiled step reads none on the host, so that new ones need no new program.

    Factors of a sum are products of their own: Inductor of torch 2.13 forgets them beside a matrix product.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        named = dict(kwargs or {})
        if func is Tensor.item:
            return args[0]
        if func is torch.nan_to_num:
            return _without_nonfinite(*args)
        if func is torch.stack and isinstance(args[0], _Entries):
            return args[0].vector
        for key in ("alpha", "value"):
            if key in named:
                name = func.__name__
                new = _SCALED[name.rstrip("_")](named[key], *args)
                return args[0].copy_(new) if name.endswith("_") else new
        return func(*args, **named)


def _without_nonfinite(x: Tensor, nan: float, above: float, below: float) -> Tensor:
    """`torch.nan_to_num` of what Inductor has for vectors: its `isnan` goes number by number."""
    kept = torch.where(x == -math.inf, below, torch.where(x == math.inf, above, x))
    return torch.where(x.ne(x), nan, kept)


def _inputs(
    leaves: Sequence[_Leaf], shared: Mapping[str, Tensor], rates: Mapping[str, Tensor], loss: Tensor
) -> list[Tensor]:
    """All tensors of a step in one list."""
    return [
        *(leaf.param for leaf in leaves),
        *(leaf.grad for leaf in leaves),
        *(x for leaf in leaves for x in leaf.state.values()),
        *shared.values(),
        *rates.values(),
        loss,
    ]


def _given(
    tensors: Iterable[Tensor],
    leaves: Sequence[_Leaf],
    shared: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
) -> tuple[list[_Leaf], dict[str, Tensor], dict[str, Tensor], Tensor]:
    """The arguments of `_step`, of the tensors of that list."""
    given = iter(tensors)
    params = [next(given) for _ in leaves]
    grads = [next(given) for _ in leaves]
    states = [{name: next(given) for name in leaf.state} for leaf in leaves]
    own = [
        _Leaf(p, g, s, leaf.kind)
        for p, g, s, leaf in zip(params, grads, states, leaves, strict=True)
    ]
    group = {name: next(given) for name in shared}
    live = {name: next(given) for name in rates}
    return own, group, live, next(given)


def _traced(
    body: Callable[..., list[Tensor]], inputs: Sequence[Tensor], symbolic: bool = False
) -> torch.fx.GraphModule:
    """What a function does with tensors like these, its writes as copies into them at the end."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    pure = torch.func.functionalize(body, remove="mutations")
    mode = "symbolic" if symbolic else "fake"
    module = make_fx(pure, select_decomp_table(), tracing_mode=mode)(*inputs)
    if all(x.is_cpu for x in inputs):
        _copy_early(module.graph)
        module.recompile()
    return module


def _through_inductor(
    graph: torch.fx.GraphModule, options: dict[str, Any]
) -> Callable[[list[Tensor]], Any]:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    inputs = [n.meta["val"] for n in graph.graph.find_nodes(op="placeholder")]
    if all(x.is_cpu for x in inputs if isinstance(x, Tensor)):
        # What two loops read of several tensors is computed in both: memory for it costs more.
        options = {**options, "realize_reads_threshold": 16}
    with config.patch(options):
        return compile_fx_inner(graph, inputs)  # pyright: ignore


def _as_a_whole(
    leaves: Sequence[_Leaf],
    shared: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    loss: Tensor,
) -> Callable[[list[Tensor]], Any]:
    """The step for tensors of these shapes, all contiguous, as one program; it writes in place."""

    def body(*tensors: Tensor) -> list[Tensor]:
        with _NumbersStay():
            _step(*_given(tensors, leaves, shared, rates))
        return []

    inputs = [x.detach().contiguous() for x in _inputs(leaves, shared, rates, loss)]
    graph = _traced(body, inputs)
    numbers = _numbers_apart(graph.graph)
    graph.recompile()
    chunk = max(1, _THREADED // torch.get_num_threads())
    options = {"size_asserts": False, "cpp.min_chunk_size": chunk}
    modules = torch.fx.GraphModule(graph, numbers), graph
    first, second = (_through_inductor(module, options) for module in modules)
    return lambda tensors: second([*tensors, *first(list(tensors))])


def _numbers_apart(graph: torch.fx.Graph) -> torch.fx.Graph:
    """Takes what is computed of numbers alone out of a graph, which gets the results as inputs.

    Inductor would compute them again for each vector of each tensor.
    """
    numbers, copies, apart = torch.fx.Graph(), {}, set()
    for node in graph.nodes:
        value = node.meta.get("val")
        is_number = isinstance(value, Tensor) and value.ndim == 0 and node.all_input_nodes
        is_own = is_number and all(
            x in copies and not x.meta["val"].ndim for x in node.all_input_nodes
        )
        if node.op == "call_function" and is_own and not node.target._schema.is_mutable:
            apart.add(node)
        if node.op == "placeholder" or node in apart:
            copies[node] = numbers.node_copy(node, copies.__getitem__)
    read = [node for node in graph.nodes if node in apart and not apart.issuperset(node.users)]
    numbers.output([copies[node] for node in read])
    last = graph.find_nodes(op="placeholder")[-1]
    for index, node in enumerate(read):
        with graph.inserting_after(last):
            last = graph.placeholder(f"number_{index}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last, lambda user: user not in apart)
    for node in reversed(list(graph.nodes)):
        if node in apart:
            graph.erase_node(node)
    return numbers


def _run(program: Callable[[list[Tensor]], Any], tensors: Sequence[Tensor], leaves: int) -> None:
    """A compiled step. What is not contiguous is copied there, and back unless it is a gradient."""
    ready = list(tensors)
    if all(map(Tensor.is_contiguous, tensors)):
        program(ready)
        return
    ready = [x.contiguous() for x in tensors]
    program(list(ready))
    for k, (x, new) in enumerate(zip(tensors, ready, strict=True)):
        if new is not x and not leaves <= k < 2 * leaves:
            x.copy_(new)
