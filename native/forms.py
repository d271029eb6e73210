r"""What each call of the kernel computes, in JAX: the form that XLA compiles where the kernel does not run.

The equations are those of ``include/chainrule``. Arithmetic is float32 at least, and in the tensors' own dtype above
that; so these forms take any floating-point or complex dtype, where the kernel takes three.

Two habits of XLA's CPU compiler decide how the sums are written. It fuses an expression into a sum only if no other
sum reads the same expression: a shared one is written to memory, at several times the cost of both sums. And it fuses
the broadcast of a scalar into a sum only if that scalar is read there alone. The barriers in `own_scalar` and
`square_norm` keep expressions apart for that reason, and change nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Arrays: TypeAlias = Sequence[jax.Array]


def up(x: Any) -> jax.Array:
    """`x` in the dtype in which chains compute: its own, but float32 for half precision."""
    return jnp.asarray(x).astype(jnp.promote_types(jnp.result_type(x), jnp.float32))


def ema(decay: Any, old: jax.Array, new: jax.Array) -> jax.Array:
    """decay * old + (1 - decay) * new."""
    return decay * up(old) + (1 - decay) * up(new)


def abs_sq(x: jax.Array) -> jax.Array:
    """|x|^2, real for complex x."""
    x = up(x)
    return (x.conj() * x).real if jnp.iscomplexobj(x) else x * x


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0, where it has none.

    What an atom takes the root of is 0 only where a gradient always was, and there an infinite derivative times a zero
    one would be NaN: gradients through an update (meta-learning) would be lost to one dead entry.

    >>> jax.grad(root)(4.0).item(), jax.grad(root)(0.0).item()
    (0.25, 0.0)
    """
    return jnp.sqrt(x)


@root.defjvp
def _(primals, tangents):
    y = root(*primals)
    return y, tangents[0] * jnp.where(y > 0, 0.5 / jnp.where(y > 0, y, 1), 0)


@jax.custom_jvp
def share(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y for 0 <= x <= y, with derivative 0 where y is but a floor that keeps 0 / 0 from being NaN.

    >>> float(share(1.0, 4.0)), jax.grad(share, argnums=(0, 1))(1.0, 4.0)[1].item()
    (0.25, -0.0625)
    >>> jax.grad(share, argnums=1)(0.0, 1e-38).item() == 0
    True
    """
    return x / y


@share.defjvp
def _(primals, tangents):
    x, y = primals
    quotient = share(x, y)
    is_floor = y <= 4 * float(jnp.finfo(jnp.float32).tiny)
    # Not by y^-2, which overflows long before 1 / y does.
    slope = jnp.where(is_floor, 0, 1 / jnp.where(is_floor, 1, y))
    return quotient, slope * (tangents[0] - quotient * tangents[1])


# ---- sums ------------------------------------------------------------------------------------


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """The inner product of two arrays as real vectors, real and imaginary parts apart.

    >>> inner(jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 4.0]])).item()
    11.0
    """
    return jnp.sum((up(x).conj() * up(y)).real)


def square_norm(x: jax.Array) -> jax.Array:
    """The squared Euclidean norm of an array as a real vector.

    >>> square_norm(jnp.array([[3.0, -4.0]])).item()
    25.0
    """
    # The barrier: x * x may occur elsewhere too, in a second moment.
    x = jnp.abs(jax.lax.optimization_barrier(up(x)))
    return jnp.sum(x * x)


@jax.custom_jvp
def _apart(scalar: jax.Array, leaf: jax.Array) -> jax.Array:
    """`scalar`, through a barrier with `leaf`; its derivative passes none, which in JAX 0.12 has no transpose here."""
    return jax.lax.optimization_barrier((scalar, leaf))[0]


@_apart.defjvp
def _(primals, tangents):
    return _apart(*primals), tangents[0]


def own_scalar(x: Any, leaf: jax.Array) -> jax.Array:
    """The scalar `x`, to be broadcast in a sum over `leaf`; 0 becomes a smallest normal number.

    The barrier, which `leaf` passes too, tells it from the same scalar for other leaves.

    >>> float(own_scalar(1.0, jnp.ones(2))), float(own_scalar(0.0, jnp.ones(2)))
    (1.0, 1.17...e-38)
    """
    return _apart(x + jnp.float32(jnp.finfo(jnp.float32).tiny), leaf)


def _variance_share(x: jax.Array, y: jax.Array, c: Any) -> jax.Array:
    signal = up(x) * up(x)
    return jnp.sum(share(signal, signal + (own_scalar(c, x) * up(y) + own_scalar(0, x))))


def _square_share(x: jax.Array, y: jax.Array, c: Any) -> jax.Array:
    # min(x^2 / y, c) / c: the scalar stands outside the sum.
    shares = share(up(x) * up(x), jnp.maximum(up(y), own_scalar(0, x)))
    return jnp.sum(jnp.minimum(shares, own_scalar(c, x))) / c


def _magnitude(x: jax.Array, *_: Any) -> jax.Array:
    return jnp.sum(jnp.abs(jnp.where(jnp.isfinite(x), up(x), 0)))


SUMS: Mapping[str, tuple[Any, ...]] = {
    "moments": (lambda x, *_: jnp.sum(up(x)), lambda x, *_: jnp.sum(jnp.square(up(x)))),
    "residual": (  # x - y and y - x: two expressions, each fused into its own sum
        lambda x, y, _: jnp.sum(jnp.abs(up(y) - up(x))),
        lambda x, y, _: jnp.sum(jnp.square(up(x) - up(y))),
    ),
    "alignment": (
        lambda x, y, _: inner(x, y),
        lambda x, *_: square_norm(x),
        lambda _, y, c: square_norm(y),
    ),
    "variance_share": (_variance_share,),
    "square_share": (_square_share,),
    "magnitude": (_magnitude,),
}
"""The kinds of `sums` and their terms, functions of x, y and c."""

OF_ONE = ("moments", "magnitude")
"""The kinds that read x alone; the others are of pairs."""


def sum_dtype(tensors: Sequence[Any]) -> Any:
    """float32, or float64 where a tensor is that wide."""
    floats = (x.dtype for x in tensors if jnp.issubdtype(x.dtype, jnp.inexact))
    return jnp.dtype("float64" if any(jnp.finfo(d).bits == 64 for d in floats) else "float32")


def sums(kind: str, c: jax.Array, xs: Arrays, ys: Arrays) -> list[jax.Array]:
    """Each sum of all tensors as a vector."""
    pairs, dtype = list(zip(xs, ys, strict=True)), sum_dtype([*xs, *ys])
    return [jnp.stack([term(x, y, c) for x, y in pairs]).astype(dtype) for term in SUMS[kind]]


def statistics(gradients: Arrays) -> list[jax.Array]:
    """Mean |g|, mean g^2, variance and max |g|, each a vector with an entry a gradient; zeros for an empty one."""

    def row(g: jax.Array) -> Sequence[jax.Array]:
        if g.size == 0:
            return [jnp.zeros((), jnp.float32)] * 4
        g = up(g)
        size = jnp.abs(g)
        return jnp.mean(size), jnp.mean(abs_sq(g)), jnp.mean(abs_sq(g - jnp.mean(g))), jnp.max(size)

    columns = zip(*map(row, gradients), strict=True)
    return [jnp.stack(column).astype(jnp.float32) for column in columns]


# ---- steps -----------------------------------------------------------------------------------


def tier1(
    gradients: Arrays,
    magnitudes: jax.Array,
    parameters: Sequence[jax.Array | None],
    numbers: Mapping[str, jax.Array],
    scale_decay: bool,
) -> tuple[list[jax.Array], jax.Array]:
    """u = -rate (c sign(g) + decay p), and the new c of each tensor."""
    updates, cs = [], []
    for i, (g, p) in enumerate(zip(gradients, parameters, strict=True)):
        x = {name: number[i] if number.ndim else number for name, number in numbers.items()}
        known = x["mean_magnitude"]
        mean = jnp.where(known < 0, _magnitude(g) / max(g.size, 1), known)
        c = magnitudes[i]
        if g.size:  # a tensor without entries has no mean
            c = ema(x["decay"], c, mean).astype(jnp.float32)
        decay = 0.0 if p is None else x["weight_decay"] * up(p)
        decay = c * decay if scale_decay else decay
        updates.append((-x["learning_rate"] * (c * jnp.sign(up(g)) + decay)).astype(g.dtype))
        cs.append(c)
    return updates, jnp.stack(cs)


def tier2(
    g: jax.Array,
    mu: jax.Array,
    mu_long: jax.Array | None,
    nu: jax.Array | None,
    parameter: jax.Array | None,
    denominator: str,
    x: Mapping[str, jax.Array],
) -> tuple[jax.Array, ...]:
    """One tensor's update and its moments afterwards, in the dtype of the arithmetic; `x` are its numbers."""
    g = up(g)
    mu = momentum = ema(x["b1"], mu, g)
    if mu_long is not None:
        mu_long = ema(x["b1_long"], mu_long, g)
        momentum = x["blend"] * mu + (1 - x["blend"]) * mu_long
    direction = (1 / x["mu_correction"]) * momentum
    if nu is not None:
        nu = ema(x["b2"], nu, abs_sq(g))
        direction = direction / (root(nu / x["nu_correction"]) + x["eps"])
    elif denominator == "magnitude":
        direction = direction / (jnp.abs(g) + x["eps"])
    if parameter is not None:
        direction = direction + x["weight_decay"] * up(parameter)
    new = (-x["learning_rate"] * direction, mu, mu_long, nu)
    return tuple(part for part in new if part is not None)
