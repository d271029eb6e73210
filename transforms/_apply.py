r"""Adds updates to parameters; in bfloat16 an update below half a unit in the last place is applied with a probability.

    y = truncate(bits(x) + r), r uniform on 0 .. 2^16 - 1

so that E[y] = x. The random bits are a hash of a word and of the element's number, not the output of a generator: they
are the same however the array lies on its devices, and each device makes those of its part. The hash is lowbias32
(C. Wellons, "Prospecting for hash functions", 2018).
"""

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_choice
from chainrule.transforms._protocols import Tree


def mix(x: jax.Array) -> jax.Array:
    """A hash of uint32 words."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def round_at_random(x: jax.Array, word: jax.Array) -> jax.Array:
    """`x` as bfloat16, up or down with probabilities that make its expectation `x`.

    Args:
      x: float32 array; what is not finite is converted as usual.
      word: uint32 scalar, another one for every array and step.

    Returns:
      A bfloat16 array in the shape of `x`.

    >>> x = jnp.full(10_000, 1.0 + 2.0**-10)  # bfloat16 has 1 and 1 + 2^-7
    >>> y = round_at_random(x, jnp.uint32(1)).astype(jnp.float32)
    >>> sorted(set(y.tolist())), round(float((y.mean() - 1) * 2**10), 1)
    ([1.0, 1.0078125], 1.0)
    """
    element = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    noise = mix(element ^ word) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def apply_updates(
    params: optax.Params,
    updates: optax.Updates,
    *,
    rounding: str | None = None,
    key: jax.Array | None = None,
) -> Tree:
    r"""`optax.apply_updates`, which can round bfloat16 parameters up or down at random.

    $$p \leftarrow \mathrm{round}(p + u), \quad E[\mathrm{round}(x)] = x$$

    A bfloat16 weight of 1.0 has neighbours at 0.996 and 1.008: rounded to nearest it never moves by steps of 1e-3. With
    `rounding="stochastic"` it moves by one of these with a probability, so that many steps, or many weights, go where
    float32 weights would. `transforms.compensated` does the same without chance, for two bytes more a weight.

    Where the updates of a chain are to be float32, give it float32 gradients: it returns their dtype.

    Args:
      params: a pytree of parameters; `None` leaves stay.
      updates: a pytree of the same structure.
      rounding: `None`, round to nearest; `"stochastic"`, round bfloat16 parameters at random. Parameters of other
        dtypes are rounded to nearest either way.
      key: of `jax.random`, another one for every step; needed for, and only for, `rounding="stochastic"`. The same key
        gives the same bits, whatever the sharding.

    Returns:
      The new parameters, in their dtypes.

    Raises:
      ValueError: another word for `rounding`; `rounding="stochastic"` without a key, or a key without it.

    >>> weights, steps = jnp.ones(1000, jnp.bfloat16), jnp.full(1000, 1e-3)
    >>> nearest = apply_updates(weights, steps)
    >>> drawn = apply_updates(weights, steps, rounding="stochastic", key=jax.random.key(0))
    >>> nearest.mean().item(), sorted(set(drawn.tolist()))
    (1.0, [1.0, 1.0078125])
    >>> abs(drawn.astype(jnp.float32).mean().item() - 1.001) < 5e-4
    True
    """
    check_choice("apply_updates", "rounding", rounding, (None, "stochastic"))
    if key is None:
        if rounding is not None:
            raise ValueError(
                'apply_updates: rounding="stochastic" needs `key`, another one for every step, such as '
                "`jax.random.fold_in(key, step)`"
            )
        return optax.apply_updates(params, updates)
    if rounding is None:
        raise ValueError(
            'apply_updates: `key` is for rounding="stochastic", got rounding=None; give both or neither'
        )
    leaves, structure = jax.tree.flatten(params)
    words = jax.random.bits(key, (len(leaves),), jnp.uint32)

    def new(i: int, p: jax.Array, u: jax.Array) -> jax.Array:
        if jnp.result_type(p) != jnp.bfloat16:
            return optax.apply_updates(p, u)  # pyright: ignore[reportReturnType]
        total = jnp.asarray(p, jnp.float32) + jnp.asarray(u, jnp.float32)
        return round_at_random(total, words[i])

    pairs = zip(leaves, structure.flatten_up_to(updates), strict=True)
    return jax.tree.unflatten(structure, [new(i, p, u) for i, (p, u) in enumerate(pairs)])
