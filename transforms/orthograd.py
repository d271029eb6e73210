r"""OrthoGrad: the part of the gradient that is orthogonal to the parameters, at the gradient's length.

    o = g - <p, g> / (<p, p> + eps) p,    u = o |g| / (|o| + eps)

Source: Prieto et al., "Grokking at the Edge of Numerical Stability", 2025, and its repository. Departure: where o is
but the rounding residue of a gradient parallel to its parameters (|o| <= rtol |g|) the update is zero instead of that
residue at full length; a tensor of one element, in which nothing is orthogonal to anything, is passed as it is.
"""

import jax
import jax.numpy as jnp
import optax

from chainrule.transforms._checks import check_bounds, require_params
from chainrule.transforms._numerics import inner, norm, up
from chainrule.transforms._protocols import Tree, typed
from chainrule.transforms._trees import map_unmasked, where_updated
from chainrule.transforms._words import checked_words


@checked_words
def orthograd(
    eps: jax.typing.ArrayLike = 1e-30, *, rtol: jax.typing.ArrayLike = 1e-6
) -> optax.GradientTransformation:
    r"""Projects each gradient onto the complement of its parameters and restores its length.

    $$u = \frac{\lVert g\rVert}{\lVert o\rVert + \epsilon}\,o, \qquad
      o = g - \frac{\langle p, g\rangle}{\langle p, p\rangle + \epsilon}\,p$$

    Each tensor counts as one vector (a complex one as real and imaginary parts).

    Args:
      eps: added to the two denominators, at least 0.
      rtol: the update is zero where \(\lVert o\rVert \le\) `rtol` \(\lVert g\rVert\), at least 0. The default is a few
        units of float32 rounding.

    Returns:
      A `optax.GradientTransformation`, stateless.

    Raises:
      ValueError: an argument outside its range; at `update`, the parameters are missing.

    >>> tx = orthograd()
    >>> p, g = jnp.array([1.0, 0.0]), jnp.array([3.0, 4.0])
    >>> tx.update(g, tx.init(p), p)[0].tolist()
    [0.0, 5.0]

    References:
      Prieto et al., https://arxiv.org/abs/2501.04697
    """
    check_bounds("orthograd", eps=eps, rtol=rtol)

    def init(params: Tree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: Tree, state: optax.EmptyState, params: Tree = None
    ) -> tuple[Tree, optax.EmptyState]:
        params = require_params("orthograd", params)

        def project(g: jax.Array, p: jax.Array) -> jax.Array:
            if g.size <= 1:
                return g
            square = inner(p, p)
            # Divided by something, and the result not taken, where there is nothing to project on: gradients through
            # this update are finite.
            some = square > 0
            along = jnp.where(some, inner(p, g) / jnp.where(some, square + eps, 1), 0)
            rest = up(g) - along * up(p)
            length, residue = norm(g), norm(rest)
            parallel = residue <= rtol * length
            scale = jnp.where(parallel, 0, length / jnp.where(parallel, 1, residue + eps))
            return (scale * rest).astype(g.dtype)

        return map_unmasked(project, updates, where_updated(updates, params)), state

    return optax.GradientTransformation(*typed(init, update))
