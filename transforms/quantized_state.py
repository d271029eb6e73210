r"""Any transform with its parameter-shaped state held in 4 or 8 bits, block by block.

    scale_j = max|x_i| / q_max over block j (1 if the block is zero),    q_i = clip(round(x_i / scale_j), -q_max, q_max)
    x_i is held as q_i and scale_j; q_max is 7 for 4 bits, 127 for 8

Source: COSMIC, repository commit 96f1a8c (4-bit EMAs); Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", 2022. Departures: blocks may have any length, odd ones too; any
transform's state; stochastic rounding; XLA takes denormal numbers for zero.

Layout of 4 bits: q + 8 in a nibble, two to a byte, the even index in the low nibble, over the whole
tensor in row-major order.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._chain import posted
from chainrule.transforms._checks import check_choice
from chainrule.transforms._numerics import up
from chainrule.transforms._words import checked_words

_LARGEST = {4: 7, 8: 127}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A tensor in blocks of small integers."""

    codes: jax.Array
    """uint8: (ceil(n / 2),) packed nibbles for 4 bits, (n,) for 8 (q + 128)."""
    scale: jax.Array
    """float32 (ceil(n / block),)."""
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})


class QuantizedState(NamedTuple):
    """State of `quantized_state`."""

    key: jax.Array | None
    """uint32 (2,): the random key of stochastic rounding, else `None`."""
    inner_state: optax.OptState
    """The inner state, with `Quantized` in place of the tensors that are held so."""

    def posted(self) -> dict[str, Any]:
        """For later links: what the inner state offers, decoded."""
        return posted(decode(self.inner_state))


def quantize(
    x: jax.Array, bits: int = 4, block: int = 256, key: jax.Array | None = None
) -> Quantized:
    """`x` in blocks of `bits`-bit integers; `key` rounds stochastically, else to nearest, half to even.

    >>> q = quantize(jnp.array([7.0, -3.0, 0.4]), block=3)
    >>> q.codes.tolist(), q.scale.tolist(), dequantize(q).tolist()
    ([95, 8], [1.0], [7.0, -3.0, 0.0])
    """
    largest, n = _LARGEST[bits], x.size
    blocks = -(-n // block)
    flat = jnp.pad(up(x).reshape(-1).astype(jnp.float32), (0, blocks * block - n)).reshape(
        blocks, block
    )
    scale = jnp.max(jnp.abs(flat), axis=1, initial=0) / largest
    scale = jnp.where(scale == 0, 1.0, scale)
    ratio = (flat / scale[:, None]).reshape(-1)[:n]
    if key is None:
        rounded = jnp.round(ratio)
    else:
        rounded = jnp.floor(ratio + jax.random.uniform(key, ratio.shape))
    q = jnp.clip(rounded, -largest, largest).astype(jnp.int32)
    if bits == 8:
        codes = (q + 128).astype(jnp.uint8)
    else:
        nibbles = jnp.pad((q + 8).astype(jnp.uint8), (0, n % 2))
        codes = nibbles[0::2] | (nibbles[1::2] << 4)
    return Quantized(codes, scale, x.shape, str(x.dtype), block, bits)


def dequantize(q: Quantized) -> jax.Array:
    """The tensor that `q` holds, to half a quantum of what was quantised."""
    n = 1
    for length in q.shape:
        n *= length
    if q.bits == 8:
        codes = q.codes.astype(jnp.float32) - 128
    else:
        nibbles = jnp.stack([q.codes & 0xF, q.codes >> 4], axis=1).reshape(-1)[:n]
        codes = nibbles.astype(jnp.float32) - 8
    scale = jnp.repeat(q.scale, q.block, total_repeat_length=len(q.scale) * q.block)[:n]
    return (codes * scale).reshape(q.shape).astype(q.dtype)


def decode(state: Any) -> Any:
    """`state` with its `Quantized` parts as tensors."""

    def held(node):
        return isinstance(node, Quantized)

    return jax.tree.map(lambda x: dequantize(x) if held(x) else x, state, is_leaf=held)


@checked_words
def quantized_state(
    inner: optax.GradientTransformation,
    bits: int | None = 4,
    block: int | None = 256,
    *,
    rounding: str = "nearest",
    fields: Sequence[str] | None = None,
    smaller: str = "keep",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Holds the parameter-shaped state of any transform in blocks of 4- or 8-bit integers.

    The state is decoded before each update and encoded after it; the update itself uses the new
    moments as they are, so a step loses only what the next one reads. Scalars, integers and masked
    leaves stay as they are. In the compiled kernel `scale_by_dual_ema` works on the codes themselves,
    to nearest.

    Args:
      inner: any gradient transformation.
      bits: 4 or 8; `None`: `inner` as it is.
      block: elements that share a scale, at least 1; `None`: the whole tensor.
      rounding: `"nearest"` (half to even) or `"stochastic"`, whose error has mean zero, so that
        small increments to an EMA are not lost.
      fields: names of the state's fields to hold so (`("mu",)`, say); `None`: all.
      smaller: `"keep"` tensors smaller than a block as they are, or `"quantize"` them too.
      seed: of stochastic rounding.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range.

    >>> tx = quantized_state(optax.scale_by_adam(), bits=8, block=16)
    >>> state = tx.init(jnp.zeros(64))
    >>> state.inner_state.mu.codes.dtype, state.inner_state.mu.scale.shape
    (dtype('uint8'), (4,))

    References:
      Dettmers et al., https://arxiv.org/abs/2110.02861
    """
    check_choice("quantized_state", "bits", bits, (None, 4, 8))
    check_choice("quantized_state", "rounding", rounding, ("nearest", "stochastic"))
    check_choice("quantized_state", "smaller", smaller, ("keep", "quantize"))
    if block is not None and block < 1:
        raise ValueError(f"quantized_state: `block` must be at least 1, got {block}")
    inner = optax.with_extra_args_support(inner)
    if bits is None:
        return inner
    stochastic = rounding == "stochastic"

    def held(path: tuple[Any, ...], x: Any) -> bool:
        names = {getattr(entry, "name", None) for entry in path}
        if fields is not None and not names & set(fields):
            return False
        large = smaller == "quantize" or block is None or x.size >= block
        return x.ndim > 0 and x.size > 0 and large and jnp.issubdtype(x.dtype, jnp.floating)

    def encode(state: Any, key: jax.Array | None) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(state)
        keys = [None] * len(leaves) if key is None else list(jax.random.split(key, len(leaves)))
        encoded = [
            quantize(x, bits, block or x.size, k) if held(path, x) else x
            for (path, x), k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(treedef, encoded)

    def init(params) -> Any:
        key = jax.random.PRNGKey(seed) if stochastic else None
        return QuantizedState(key, encode(inner.init(params), None))

    def update(updates, state, params=None, **extra_args) -> Any:
        key, now = jax.random.split(state.key) if stochastic else (None, None)

        def on_codes():
            return inner.update(updates, state.inner_state, params, **extra_args)

        def on_tensors():
            new_updates, new = inner.update(
                updates, decode(state.inner_state), params, **extra_args
            )
            return new_updates, encode(new, now)

        takes_codes = getattr(inner.update, "takes_codes", None)
        where = "nowhere"
        if takes_codes and not stochastic:
            where = takes_codes(updates, state.inner_state)
        if where == "on the CPU":
            new_updates, new = jax.lax.platform_dependent(cpu=on_codes, default=on_tensors)
        else:
            new_updates, new = on_codes() if where == "everywhere" else on_tensors()
        return new_updates, QuantizedState(key, new)

    return optax.GradientTransformationExtraArgs(init, update)
