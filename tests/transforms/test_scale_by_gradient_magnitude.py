"""One number of state a tensor: the mean magnitude of its gradient."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
import chainrule
from chainrule.transforms import chain, scale_by_gradient_magnitude
from harness import run

SIGNED = chain(optax.scale_by_sign(), scale_by_gradient_magnitude(0.75))


def test_follows_the_formula():
    rng = np.random.default_rng(0)
    grads = [{"b": rng.normal(), "w": rng.normal(size=(3, 2))} for _ in range(5)]
    seen, state = run(
        SIGNED, grads[0], [{k: jnp.asarray(g[k], jnp.float32) for k in g} for g in grads]
    )
    for name in ("b", "w"):
        c = None
        for g, u in zip(grads, seen, strict=True):
            mean = np.mean(np.abs(g[name]))
            c = mean if c is None else 0.75 * c + 0.25 * mean
            np.testing.assert_allclose(u[name], c * np.sign(g[name]), rtol=bounds.summed(6 + 5))
        shown = chainrule.metrics(state)["magnitude"][name]
        assert shown.shape == () and shown.dtype == jnp.float32
        np.testing.assert_allclose(shown, c, rtol=bounds.summed(6 + 5))


@pytest.mark.parametrize("kernel", ["xla", "native"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_entry_that_is_not_finite_does_not_count(bad, kernel):
    good = jnp.array([3.0, -1.0])
    tx = chain(optax.scale_by_sign(), scale_by_gradient_magnitude(0.75, kernel=kernel))
    _, state = run(tx, good, [good, good.at[0].set(bad), good])
    expected = 0.75 * (0.75 * 2.0 + 0.25 * 0.5) + 0.25 * 2.0
    np.testing.assert_allclose(
        chainrule.metrics(state)["magnitude"], expected, rtol=bounds.ELEMENTWISE
    )


def test_the_gradient_may_be_given_by_hand():
    tx = scale_by_gradient_magnitude()
    u, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), grad=jnp.array([4.0, -2.0]))
    np.testing.assert_allclose(u, 3.0)
    with pytest.raises(ValueError, match=r"needs `grad`.*chainrule\.chain"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
