"""Trust in a tensor and focus on its entries, from moments given by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bounds
import chainrule
from chainrule.transforms import chain, scale_by_belief, snr_confidence
from harness import run

B1, B2 = 0.9, 0.99
MU = np.array([0.5, -0.1, 0.0, 0.02, -2.0])
NU = np.array([0.01, 0.3, 0.0, 0.5, 1e-4])
UPDATE = np.array([1.0, -2.0, 3.0, 0.5, -0.25])


def shares(count, deviation):
    """a, entry by entry; the variance has seen one gradient less than the mean, if unbiased."""
    seen = max(count - 1, 1) if deviation == "unbiased" else count
    m, s = MU / (1 - B1**count), NU / (1 - B2**seen)
    return np.divide(m**2, m**2 + s, out=np.zeros_like(m), where=m**2 + s > 0)


def expected(count, deviation, robustness, c_min, rel_floor, eps):
    a = shares(count, deviation)
    trust = (c_min + (1 - c_min) * a.mean()) ** robustness
    return trust * np.clip(a / (a.mean() + eps), rel_floor, 1) * UPDATE


def once(updates, mu=MU, nu=NU, count=3, **settings):
    tx = snr_confidence(b1=B1, b2=B2, **settings)
    updates, mu, nu = (
        jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (updates, mu, nu)
    )
    return tx.update(updates, tx.init(updates), mu=mu, nu=nu, count=jnp.int32(count))


@pytest.mark.parametrize("deviation", ["unbiased", "raw"])
@pytest.mark.parametrize("count", [1, 2, 50])
@pytest.mark.parametrize(
    "setting",
    [(0.5, 0.1, 0.1, 1e-8), (0.0, 0.1, 0.0, 0.0), (2.0, 0.0, 0.25, 0.1), (1.0, 1.0, 1.0, 1e-8)],
    ids=str,
)
def test_follows_the_formula(setting, count, deviation):
    names = ("robustness", "c_min", "rel_floor", "eps")
    settings = dict(zip(names, setting, strict=True))
    updates, state = once(UPDATE, count=count, deviation=deviation, **settings)
    np.testing.assert_allclose(
        updates, expected(count, deviation, **settings), rtol=bounds.stepped(4)
    )
    np.testing.assert_allclose(
        state.agar.tree(), shares(count, deviation).mean(), rtol=bounds.stepped(4)
    )


def test_tensors_are_judged_apart():
    tree = {"signal": np.ones(4), "noise": np.ones((2, 2)), "one": np.float64(1.0)}
    mu = {"signal": np.ones(4), "noise": np.full((2, 2), 1e-3), "one": np.float64(-1.0)}
    nu = {"signal": np.full(4, 1e-9), "noise": np.ones((2, 2)), "one": np.float64(0.0)}
    updates, state = once(tree, mu, nu, robustness=1.0, c_min=0.25, eps=0.0)
    np.testing.assert_allclose(updates["signal"], 1.0, rtol=bounds.ELEMENTWISE)
    np.testing.assert_allclose(updates["one"], 1.0, rtol=bounds.ELEMENTWISE)
    agar = {name: float(x) for name, x in chainrule.metrics(state)["agar"].items()}
    noise = 0.25 + 0.75 * agar["noise"]
    np.testing.assert_allclose(updates["noise"], noise, rtol=bounds.ELEMENTWISE)
    assert agar["noise"] < 1e-3 < 0.999 < min(agar["signal"], agar["one"])


def test_full_trust_and_no_focus_is_the_identity():
    updates, _ = once(UPDATE, robustness=0.0, rel_floor=1.0)
    np.testing.assert_array_equal(updates, UPDATE.astype(np.float32))


def test_focus_moves_the_strong_entries_and_holds_the_weak_at_the_floor():
    updates, _ = once(np.ones(5), robustness=0.0, rel_floor=0.125)
    a = shares(3, "unbiased")
    np.testing.assert_array_equal(updates == 1, a >= a.mean())
    np.testing.assert_array_equal(updates == 0.125, a <= 0.125 * a.mean())


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_gradients_does_not_matter(scale):
    small, _ = once(UPDATE, scale * MU, scale**2 * NU, eps=0.0)
    np.testing.assert_allclose(small, once(UPDATE, eps=0.0)[0], rtol=bounds.stepped(2))


def test_moments_that_never_saw_a_gradient_leave_least_trust():
    updates, state = once(np.ones(3), np.zeros(3), np.zeros(3), robustness=1.0, c_min=0.5)
    np.testing.assert_allclose(updates, 0.5 * 0.1, rtol=bounds.ELEMENTWISE)
    assert state.agar.tree() == 0


def test_a_mean_that_is_not_finite_is_shown_and_taken_for_no_trust():
    updates, state = once(np.ones(2), np.array([np.nan, 1.0]), np.ones(2))
    assert np.isnan(state.agar.tree())
    assert np.isfinite(updates[1]) and np.isnan(updates[0])


def test_a_constant_gradient_is_all_signal_and_noise_is_not():
    """Where the repository, with raw deviations, takes half of a constant first gradient for noise."""
    g = {"w": jnp.full(300, -2.0)}
    noise = [{"w": x} for x in np.random.default_rng(0).normal(size=(40, 300)).astype(np.float32)]
    seen = {}
    for deviation in ("unbiased", "raw"):
        tx = chain(scale_by_belief(deviation=deviation), snr_confidence(deviation=deviation))
        for kind, grads in (("constant", [g]), ("noise", noise)):
            _, state = run(tx, g, grads)
            seen[deviation, kind] = float(chainrule.metrics(state)["agar"]["w"])
    assert seen["unbiased", "constant"] == bounds.near(1, bounds.summed(300))
    assert seen["raw", "constant"] == bounds.near(0.5, bounds.summed(300))
    assert seen["unbiased", "noise"] < 0.12


@pytest.mark.parametrize("missing", ["mu", "nu", "count"])
def test_each_moment_that_is_missing_is_named(missing):
    tx = snr_confidence()
    given = {"mu": jnp.ones(2), "nu": jnp.ones(2), "count": jnp.int32(1)}
    del given[missing]
    with pytest.raises(ValueError, match=rf"snr_confidence: needs `{missing}`.*scale_by_belief"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), **given)
