"""``lower``: a JAX function over pytrees as a torch program over flat tensors."""

import contextlib
import dataclasses
import functools
import gc
import re
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import torch
from jax.extend import core
from torch import Tensor, fx

from chainrule.bridges.lowering.builder import Shared, Target, build
from chainrule.bridges.lowering.nodes import inputs_of, results_of
from chainrule.bridges.lowering.release import graphs_in
from chainrule.bridges.lowering.rules import TABLE
from chainrule.bridges.lowering.rules.elementwise import ELEMENTWISE
from chainrule.native.dtypes import x64_if_wide


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A lowered function; calling it runs the graph eagerly.

    Attributes:
      graph: flat tensors in, a tuple of flat tensors out. A node's ``meta`` holds ``aval`` (its
        JAX shape and dtype, on nodes that stand for a jaxpr variable), ``link`` (the optax link
        it came from, or "") and ``source`` (``file:line``).
      attributes: what the graph's ``get_attr`` nodes name: constants, and the sub-graphs of control
        flow.
      out_avals: shape and dtype of every flat output, in order.
      passthrough: output index to input index where the output *is* that input, unchanged. Every
        other output has memory of its own, shared with no input and no other output.
      device: where its constants live, and its inputs must.
    """

    graph: fx.Graph
    attributes: dict[str, Any]
    out_avals: tuple[jax.ShapeDtypeStruct, ...]
    passthrough: dict[int, int]
    device: torch.device

    @functools.cached_property
    def module(self) -> fx.GraphModule:
        """The graph as Python code, made when it first runs."""
        return fx.GraphModule(self.attributes, self.graph)

    @property
    def graphs(self) -> list[fx.Graph]:
        """The graph and the sub-graphs of control flow."""
        return [self.graph, *graphs_in(self.attributes.values())]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The flat outputs for flat inputs."""
        with torch.no_grad():
            return self.module(*tensors)


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
      The program. Dtypes are held as ``arrays`` says: uint32 and typed PRNG keys as int64.

    Raises:
        UnsupportedPrimitive: a primitive has no lowering; run the chain with ``engine="xla"``.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.sgd(0.5)
    >>> grads = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    >>> lowered = lower(tx.update, grads, tx.init(grads))
    >>> lowered(torch.tensor([1.0, 2.0]))
    (tensor([-0.5000, -1.0000]),)
    """
    structs = jax.tree.map(_struct, example_args)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(structs)]
    names = ["in_" + re.sub(r"\W+", "_", jax.tree_util.keystr(p)).strip("_") for p in paths]
    with x64_if_wide(structs):
        jaxpr = jax.make_jaxpr(fn)(*structs)
        return lower_jaxpr(jaxpr, names, device=device, compiled=compiled)


def lower_jaxpr(
    jaxpr: core.ClosedJaxpr,
    names: Sequence[str] = (),
    *,
    device: torch.device | str = "cpu",
    compiled: bool = False,
    sharded: bool = False,
) -> Lowered:
    """Translate a jaxpr to a ``torch.fx`` graph, as `lower` does.

    Args:
      jaxpr: of flat arrays; traced under ``jax.enable_x64`` if it holds 64-bit values, which must still be on.
      names: what to call the inputs.
      device, compiled: see `lower`.
      sharded: whether it is to be run on parts of tensors, which decides so too.

    Raises:
        UnsupportedPrimitive: a primitive has no lowering; run the chain with ``engine="xla"``.
    """
    device = torch.device(device)
    with collector_paused():
        target = Target(device.type, compiled, sharded)
        shared = Shared(TABLE, frozenset(ELEMENTWISE), device, target, {}, {}, {})
        graph, attributes = build(jaxpr, shared, names)
    inputs = {n: i for i, n in enumerate(inputs_of(graph))}
    passthrough = {i: inputs[n] for i, n in enumerate(results_of(graph)) if n in inputs}
    out_avals = tuple(map(_struct, jaxpr.out_avals))
    return Lowered(graph, attributes, out_avals, passthrough, device)


@contextlib.contextmanager
def collector_paused() -> Generator[None]:
    """Without the cyclic collector, whose passes over a growing graph make the time quadratic."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    if not hasattr(leaf, "dtype"):
        leaf = jax.numpy.asarray(leaf)
    return jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, weak_type=bool(getattr(leaf, "weak_type", False))
    )
