"""``lower``: a JAX function over pytrees as a torch program over flat tensors."""

import contextlib
import dataclasses
import gc
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import torch
from torch import Tensor, fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.builder import Shared, build
from chainrule.bridges.lowering.convert import is_key
from chainrule.bridges.lowering.elementwise import ELEMENTWISE
from chainrule.bridges.lowering.table import TABLE


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A lowered function; calling it runs the graph eagerly.

    Attributes:
      graph: flat tensors in, a tuple of flat tensors out. A node's ``meta`` holds ``aval`` (its
        JAX shape and dtype, on nodes that stand for a jaxpr variable), ``link`` (the optax link
        it came from, or ""), ``source`` (``file:line``) and ``leaf`` (None; for later passes).
      in_tree: structure of the example arguments, a tuple.
      out_tree: structure of the result.
      in_avals: shape and dtype of every flat input, in order.
      out_avals: shape and dtype of every flat output, in order.
      passthrough: output index to input index where the output *is* that input, unchanged. Every
        other output has memory of its own, shared with no input and no other output.
      device: where its constants live, and its inputs must.
    """

    graph: fx.GraphModule
    in_tree: Any
    out_tree: Any
    in_avals: tuple[jax.ShapeDtypeStruct, ...]
    out_avals: tuple[jax.ShapeDtypeStruct, ...]
    passthrough: dict[int, int]
    device: torch.device

    @property
    def synchronises(self) -> bool:
        """Whether a run reads a value on the host: a heavy ``cond``, or a ``while``, somewhere."""
        modules = [m for m in self.graph.modules() if isinstance(m, fx.GraphModule)]
        return any(n.target in _ON_HOST for m in modules for n in m.graph.nodes)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The flat outputs for flat inputs."""
        with torch.no_grad():
            return self.graph(*tensors)


def lower(
    fn: Callable[..., Any],
    *example_args: Any,
    device: torch.device | str = "cpu",
    compiled: bool = False,
) -> Lowered:
    """Trace ``fn`` with JAX and translate its jaxpr to a ``torch.fx`` graph.

    Args:
      fn: a pure function of pytrees of arrays, such as an optax ``update``.
      *example_args: pytrees of ``jax.ShapeDtypeStruct`` or arrays. 64-bit leaves turn on
        ``jax.enable_x64`` for the trace.
      device: where the constants the program makes live; the inputs must be there too.
      compiled: whether the program will be compiled, which decides what is left to the compiled kernel.

    Returns:
      The program. Dtypes are held as ``convert`` says: uint32 and typed PRNG keys as int64.

    Raises:
        UnsupportedPrimitive: a primitive has no lowering; run the chain with ``engine="xla"``.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.sgd(0.5)
    >>> grads = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    >>> lowered = lower(tx.update, grads, tx.init(grads))
    >>> lowered(torch.tensor([1.0, 2.0]))
    (tensor([-0.5000, -1.0000]),)
    """
    paths, in_tree = jax.tree_util.tree_flatten_with_path(example_args)
    in_avals = tuple(_struct(leaf) for _, leaf in paths)
    wide = any(not is_key(a.dtype) and a.dtype.name in _WIDE for a in in_avals)
    device = torch.device(device)
    wide = wide or bool(jax.config.read("jax_enable_x64"))
    with collector_paused(), jax.enable_x64(wide):
        structs = jax.tree.unflatten(in_tree, in_avals)
        jaxpr, out = jax.make_jaxpr(fn, return_shape=True)(*structs)
        shared = Shared(TABLE, frozenset(ELEMENTWISE), device, compiled, {}, {}, {})
        names = [
            "in_" + re.sub(r"\W+", "_", jax.tree_util.keystr(path)).strip("_") for path, _ in paths
        ]
        graph = build(jaxpr, shared, names)
    out_leaves, out_tree = jax.tree.flatten(out)
    inputs = {n: i for i, n in enumerate(graph.graph.find_nodes(op="placeholder"))}
    results: Any = graph.graph.output_node().args[0]
    passthrough = {i: inputs[n] for i, n in enumerate(results) if n in inputs}
    out_avals = tuple(_struct(leaf) for leaf in out_leaves)
    return Lowered(graph, in_tree, out_tree, in_avals, out_avals, passthrough, shared.device)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Without the cyclic collector, whose passes over a growing graph make the time quadratic."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


_ON_HOST = (ops.branch, ops.while_loop)
_WIDE = {"int64", "uint64", "float64", "complex128"}


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(leaf, "dtype"):
        leaf = jax.numpy.asarray(leaf)
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, weak_type=bool(getattr(leaf, "weak_type", False))
    )
