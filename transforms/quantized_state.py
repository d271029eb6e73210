r"""Any transform with its parameter-shaped state held in 4 or 8 bits, block by block.

    linear:       scale_j = max|x_i| / q_max over block j (1 if the block is zero),
                  q_i = clip(round(x_i / scale_j), -q_max, q_max); q_max is 7 for 4 bits, 127 for 8
    logarithmic:  scale_j = max x_i / (2 - 2^-m),
                  c_i the code whose number is nearest to x_i / scale_j: code k 2^m + d stands for
                  (1 + d / 2^m) 2^(k - 2^e + 1), d < 2^m, k < 2^e; e, m are 3, 1 for 4 bits, 4, 4 for 8
    x_i is held as q_i or c_i and scale_j

Linear codes are for what has both signs; a small second moment would become 0, and a step as large as its eps lets it.
Logarithmic codes are for what is never negative: they reach down to 1/192 (4 bits) and 1/63488 (8 bits) of a block's
largest entry with a relative error of at most 1/4 and 1/32, and have no 0.

Source: COSMIC, repository commit 96f1a8c (4-bit EMAs); Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", 2022; Li et al., "Memory Efficient Optimizers with 4-bit States", 2023 (no code for 0 in a
second moment). Departures: blocks may have any length, odd ones too; any transform's state; stochastic rounding;
logarithmic codes that are a float's leading digits; XLA takes denormal numbers for zero.

Layout of 4 bits: q + 8 or c in a nibble, two to a byte, the even index in the low nibble, over the whole
tensor in row-major order.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.native import coding
from chainrule.transforms._chain import posted
from chainrule.transforms._checks import check_choice, check_link
from chainrule.transforms._per_parameter import PerParameter
from chainrule.transforms._protocols import TakesCodes, Tree, typed
from chainrule.transforms._trees import is_placeholder
from chainrule.transforms._words import checked_words


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A tensor in blocks of small integers."""

    codes: jax.Array
    """uint8: (ceil(n / 2),) packed nibbles for 4 bits, (n,) for 8 (q + 128, or c)."""
    scale: jax.Array
    """float32 (ceil(n / block),)."""
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})
    logarithmic: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def held(self) -> coding.Format:
        """How its numbers are coded."""
        return coding.Format(self.bits, self.block, self.logarithmic)


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
    x: jax.Array,
    bits: int = 4,
    block: int = 256,
    key: jax.Array | None = None,
    *,
    logarithmic: bool = False,
) -> Quantized:
    """`x` in blocks of `bits`-bit codes; `key` rounds stochastically, else to nearest, half to even.

    >>> q = quantize(jnp.array([7.0, -3.0, 0.4]), block=3)
    >>> q.codes.tolist(), q.scale.tolist(), dequantize(q).tolist()
    ([95, 8], [1.0], [7.0, -3.0, 0.0])
    >>> dequantize(quantize(jnp.array([12.0, 1.0, 0.0]), block=3, logarithmic=True)).tolist()
    [12.0, 1.0, 0.0625]
    """
    from chainrule.native import primitives  # whose import takes as long as optax's

    held = coding.Format(bits, block, logarithmic)
    keys = () if key is None else (_data(key),)
    codes, scale = primitives.encode.bind(x.astype(jnp.float32), *keys, held=held, kernel="auto")
    return Quantized(codes, scale, x.shape, str(x.dtype), block, bits, logarithmic)


def _data(key: jax.Array) -> jax.Array:
    """The words of a key, typed or not."""
    return jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key


def dequantize(q: Quantized) -> jax.Array:
    """The tensor that `q` holds, to half a quantum of what was quantised."""
    from chainrule.native import primitives

    (x,) = primitives.decode.bind(q.codes, q.scale, shape=q.shape, held=q.held, kernel="auto")
    return x.astype(q.dtype)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


def decode(state: Any) -> Any:
    """`state` with its `Quantized` parts as tensors."""
    return jax.tree.map(
        lambda x: dequantize(x) if _is_quantized(x) else x, state, is_leaf=_is_quantized
    )


def _takes_codes(node: Any) -> bool:
    """Whether a state is of a transform that steps its moments in codes, and they are held alike."""
    if not isinstance(node, TakesCodes):
        return False
    moments = [getattr(node, name) for name in node.codes_for if getattr(node, name) is not None]
    formats = {
        tuple(x.held if _is_quantized(x) else None for x in leaves)
        for leaves in (jax.tree.leaves(m, is_leaf=_is_quantized) for m in moments)
    }
    return len(formats) == 1 and not any(x and x.logarithmic for x in formats.pop())


def _decoded_where_needed(state: Any) -> Any:
    """`state` with tensors in place of codes, but where the transform takes codes."""

    def one(node: Any) -> Any:
        if not _takes_codes(node):
            return decode(node)
        own = {name: getattr(node, name) for name in node.codes_for}
        return decode(node._replace(**dict.fromkeys(own)))._replace(**own)

    return jax.tree.map(one, state, is_leaf=lambda x: _is_quantized(x) or _takes_codes(x))


SECOND_MOMENTS = ("nu", "nu_max", "v_row", "v_col", "sum_of_squares", "e_g", "e_x")
"""The fields of our states and optax's with averages or sums of squares."""


@checked_words
def quantized_state(
    inner: optax.GradientTransformation,
    bits: int | None = 4,
    block: int | None = 256,
    *,
    rounding: str = "nearest",
    fields: Sequence[str] | None = None,
    logarithmic: Sequence[str] = SECOND_MOMENTS,
    smaller: str = "keep",
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Holds the parameter-shaped state of any transform in blocks of 4- or 8-bit codes.

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
      logarithmic: names of those with tensors that are never negative, which get logarithmic codes.
      smaller: `"keep"` tensors smaller than a block as they are, or `"quantize"` them too.
      seed: of stochastic rounding.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range.
      TypeError: `inner` is no gradient transformation.

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
    check_link("quantized_state", "inner", inner)
    inner = optax.with_extra_args_support(inner)
    if bits is None:
        return inner
    stochastic = rounding == "stochastic"

    def within(path: tuple[Any, ...], names: Sequence[str]) -> bool:
        return not {getattr(entry, "name", None) for entry in path}.isdisjoint(names)

    def named(path: tuple[Any, ...]) -> bool:
        return fields is None or within(path, fields)

    def is_held(path: tuple[Any, ...], x: Any) -> bool:
        # The numbers of a vector belong to different parameters: they share no scale.
        if isinstance(x, PerParameter) or not named(path):
            return False
        large = smaller == "quantize" or block is None or x.size >= block
        return x.ndim > 0 and x.size > 0 and large and jnp.issubdtype(x.dtype, jnp.floating)

    def encode(state: Any, key: jax.Array | None) -> Any:
        leaves, treedef = jax.tree_util.tree_flatten_with_path(
            state, is_leaf=lambda x: isinstance(x, (PerParameter, Quantized))
        )
        keys = [None] * len(leaves) if key is None else list(jax.random.split(key, len(leaves)))
        encoded = [
            quantize(x, bits, block or x.size, k, logarithmic=within(path, logarithmic))
            if not _is_quantized(x) and is_held(path, x)
            else x
            for (path, x), k in zip(leaves, keys, strict=True)
        ]
        return jax.tree.unflatten(treedef, encoded)

    def init(params: Tree) -> QuantizedState:
        key = jax.random.PRNGKey(seed) if stochastic else None
        state = inner.init(params)
        if is_placeholder(params):  # codes are not in the shapes of the parameters
            state = jax.tree_util.tree_map_with_path(
                lambda path, x: np.zeros(()) if is_placeholder(x) and named(path) else x,
                state,
                is_leaf=is_placeholder,
            )
        return QuantizedState(key, encode(state, None))

    def update(
        updates: Tree, state: QuantizedState, params: Tree = None, **extra_args: Any
    ) -> tuple[Tree, QuantizedState]:
        key, now = (None, None) if state.key is None else jax.random.split(state.key)
        ready = (decode if stochastic else _decoded_where_needed)(state.inner_state)
        new_updates, new = inner.update(updates, ready, params, **extra_args)
        return new_updates, QuantizedState(key, encode(new, now))

    return optax.GradientTransformationExtraArgs(*typed(init, update))
