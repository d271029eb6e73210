"""The kernel in JAX programs: a function for each primitive of `primitives`, which checks its arguments.

Each takes and returns lists of arrays, one a tensor. A number is a Python number or a traced one, for all tensors, or
an array with one for each. Compiled for one CPU device a call is one foreign call with one parallel loop on XLA's own
threads, whose state operands share memory with the results they become, so donated state is never copied; elsewhere,
and without the kernel, XLA computes the same. The kernel's arithmetic is float32 whatever the dtypes; the equations
are in ``include/chainrule``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from chainrule.native import FLOATS, forms, primitives
from chainrule.native.coding import block_count, packed_size

Number = float | jax.Array
Tensors = Sequence[jax.Array]
Shaped = Sequence[jax.Array | jax.ShapeDtypeStruct]


class Tier2Results(NamedTuple):
    """What `tier2` hands back; a moment that was not passed is None."""

    updates: list[jax.Array]
    mu: list[jax.Array]
    mu_long: list[jax.Array] | None
    nu: list[jax.Array] | None


class Codes(NamedTuple):
    """Block-quantised tensors: what `quantize` makes and `dequantize` reads."""

    codes: list[jax.Array]  # (packed_size(n, bits),) uint8
    scales: list[jax.Array]  # (block_count(n, block),) float32


class Tier2QuantizedResults(NamedTuple):
    """What `tier2_quantized` hands back; a moment that was not passed is None."""

    updates: list[jax.Array]
    mu: Codes
    mu_long: Codes | None
    nu: list[jax.Array] | None


def _check(owner: str, name: str, arrays: Shaped, like: Shaped, kernel: str = "native") -> None:
    if len(arrays) != len(like):
        raise ValueError(f"{owner}: `{name}` must have {len(like)} arrays, got {len(arrays)}")
    for i, (a, b) in enumerate(zip(arrays, like, strict=True)):
        if kernel == "native" and str(a.dtype) not in FLOATS:
            raise TypeError(
                f"{owner}: `{name}[{i}]` must be float32, bfloat16 or float16, got {a.dtype}; "
                "use the XLA form of the chain"
            )
        if a.shape != b.shape:
            raise ValueError(f"{owner}: `{name}[{i}]` must have shape {b.shape}, got {a.shape}")


def _check_block(owner: str, block: int, bits: int) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"{owner}: `block` must be an integer of at least 1, got {block!r}")
    if bits not in (4, 8):
        raise ValueError(f"{owner}: `bits` must be 4 or 8, got {bits!r}")


def _check_codes(owner: str, name: str, codes: Codes, like: Shaped, block: int, bits: int) -> None:
    _check_block(owner, block, bits)
    if len(codes.codes) != len(like) or len(codes.scales) != len(like):
        raise ValueError(f"{owner}: `{name}` must have codes and scales of {len(like)} arrays")
    for i, a in enumerate(like):
        wanted = (packed_size(a.size, bits),), "uint8", (block_count(a.size, block),), "float32"
        c, s = codes.codes[i], codes.scales[i]
        if (c.shape, str(c.dtype), s.shape, str(s.dtype)) != wanted:
            raise ValueError(
                f"{owner}: `{name}[{i}]` must be uint8{list(wanted[0])} codes and "
                f"float32{list(wanted[2])} scales, got {c.dtype}{list(c.shape)} and "
                f"{s.dtype}{list(s.shape)}"
            )


_NO_CODES = {"block": 1, "bits": 8, "start": "zero"}


def _numbers(*numbers: Number) -> list[jax.Array]:
    return [jnp.asarray(x, jnp.float32) for x in numbers]


def _step(
    roles: dict[str, Tensors | None],
    numbers: list[jax.Array],
    **params: Any,
) -> dict[str, list[jax.Array]]:
    """Binds a tier-2 step: the updates, under `gradients`, and each role of the state as it is afterwards."""
    given = {name: role for name, role in roles.items() if role is not None}
    n = len(given["gradients"])
    tensors = [x for role in given.values() for x in role]
    flat = primitives.tier2.bind(*numbers, *tensors, roles=tuple(given), **params) if n else []
    results = [name for name in given if name != "parameters"]
    return {name: list(flat[k * n : (k + 1) * n]) for k, name in enumerate(results)}


def _check_denominator(owner: str, denominator: str, nu: Tensors | None) -> None:
    if denominator not in primitives.DENOMINATORS:
        raise ValueError(
            f"{owner}: `denominator` must be 'root', 'magnitude' or 'none', got {denominator!r}"
        )
    if (nu is None) == (denominator == "root"):
        raise ValueError(f"{owner}: `nu` goes with denominator='root', and with no other")


def _rate(
    owner: str,
    learning_rate: Number | None,
    weight_decay: Number | None,
    parameters: Tensors | None,
) -> tuple[Number, Number]:
    if (weight_decay is None) != (parameters is None):
        raise ValueError(f"{owner}: `weight_decay` and `parameters` go together")
    if learning_rate is None and weight_decay is not None:
        raise ValueError(f"{owner}: a direction (learning_rate=None) has no `weight_decay`")
    # The kernel hands out -rate * direction.
    return (-1.0 if learning_rate is None else learning_rate), (weight_decay or 0.0)


def tier2(
    gradients: Tensors,
    mu: Tensors,
    nu: Tensors | None,
    *,
    b1: Number,
    b2: Number,
    eps: Number,
    mu_long: Tensors | None = None,
    b1_long: Number = 0.0,
    blend: Number = 1.0,
    mu_correction: Number = 1.0,
    nu_correction: Number = 1.0,
    denominator: str = "root",
    learning_rate: Number | None = None,
    weight_decay: Number | None = None,
    parameters: Tensors | None = None,
    in_place: bool = False,
    kernel: str = "native",
) -> Tier2Results:
    r"""Tier 2: the direction, or the whole step, of a blend of two EMAs over a root mean square.

    .. math::

        m &= w \mu + (1 - w) \mu^{long}, \qquad
        d = \frac{m / c_1}{\sqrt{\nu / c_2} + \epsilon} \\
        u &= d \quad\text{or}\quad u = -\eta\, (d + \lambda p)

    Args:
        gradients: one array a tensor; the updates take their shapes and dtypes.
        mu: first moment before the step.
        nu: second moment before the step; None unless `denominator` is ``"root"``.
        b1: decay of `mu`.
        b2: decay of `nu`.
        eps: added to the denominator.
        mu_long: a second, slower first moment; None leaves it out.
        b1_long: decay of `mu_long`.
        blend: weight w of `mu` against `mu_long`; 1 without it.
        mu_correction: divides the momentum, as ``1 - b1**count`` does.
        nu_correction: divides `nu`, as ``1 - b2**count`` does.
        denominator: ``"root"``; ``"magnitude"`` (abs(g) + eps); or ``"none"``.
        learning_rate: None for the direction d; otherwise the step u to add to the parameters.
        weight_decay: with `parameters`, decoupled decay.
        parameters: read, never written.
        in_place: the updates take the gradients' memory. It saves a buffer where the gradients are
            made in the same program and not needed afterwards, and costs a copy everywhere else.
        kernel: ``"native"``, ``"xla"``, or ``"auto"``: what is faster (see `primitives`).

    Returns:
        The updates and the new moments.

    Raises:
        TypeError: a dtype that is not float32, bfloat16 or float16.
        ValueError: roles that do not fit each other.
    """
    owner = "native.xla.tier2"
    _check(owner, "gradients", gradients, gradients, kernel)
    rate, decay = _rate(owner, learning_rate, weight_decay, parameters)
    for name, role in (("mu", mu), ("nu", nu), ("mu_long", mu_long), ("parameters", parameters)):
        if role is not None:
            _check(owner, name, role, gradients, kernel)
    _check_denominator(owner, denominator, nu)
    new = _step(
        {
            "gradients": gradients,
            "mu": mu,
            "mu_long": mu_long,
            "nu": nu,
            "parameters": parameters,
        },
        _numbers(rate, decay, b1, b1_long, blend, b2, eps, mu_correction, nu_correction),
        **{"denominator": denominator, "kernel": kernel, "in_place": in_place, **_NO_CODES},
    )
    return Tier2Results(new["gradients"], new["mu"], new.get("mu_long"), new.get("nu"))


def tier2_quantized(
    gradients: Tensors,
    mu: Codes,
    nu: Tensors | None,
    *,
    block: int,
    bits: int = 4,
    start: str = "zero",
    b1: Number,
    b2: Number,
    eps: Number,
    mu_long: Codes | None = None,
    b1_long: Number = 0.0,
    blend: Number = 1.0,
    mu_correction: Number = 1.0,
    nu_correction: Number = 1.0,
    denominator: str = "root",
    learning_rate: Number | None = None,
    weight_decay: Number | None = None,
    parameters: Tensors | None = None,
    in_place: bool = False,
    kernel: str = "native",
) -> Tier2QuantizedResults:
    """`tier2` with its first moments held as codes; the step uses them before they are rounded.

    Args:
        gradients: one array a tensor; the updates take their shapes and dtypes.
        mu: codes of the first moment before the step.
        nu: second moment before the step; None unless `denominator` is ``"root"``.
        block: elements that share a scale.
        bits: 4 or 8 a code.
        start: ``"gradient"`` takes the gradient for the EMA before this step where a scale is 0.
        b1, b2, eps, b1_long, blend, mu_correction, nu_correction, denominator: as in `tier2`.
        mu_long: codes of the slower first moment; None leaves it out.
        learning_rate, weight_decay, parameters, in_place, kernel: as in `tier2`.

    Returns:
        The updates and the new moments.

    Raises:
        TypeError: a dtype that is not float32, bfloat16 or float16.
        ValueError: roles that do not fit each other, a block below 1, bits other than 4 and 8.
    """
    owner = "native.xla.tier2_quantized"
    _check(owner, "gradients", gradients, gradients, kernel)
    rate, decay = _rate(owner, learning_rate, weight_decay, parameters)
    for name, role in (("nu", nu), ("parameters", parameters)):
        if role is not None:
            _check(owner, name, role, gradients, kernel)
    _check_denominator(owner, denominator, nu)
    if start not in ("zero", "gradient"):
        raise ValueError(f"{owner}: `start` must be 'zero' or 'gradient', got {start!r}")
    _check_codes(owner, "mu", mu, gradients, block, bits)
    if mu_long is not None:
        _check_codes(owner, "mu_long", mu_long, gradients, block, bits)
    new = _step(
        {
            "gradients": gradients,
            "mu_codes": mu.codes,
            "mu_scales": mu.scales,
            "mu_long_codes": None if mu_long is None else mu_long.codes,
            "mu_long_scales": None if mu_long is None else mu_long.scales,
            "nu": nu,
            "parameters": parameters,
        },
        _numbers(rate, decay, b1, b1_long, blend, b2, eps, mu_correction, nu_correction),
        denominator=denominator,
        kernel=kernel,
        in_place=in_place,
        block=block,
        bits=bits,
        start=start,
    )
    return Tier2QuantizedResults(
        updates=new["gradients"],
        mu=Codes(new["mu_codes"], new["mu_scales"]),
        mu_long=Codes(new["mu_long_codes"], new["mu_long_scales"]) if mu_long else None,
        nu=new.get("nu"),
    )


def tier1(
    gradients: Tensors,
    magnitudes: jax.Array,
    *,
    decay: Number,
    mean_magnitude: Number = -1.0,
    learning_rate: Number | None = None,
    weight_decay: Number | None = None,
    scale_decay: bool = False,
    parameters: Tensors | None = None,
    in_place: bool = False,
    kernel: str = "native",
) -> tuple[list[jax.Array], jax.Array]:
    r"""Tier 1: the sign of the gradient, as long as its mean magnitude has been.

    .. math::

        c = \beta c + (1 - \beta) \overline{|g|}, \qquad
        u = c\,\operatorname{sign} g \quad\text{or}\quad
        u = -\eta\, (c\,\operatorname{sign} g + \lambda p)

    Args:
        gradients: one array a tensor; the updates take their shapes and dtypes.
        magnitudes: (tensors,) float32, c before the step.
        decay: of c; 0 makes c the mean magnitude of this gradient.
        mean_magnitude: mean of abs(g) where it is known already; below 0 it is found here.
        learning_rate: None for the direction; otherwise the step to add to the parameters.
        weight_decay: with `parameters`, decoupled decay.
        scale_decay: c multiplies the weight decay too, as in the reference.
        parameters: read, never written.
        in_place: the updates take the gradients' memory. It saves a buffer where the gradients are
            made in the same program and not needed afterwards, and costs a copy everywhere else.
        kernel: ``"native"``, ``"xla"``, or ``"auto"``: what is faster (see `primitives`).

    Returns:
        The updates and the new magnitudes.

    Raises:
        TypeError: a dtype that is not float32, bfloat16 or float16.
        ValueError: roles that do not fit each other.
    """
    owner = "native.xla.tier1"
    _check(owner, "gradients", gradients, gradients)
    rate, weight = _rate(owner, learning_rate, weight_decay, parameters)
    if parameters is not None:
        _check(owner, "parameters", parameters, gradients)
    if magnitudes.shape != (len(gradients),) or magnitudes.dtype != jnp.float32:
        raise ValueError(
            f"{owner}: `magnitudes` must be float32[{len(gradients)}], "
            f"got {magnitudes.dtype}{list(magnitudes.shape)}"
        )
    if not gradients:
        return [], magnitudes
    new, *updates = primitives.tier1.bind(
        *_numbers(rate, weight, decay, mean_magnitude),
        magnitudes,
        *gradients,
        *(parameters or ()),
        scale_decay=scale_decay,
        has_parameters=parameters is not None,
        in_place=in_place,
        kernel=kernel,
    )
    return updates, new


def statistics(gradients: Tensors, *, kernel: str = "native") -> jax.Array:
    """Mean abs(g), mean g**2, variance and max abs(g) of each tensor; the kernel sums in float64.

    Args:
        gradients: one array a tensor.
        kernel: as in `tier2`.

    Returns:
        (tensors, 4) float32; 0 for an empty tensor, NaN where a gradient is NaN.

    Raises:
        TypeError: for the kernel, a dtype that is not float32, bfloat16 or float16.
    """
    _check("native.xla.statistics", "gradients", gradients, gradients, kernel)
    if not gradients:
        return jnp.zeros((0, 4), jnp.float32)
    columns = primitives.statistics.bind(*gradients, kernel=kernel)
    return jnp.stack(columns, axis=1)


def sums(
    kind: str,
    xs: Tensors,
    ys: Tensors | None = None,
    c: Number = 1.0,
    *,
    kernel: str = "native",
) -> list[jax.Array]:
    """Sums over each tensor, or each pair of tensors, in one pass over all of them.

    In the kernel terms are float32, and are added in float64 tile by tile. Under ``vmap`` it stays one call.

    Args:
        kind: ``"moments"``, sum x and sum x^2; ``"residual"``, sum abs(x - y) and sum (x - y)^2;
            ``"alignment"``, sum x y, sum x^2 and sum y^2; ``"variance_share"``, sum x^2 / (x^2 + c y);
            ``"square_share"``, sum x^2 / max(x^2, c y); in both a term is 0 where x and y are;
            ``"magnitude"``, sum abs(x) over the entries that are finite.
        xs: one array a tensor.
        ys: as many of the same shapes; None for the moments and the magnitude.
        c: one number for all tensors, read for the shares.
        kernel: as in `tier2`.

    Returns:
        Each of the sums of all tensors, (tensors,) float32.

    Raises:
        TypeError: for the kernel, a dtype that is not float32, bfloat16 or float16.
        ValueError: another kind; `ys` missing, one too many, or of other shapes.

    >>> xs, ys = [jnp.array([1.0, -2.0])], [jnp.array([3.0, 0.0])]
    >>> [total.tolist() for total in sums("alignment", xs, ys)]
    [[3.0], [5.0], [9.0]]
    >>> sums("variance_share", xs, ys)[0].tolist(), sums("square_share", xs, ys, c=0.5)[0].tolist()
    ([1.25], [1.66...])
    """
    owner = "native.xla.sums"
    if kind not in forms.SUMS:
        raise ValueError(f"{owner}: `kind` must be one of {', '.join(forms.SUMS)}, got {kind!r}")
    of_pairs = kind not in forms.OF_ONE
    if (ys is not None) != of_pairs:
        raise ValueError(f"{owner}: `ys` must {'not ' * of_pairs}be None for {kind!r}")
    _check(owner, "xs", xs, xs, kernel)
    _check(owner, "ys", xs if ys is None else ys, xs, kernel)
    if not xs:
        return [jnp.zeros((0,), jnp.float32) for _ in forms.SUMS[kind]]
    c = jnp.asarray(c, jnp.float32)
    return list(primitives.sums.bind(c, *xs, *(ys or ()), kind=kind, batch=0, kernel=kernel))


def quantize(values: Tensors, *, block: int, bits: int = 4, keys: jax.Array | None = None) -> Codes:
    """Codes of whole tensors, to nearest or, with `keys`, stochastically.

    Args:
        values: one array a tensor.
        block: elements that share a scale.
        bits: 4 or 8 a code.
        keys: (tensors, 2) uint32, a Threefry key for each tensor (``jax.random.key_data``): rounds
            ``x / scale + u`` down, u the 24 high bits of ``jax.random.bits(key, shape, "uint32")``.

    Returns:
        The codes and their scales.

    Raises:
        TypeError: a dtype that is not float32, bfloat16 or float16.
        ValueError: a block below 1, bits other than 4 and 8, keys of another shape.
    """
    owner = "native.xla.quantize"
    _check(owner, "values", values, values)
    _check_block(owner, block, bits)
    n = len(values)
    if keys is not None and (keys.shape != (n, 2) or keys.dtype != jnp.uint32):
        raise ValueError(
            f"{owner}: `keys` must be uint32[{n}, 2], got {keys.dtype}{list(keys.shape)}"
        )
    if not values:
        return Codes([], [])
    flat = primitives.quantize.bind(
        jnp.zeros((n, 2), jnp.uint32) if keys is None else keys,
        *values,
        block=block,
        bits=bits,
        stochastic=keys is not None,
        kernel="native",
    )
    return Codes(list(flat[:n]), list(flat[n:]))


def dequantize(codes: Codes, like: Shaped, *, block: int, bits: int = 4) -> list[jax.Array]:
    """The tensors that codes stand for.

    Args:
        codes: as `quantize` made them.
        like: arrays, or shapes and dtypes, of the tensors.
        block: elements that share a scale.
        bits: 4 or 8 a code.

    Returns:
        One array a tensor.

    Raises:
        TypeError: a dtype that is not float32, bfloat16 or float16.
        ValueError: codes that do not belong to such tensors.
    """
    owner = "native.xla.dequantize"
    _check(owner, "like", like, like)
    _check_codes(owner, "codes", codes, like, block, bits)
    if not like:
        return []
    shapes = tuple((a.shape, jnp.dtype(a.dtype)) for a in like)
    operands = [*codes.codes, *codes.scales]
    return list(
        primitives.dequantize.bind(*operands, like=shapes, block=block, bits=bits, kernel="native")
    )
