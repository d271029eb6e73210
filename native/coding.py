"""Tensors in codes, in JAX: the form that XLA compiles; ``include/chainrule/coding.hpp`` has the equations."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from chainrule.native.forms import up

LEVELS = {4: 7, 8: 127}
"""The largest code of a block for each number of bits."""


def packed_size(size: int, bits: int) -> int:
    """Bytes of the codes of `size` elements."""
    return (size + 1) // 2 if bits == 4 else size


def block_count(size: int, block: int) -> int:
    """Scales of `size` elements; a block beyond the end is the whole tensor."""
    return -(-size // block)


class Format(NamedTuple):
    """How a tensor is held in codes"""

    bits: int
    block: int
    logarithmic: bool = False
    """A float's leading digits, for tensors that are never negative; else whole numbers of a scale."""

    @property
    def digits(self) -> int:
        """Binary digits of a logarithmic code behind the leading one."""
        return 1 if self.bits == 4 else 4

    @property
    def offset(self) -> int:
        """What a float's exponent and leading digits are above its logarithmic code."""
        return 127 - (self.highest >> self.digits) << self.digits

    @property
    def highest(self) -> int:
        return 2**self.bits - 1

    @property
    def top(self) -> float:
        """The largest number that a code stands for."""
        return 2 - 2.0**-self.digits if self.logarithmic else LEVELS[self.bits]


def _in_blocks(x: jax.Array, block: int) -> jax.Array:
    """A vector as rows of a block each, the last one filled up with zeros."""
    blocks = block_count(x.size, block)
    missing = blocks * block - x.size
    return (jnp.pad(x, (0, missing)) if missing else x).reshape(blocks, block)


def encode(
    x: jax.Array, held: Format, words: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """The codes and scales of a tensor, to nearest; with `words`, 32 random bits for each entry, stochastically."""
    flat = up(x).reshape(-1).astype(jnp.float32)
    peak = jnp.max(jnp.abs(_in_blocks(flat, held.block)), axis=1, initial=0)
    # As a product, which is what XLA makes of a quotient by a constant, so that all agree.
    scale = peak * (np.float32(1) / np.float32(held.top))
    zero = np.float32(not held.logarithmic)
    scale = jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, zero)
    scale = jnp.where(jnp.isfinite(peak), scale, jnp.nan)
    if words is not None:
        words = words.reshape(-1)
    code = _logarithmic if held.logarithmic else _linear
    divisor = jnp.where(scale == 0, 1, scale)  # of a logarithmic block of zeros
    codes = code(flat / spread(divisor, x.size, held.block), held, words)
    if held.bits == 8:
        return codes, scale
    pairs = (jnp.pad(codes, (0, 1)) if x.size % 2 else codes).reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4), scale


def _linear(ratio: jax.Array, held: Format, words: jax.Array | None) -> jax.Array:
    limit = np.float32(held.top)
    if words is not None:
        ratio = ratio + (words >> 8).astype(jnp.float32) * np.float32(2**-24)
    ratio = jnp.minimum(jnp.where(ratio > -limit, ratio, -limit), limit)  # NaN too
    whole = jnp.round(ratio) if words is None else jnp.floor(ratio)
    return (whole + (limit + 1)).astype(jnp.uint8)


def _logarithmic(ratio: jax.Array, held: Format, words: jax.Array | None) -> jax.Array:
    cut = 23 - held.digits
    more = 1 << (cut - 1) if words is None else (words >> (32 - cut)).astype(jnp.int32)
    bits = jax.lax.bitcast_convert_type(ratio, jnp.int32)
    code = ((bits + more) >> cut) - held.offset
    return jnp.clip(code, 0, held.highest).astype(jnp.uint8)


def spread(scale: jax.Array, size: int, block: int) -> jax.Array:
    """The scale of each of `size` elements."""
    return jnp.broadcast_to(scale[:, None], (len(scale), block)).reshape(-1)[:size]


def decode(codes: jax.Array, scale: jax.Array, shape: tuple[int, ...], held: Format) -> jax.Array:
    """The float32 tensor that codes and scales stand for."""
    size = math.prod(shape)
    if held.bits == 4:
        codes = jnp.stack([codes & 0xF, codes >> 4], axis=1).reshape(-1)[:size]
    if held.logarithmic:
        digits = (codes.astype(jnp.int32) + held.offset) << (23 - held.digits)
        values = jax.lax.bitcast_convert_type(digits, jnp.float32)
    else:
        values = codes.astype(jnp.float32) - np.float32(held.top + 1)
    return (values * spread(scale, size, held.block)).reshape(shape)
