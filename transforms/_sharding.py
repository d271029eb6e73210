"""How arrays lie on a mesh of devices, where that is not left to XLA."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray, Tracer
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from chainrule.native.primitives import in_front, on_one_device


def check_sharding(owner: str, sharding: Any) -> None:
    """Raises unless `sharding` names devices, for the first axis of a stack and no other."""
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"{owner}: `sharding` must be a `jax.sharding.NamedSharding`, which has a mesh, got {sharding!r}"
        )
    if len(sharding.spec) != 1 or sharding.spec[0] is None:
        raise ValueError(
            f"{owner}: `sharding` must name axes of its mesh for the stack of matrices and nothing else, such as "
            f"PartitionSpec({sharding.mesh.axis_names[0]!r}), got {sharding.spec}"
        )


def parts_of(sharding: NamedSharding) -> int:
    """Into how many parts it cuts the first axis."""
    names = sharding.spec[0]
    return math.prod(sharding.mesh.shape[n] for n in ([names] if isinstance(names, str) else names))


def laid_out(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`x`, lying as `sharding` says."""
    if sharding.mesh.are_all_axes_explicit:
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def _type_of(x: jax.Array) -> NamedSharding:
    """What the type of an array says of its sharding: nothing but on a mesh with explicit axes."""
    return jax.typeof(x).sharding


def whole(x: jax.Array) -> jax.Array:
    """`x` on every device, if its type says that it is cut: products and reshapes of it would be ambiguous.

    >>> whole(jax.numpy.ones(2)).tolist()
    [1.0, 1.0]
    """
    own = _type_of(x)
    cut = any(axis is not None for axis in own.spec)
    return jax.sharding.reshard(x, NamedSharding(own.mesh, PartitionSpec())) if cut else x


def lie_as(like: jax.Array, x: jax.Array) -> jax.Array:
    """`x`, of the shape of `like`, cut as the type of that says."""
    own = _type_of(like)
    return jax.sharding.reshard(x, own) if own != _type_of(x) else x


_alike = core.Primitive("chainrule_alike")
"""Operands x and another of its shape; the result is x. A primitive, so that programs are the same on one device and on
eight, and whoever reads them knows what is meant."""


def alike(like: Any, x: jax.Array) -> jax.Array:
    """`x`, of the shape of `like`, on the devices where that is: inside `jit` a constant would be whole on each.

    >>> alike(jax.numpy.ones(2), jax.numpy.zeros(2)).tolist()
    [0.0, 0.0]
    """
    return _alike.bind(x, like) if isinstance(like, Tracer) else x


def _chosen(x: jax.Array, like: jax.Array) -> jax.Array:
    """A choice between `x` and `x`, which XLA lays out as what decides; the barrier keeps it from being folded."""
    one, other = jax.lax.optimization_barrier((like == like, x))
    return jax.lax.select(one, x, other)


def _abstract(x: ShapedArray, like: ShapedArray) -> ShapedArray:
    if x.sharding.mesh.empty:
        return x
    # On a mesh a result's type tells what it varies over, and the form knows.
    (out,) = jax.make_jaxpr(_chosen)(x, like).out_avals
    return out


def _jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    return _alike.bind(*primals), tangents[0]


def _batch(operands: Sequence[Any], axes: Sequence[int | None]) -> tuple[jax.Array, int]:
    return _alike.bind(*in_front(operands, axes)), 0


def _lowered(ctx: mlir.LoweringRuleContext, x: Any, like: Any) -> Sequence[Any]:
    if on_one_device(ctx):
        return [x]
    return mlir.lower_fun(_chosen, multiple_results=False)(ctx, x, like)


_alike.def_impl(lambda x, like: jax.device_put(x, jnp.asarray(like).sharding))
_alike.def_abstract_eval(_abstract)
ad.primitive_jvps[_alike] = _jvp
batching.primitive_batchers[_alike] = _batch
mlir.register_lowering(_alike, _lowered)
