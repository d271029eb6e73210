"""How arrays lie on a mesh of devices, where that is not left to XLA."""

import math
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec


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


def alike(like: Any, x: jax.Array) -> jax.Array:
    """`x`, of the shape of `like`, on the devices where that is: inside `jit` a constant would be whole on each.

    >>> alike(jax.numpy.ones(2), jax.numpy.zeros(2)).tolist()
    [0.0, 0.0]
    """
    if not isinstance(like, Tracer):
        return x
    from chainrule.native import primitives  # whose import takes as long as optax's

    return primitives.alike.bind(x, like)
