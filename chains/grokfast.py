"""Grokfast: any optimizer on gradients whose slow component is amplified."""

from typing import Any

import optax

from chainrule.transforms import chain, grokfast_ema, live, presets


@presets({"original": {}, "keras": {"alpha": 0.99, "lamb": 5.0, "start": "zero"}})
@live(static=("inner", "state_dtype"))
def grokfast(
    inner: optax.GradientTransformation,
    *,
    alpha: float = 0.98,
    lamb: float = 2.0,
    start: str = "first",
    state_dtype: Any = None,
    preset: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Grokfast-EMA in front of an optimizer.

    | link | atom | equation |
    |---|---|---|
    | filter | `grokfast_ema` | g + lamb ema, ema = alpha ema + (1 - alpha) g |
    | inner | any chain, ours or optax's | u |

    Every numeric argument is live: see `chainrule.set_hyperparams`. For the windowed form compose `grokfast_ma` the
    same way.

    Args:
      inner: any gradient transformation.
      alpha: decay of the average, in [0, 1).
      lamb: how much of the average is added, at least 0.
      start: `"first"`, the average starts at the first gradient; `"zero"` (KerasOptimizers).
      state_dtype: dtype of the average, default the parameter's.
      preset: `"original"`, the authors' repository, which these defaults are; `"keras"`, KerasOptimizers, for arguments
        that are not given; `None`: nothing.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range.

    >>> import jax.numpy as jnp
    >>> tx = grokfast(optax.sgd(1.0))
    >>> tx.update(jnp.ones(1), tx.init(jnp.zeros(1)))[0].item()
    -3.0

    References:
      Lee et al., https://arxiv.org/abs/2405.20233
    """
    return chain(grokfast_ema(alpha, lamb=lamb, start=start, state_dtype=state_dtype), inner)
