r"""Magma: scales each tensor's update by how well momentum and gradient agree, and drops it at random.

    s_t = e s_{t-1} + (1 - e) sigmoid(cos(mu_t, g_t) / tau),    m_t ~ Bernoulli(mask_prob),    u'_t = s_t m_t u_t

Source: the Magma repository, commit 222980f (version 0.1.1 of its package keeps its own mu, here `moment="own"`). One
draw m_t and one cosine a tensor. Departure: the repository scales the whole change of the parameters, weight decay
included; so does this atom behind a whole optimizer, but before `decoupled_weight_decay` and the learning rate it
leaves decay alone.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import (
    check_arrays,
    check_bounds,
    check_choice,
    require,
    zeros_like,
)
from chainrule.transforms._numerics import ema, finite, increment, root, up
from chainrule.transforms._per_parameter import PerParameter, unstacked
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._selection import select
from chainrule.transforms._sums import sums
from chainrule.transforms._trees import is_masked, leaves_beside, map_unmasked
from chainrule.transforms._words import checked_words

_NORM_FLOOR = 1e-8  # the least norm that the cosine divides by, as in the repository
_PRNG = "threefry2x32"
_LEAVE_OUT = 'leave it out with `exclude`, or use moment="own"'
_PASS = "use `chainrule.chain` in place of `optax.chain`, pass it to"


class MomentumAlignmentMaskState(NamedTuple):
    """State of `momentum_alignment_mask`. Excluded parameters are left out of what is kept for each."""

    count: jax.Array
    """int32 scalar: updates made."""
    key: jax.Array
    """(2,) uint32: threefry key, constant; update t draws from it and t, parameter i takes draw i."""
    alignment: PerParameter
    """float32: s_t."""
    cosine: PerParameter
    """float32: cos(mu_t, g_t) of the last update."""
    mask_rate: jax.Array
    """float32 scalar: the fraction of parameters whose last update was not dropped."""
    own: optax.Updates | None
    """With `moment="own"`, the average of the gradients, like the parameters; else `None`."""

    metric_fields = ("alignment", "cosine", "mask_rate")


@checked_words
def momentum_alignment_mask(
    mask_prob: jax.typing.ArrayLike = 0.5,
    *,
    tau: jax.typing.ArrayLike = 2.0,
    alignment_ema: jax.typing.ArrayLike = 0.9,
    momentum_beta: jax.typing.ArrayLike = 0.9,
    moment: str = "mu",
    init_alignment: jax.typing.ArrayLike = 1.0,
    exclude: Any = None,
    seed: int | jax.Array = 0,
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Scales updates by the agreement of momentum and gradient and masks them tensor by tensor.

    $$u'_t = s_t\, m_t\, u_t, \qquad s_t = e\, s_{t-1} + (1 - e)\, \sigma\big(\cos(\mu_t, g_t) / \tau\big)$$

    A gradient that is zero, or not finite, has the cosine 0. Draws are reproducible: they depend on `seed`, the step
    and the parameter's place.

    Args:
      mask_prob: probability that a tensor's update is applied, in [0, 1].
      tau: temperature, positive.
      alignment_ema: e, in [0, 1).
      momentum_beta: decay of the atom's own moment, in [0, 1) (`moment="own"`).
      moment: what the gradient is compared with. `"mu"`, `"nu"` or `"trace"`: that of an earlier link, after its
        update; `"own"`: an average of the gradients kept here, one more tensor for each parameter.
      init_alignment: s_0, in [0, 1]; the repository has 1, another port 0.5.
      exclude: parameters that pass unchanged and draw nothing: a path pattern or a list of several (regular expressions
        searched in `"layer/kernel"`), a set of whole paths or (in a torch bridge) of parameters, a function of path and
        parameter, or a tree of booleans.
      seed: an integer or a threefry key.
      state_dtype: dtype of the atom's own moment, default the parameter's.

    Returns:
      A `optax.GradientTransformationExtraArgs`. Its `update` takes the extra arguments `grad`, the moment by its name,
      and optionally `mask`, a tree of numbers to be used in place of the draws (recorded ones, for example).

    Raises:
      ValueError: an argument outside its range; a pattern, path, parameter or function of `exclude` that matches
        nothing; at `update`, `grad` or the moment missing.
      TypeError: another `exclude`; with `moment="own"`, a parameter that is not floating point or complex.

    >>> from chainrule.transforms import chain
    >>> tx = chain(optax.scale_by_adam(), momentum_alignment_mask(mask_prob=1.0))
    >>> u, state = tx.update(jnp.array([1.0, -2.0]), tx.init(jnp.zeros(2)))
    >>> print(u.round(4), state[1].cosine.tree().round(4))
    [ 0.9622 -0.9622] 1.0

    References:
      Joo et al., https://arxiv.org/abs/2602.15322
      Magma, package `magma-optimizer` 0.1.1 and repository commit 222980f.
    """
    owner = "momentum_alignment_mask"
    check_bounds(
        owner,
        mask_prob=mask_prob,
        tau=tau,
        alignment_ema=alignment_ema,
        momentum_beta=momentum_beta,
        init_alignment=init_alignment,
    )
    check_choice(owner, "moment", moment, ("mu", "nu", "trace", "own"))

    def init(params: Tree) -> MomentumAlignmentMaskState:
        excluded = select(owner, "exclude", exclude, params)
        included = jax.tree.map(lambda out, p: optax.MaskedNode() if out else p, excluded, params)
        check_arrays(owner, included)
        key = seed if isinstance(seed, jax.Array) else jax.random.key(seed, impl=_PRNG)

        return MomentumAlignmentMaskState(
            count=jnp.zeros((), jnp.int32),
            key=jax.random.key_data(key),
            alignment=PerParameter.full(init_alignment, included),
            cosine=PerParameter.full(0.0, included),
            mask_rate=jnp.ones((), jnp.float32),
            own=zeros_like(owner, included, state_dtype) if moment == "own" else None,
        )

    def update(
        updates: Tree,
        state: MomentumAlignmentMaskState,
        params: Tree = None,
        *,
        grad: Tree = None,
        mask: Tree = None,
        **extra_args: Any,
    ) -> tuple[Tree, MomentumAlignmentMaskState]:
        del params
        grad = require(owner, "grad", grad, f"{_PASS} `update(..., grad=gradients)`")
        if moment == "own":
            moments = map_unmasked(
                lambda m, g: ema(momentum_beta, m, finite(g, None)), state.own, grad
            )
        else:
            remedy = f'{_PASS} `update(..., {moment}=...)`, name another `moment`, or moment="own"'
            moments = require(owner, moment, extra_args.get(moment), remedy)

        leaves, structure = jax.tree.flatten(updates, is_leaf=is_masked)
        included = state.alignment.match(owner, updates)  # an excluded parameter has no number

        passing = zip(leaves, included, strict=True)
        own = [u if has_factor else optax.MaskedNode() for u, has_factor in passing]
        beside = functools.partial(
            leaves_beside, owner, updates=jax.tree.unflatten(structure, own), remedy=_LEAVE_OUT
        )
        grads, mus = beside("grad", tree=grad), beside(moment, tree=moments)
        product, mu_square, g_square = sums("alignment", mus, grads)
        lengths = (jnp.maximum(root(x), _NORM_FLOOR) for x in (mu_square, g_square))
        cosine = (product / math.prod(lengths)).astype(jnp.float32)
        cosine = jnp.where(jnp.isfinite(cosine), cosine, 0)  # or s_t would be NaN for ever
        alignment = ema(alignment_ema, state.alignment.values, jax.nn.sigmoid(cosine / tau))

        if mask is None:
            key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl=_PRNG), state.count)
            draws = (jax.random.uniform(key, cosine.shape, jnp.float32) < mask_prob).astype(
                jnp.float32
            )
        else:
            given = itertools.compress(structure.flatten_up_to(mask), included)
            draws = jnp.array(list(given), jnp.float32)

        def scaled(u: jax.Array, factor: jax.Array, m: jax.Array) -> jax.Array:
            # Zero, not 0 u, where the update is dropped: its NaN are dropped with it.
            return jnp.where(m > 0, factor * up(u), 0).astype(u.dtype)

        factors = zip(unstacked(alignment * draws), unstacked(draws), strict=True)
        new = [
            scaled(u, *next(factors)) if has_factor else u
            for u, has_factor in zip(leaves, included, strict=True)
        ]
        return jax.tree.unflatten(structure, new), MomentumAlignmentMaskState(
            count=increment(state.count),
            key=state.key,
            alignment=state.alignment.replace(alignment),
            cosine=state.cosine.replace(cosine),
            mask_rate=jnp.sum(draws) / len(draws) if len(draws) else state.mask_rate,
            own=None if state.own is None else optax.tree.cast_like(moments, state.own),
        )

    return optax.GradientTransformationExtraArgs(*typed(init, update))
