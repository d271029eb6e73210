"""How b1 moves, and what a gradient that is not finite does to it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule.transforms import adaptive_beta1, scale_by_adam
from harness import random_tree

SHAPES = {"w": (40, 30), "b": (50,)}


def b1_after(grads, **settings):
    tx = adaptive_beta1(**settings)
    state = tx.init(grads[0])
    for g in grads:
        _, state = tx.update(g, state)
    return state


@pytest.mark.parametrize("signal", ["residual", "moments", "noise"])
@pytest.mark.parametrize(("base", "strength"), [(0.9, 0.2), (0.6, 0.5), (0.99, 0.0), (0.5, 0.5)])
def test_b1_stays_in_its_bounds(signal, base, strength):
    grads = [random_tree(SHAPES, seed) for seed in range(5)]
    state = b1_after(grads, signal=signal, b1_base=base, adapt_strength=strength)
    for b1 in state.b1.values:
        assert (
            max(0.5, base * (1 - strength)) - bounds.ELEMENTWISE <= b1 <= base + bounds.ELEMENTWISE
        )


def test_zero_gradients_leave_it_at_its_base():
    state = b1_after([jnp.zeros(3)] * 3)
    assert state.b1.tree() == np.float32(0.9)


def test_debiased_the_first_step_knows_the_spread_of_the_gradient():
    """z = E r^2 / (E|r|)^2 is 1 for entries of one size; as the repository has it, ten times that."""
    even = jnp.array([1.0, -1.0, 1.0, -1.0])
    np.testing.assert_allclose(
        b1_after([even]).b1.tree(), 0.9 * (1 - 0.2 / 2), rtol=bounds.stepped(1)
    )
    z = 0.001 / (0.01**2 + 1e-8)
    raw = b1_after([even], debias=False).b1.tree()
    np.testing.assert_allclose(raw, 0.9 * (1 - 0.2 * z / (1 + z)), rtol=bounds.stepped(1))


def test_b1_is_renewed_every_k_updates_only():
    grads = [random_tree(SHAPES, seed) for seed in range(7)]
    tx = adaptive_beta1(signal="moments", b1_update_interval=3)
    state, seen = tx.init(grads[0]), []
    for g in grads:
        _, state = tx.update(g, state)
        seen.append(float(state.b1.tree()["w"]))
    renewed = [i for i in range(1, 7) if seen[i] != seen[i - 1]]
    assert renewed == [3, 6]


def test_a_spike_beyond_the_threshold_falls_back():
    sparse = jnp.zeros(1000).at[0].set(1.0)  # E r^2 / (E|r|)^2 = 1000
    assert b1_after([sparse]).b1.tree() == np.float32(0.9)
    assert b1_after([sparse], fallback_threshold=2000.0).b1.tree() < 0.75


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_skip_leaves_the_statistics_of_a_bad_gradient_out(bad):
    good = [random_tree(SHAPES, seed) for seed in range(3)]
    spoiled = [*good[:2], {"w": good[2]["w"].at[0, 0].set(bad), "b": good[2]["b"]}]
    clean, after, before = b1_after(good), b1_after(spoiled), b1_after(good[:2])
    assert after.nonfinite.tree() == {"w": True, "b": False}
    for field in ("first", "second"):
        assert getattr(after, field).tree()["w"] == getattr(before, field).tree()["w"]
    assert after.b1.tree()["w"] == np.float32(0.9)
    assert after.b1.tree()["b"] == clean.b1.tree()["b"]


def test_zero_takes_the_zeroed_gradient_in():
    g = random_tree(SHAPES, 0)
    spoiled = {"w": g["w"].at[0, 0].set(jnp.nan), "b": g["b"]}
    zeroed = {"w": g["w"].at[0, 0].set(0.0), "b": g["b"]}
    actual, expected = b1_after([spoiled], nonfinite="zero"), b1_after([zeroed])
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
def test_no_element_is_frozen_by_an_overflow(nonfinite):
    """A finite gradient whose square is not: in the repository its element never moves again."""
    tx = optax.chain(
        adaptive_beta1(nonfinite=nonfinite, max_abs=10.0), scale_by_adam(b1=None, b2=0.9)
    )
    g = jnp.array([1.0, -1.0])
    updates, state = tx.update(jnp.array([3e38, -1.0]), tx.init(g))
    for _ in range(60):
        updates, state = tx.update(g, state)
    assert jnp.all(jnp.abs(updates) > 0.5)


def test_the_moment_may_have_another_dtype():
    tx = adaptive_beta1(state_dtype=jnp.bfloat16)
    state = tx.init(jnp.ones(3))
    assert (state.mu.dtype, state.b1.values.dtype) == (jnp.bfloat16, jnp.float32)
    assert b1_after([jnp.ones(3)], stat_dtype=jnp.bfloat16).b1.values.dtype == jnp.bfloat16


# ---- signal="noise" --------------------------------------------------------------------------

ENTRIES = 4096


def drifting(noise, drift, seed=0):
    """A mean that walks at random, (steps, ENTRIES), and a gradient that shows it through noise."""
    rng = np.random.default_rng(seed)
    size = (len(noise), ENTRIES)
    mean = np.cumsum(np.asarray(drift)[:, None] * rng.normal(size=size), axis=0)
    return mean, mean + np.asarray(noise)[:, None] * rng.normal(size=size)


def followed(grads, **settings):
    """The decays and the bias-corrected moments at every step."""
    tx = adaptive_beta1(**{"b1_base": 0.99, "adapt_strength": 0.49, **settings})

    def step(state, g):
        _, state = tx.update(g, state)
        return state, (state.b1.values[0], state.mu / (1 - state.b1_prod.values[0]))

    return jax.lax.scan(step, tx.init(grads[0]), jnp.asarray(grads, jnp.float32))[1]


def best(noise, drift):
    """The decay that minimises s^2 (1 - b) / (1 + b) + d^2 b^2 / (1 - b^2), by search."""
    b = np.linspace(0.0, 0.9999, 100_000)
    return b[np.argmin(noise**2 * (1 - b) / (1 + b) + drift**2 * b**2 / (1 - b**2))]


@pytest.mark.parametrize(("noise", "drift"), [(1.0, 0.05), (1.0, 0.3), (20.0, 1.0), (1e-6, 5e-7)])
def test_noise_finds_the_decay_of_least_error(noise, drift):
    _, grads = drifting([noise] * 500, [drift] * 500)
    b1, _ = followed(grads, signal="noise", moment_decay=0.99)
    # Two means of squares over ENTRIES entries and about 100 steps: each is known to
    # sqrt(2 / (100 ENTRIES)) = 0.22 %, their difference d^2 to that times 2 s^2 / d^2, and k
    # goes with d: half of it, at most 0.22 % * 400 here, of a k of 0.05; three deviations.
    k = 1 - best(noise, drift)
    deviation = np.sqrt(2 / (100 * ENTRIES)) * (1 + (noise / drift) ** 2) * k
    assert abs(float(b1[-1]) - best(noise, drift)) <= 3 * deviation


def test_b1_rises_with_noise_and_falls_with_drift():
    calm, late = [1.0] * 400, 400
    noisier = drifting(calm + [5.0] * late, [0.2] * 800)[1]
    faster = drifting(calm + [1.0] * late, [0.2] * 400 + [1.0] * late)[1]
    for grads, sign in ((noisier, 1), (faster, -1)):
        b1, _ = followed(grads, signal="noise")
        assert sign * (b1[-1] - b1[399]) > 0.1
        # Early too: the averages react within their horizon of 100 steps, in the right direction at once.
        assert sign * (b1[440] - b1[399]) > 0


@pytest.mark.parametrize(("noise", "drift"), [(1.0, 0.05), (1.0, 0.5)])
def test_its_moment_is_as_near_to_the_mean_as_that_of_the_best_fixed_decay(noise, drift):
    mean, grads = drifting([noise] * 600, [drift] * 600)
    _, moments = followed(grads, signal="noise")
    errors = ((np.asarray(moments) - mean) ** 2)[300:].mean()
    b = best(noise, drift)
    least = noise**2 * (1 - b) / (1 + b) + drift**2 * b**2 / (1 - b**2)
    # Near its least value the error is flat: the 3 deviations of b1 above cost less than 1 %; the mean of
    # 300 steps of ENTRIES entries, which are correlated over 1 / (1 - b) steps, is known to 1 % too.
    assert errors <= 1.03 * least
    for other in (0.9, 0.5, 0.99):
        fixed = ((np.asarray(followed(grads, b1_base=other, adapt_strength=0.0)[1]) - mean) ** 2)[
            300:
        ].mean()
        assert errors < fixed


def test_noise_without_a_difference_leaves_b1_at_its_base():
    for grads in ([jnp.ones(3)], [jnp.zeros(3)] * 5):
        assert b1_after(grads, signal="noise").b1.tree() == np.float32(0.9)


def test_a_constant_gradient_has_neither_noise_nor_drift():
    assert b1_after([jnp.ones(3)] * 5, signal="noise").b1.tree() == np.float32(0.9)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("where", [0, 2])
def test_noise_leaves_a_bad_gradient_out(bad, where):
    """Neither the averages nor the next difference know of it."""
    good = [random_tree(SHAPES, seed) for seed in range(4)]
    spoiled = list(good)
    spoiled[where] = {"w": good[where]["w"].at[0, 0].set(bad), "b": good[where]["b"]}
    after = b1_after(spoiled[: where + 1], signal="noise")
    before = b1_after(spoiled[:where], signal="noise") if where else None
    assert after.nonfinite.tree() == {"w": True, "b": False}
    if before:
        np.testing.assert_array_equal(after.noise.previous["w"], before.noise.previous["w"])
        assert after.second.tree()["w"] == before.second.tree()["w"]
    end = b1_after(spoiled, signal="noise")
    assert np.isfinite(end.b1.values).all() and end.noise.started.values.all()
