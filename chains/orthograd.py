"""OrthoGrad: any optimizer on gradients orthogonal to the parameters."""

import optax

from chainrule.transforms import chain, live, presets
from chainrule.transforms import orthograd as orthogonal_gradient


@presets({"original": {}})
@live(static=("inner",))
def orthograd(
    inner: optax.GradientTransformation,
    *,
    eps: float = 1e-30,
    rtol: float = 1e-6,
    preset: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""OrthoGrad in front of an optimizer.

    | link | atom | equation |
    |---|---|---|
    | projection | `transforms.orthograd` | o = g - <p, g> / (<p, p> + eps) p, u = o abs(g) / (abs(o) + eps) |
    | inner | any chain, ours or optax's | u |

    Every numeric argument is live: see `chainrule.set_hyperparams`.

    Args:
      inner: any gradient transformation.
      eps: added to the two denominators, at least 0.
      rtol: the gradient of a tensor counts as parallel to its parameters, and becomes zero, where |o| <= rtol |g|.
      preset: `"original"`, the authors' repository, which these defaults are but for gradients that are parallel to
        the parameters; `None`: nothing.

    Returns:
      A `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: an argument outside its range; `update` without parameters.

    >>> import jax.numpy as jnp
    >>> tx = orthograd(optax.sgd(1.0))
    >>> params = jnp.array([1.0, 0.0])
    >>> tx.update(jnp.array([3.0, 4.0]), tx.init(params), params)[0].tolist()
    [-0.0, -5.0]

    References:
      Prieto et al., https://arxiv.org/abs/2501.04697
    """
    return chain(orthogonal_gradient(eps, rtol=rtol), inner)
