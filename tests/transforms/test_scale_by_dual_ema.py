"""Two horizons, blended."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule.transforms import scale_by_dual_ema
from harness import assert_close, random_tree, run

GRADS = [np.asarray(random_tree((6,), seed)) for seed in range(5)]
B1, B1_LONG, B2, EPS = 0.5, 0.9, 0.95, 1e-4


def formula(blend, start="zero", debias="both", with_nu=True):
    short, long, nu, seen = np.zeros(6), np.zeros(6), np.zeros(6), []
    for t, g in enumerate((np.float64(g) for g in GRADS), start=1):
        if start == "gradient" and t == 1:
            short, long = g, g
        else:
            short, long = B1 * short + (1 - B1) * g, B1_LONG * long + (1 - B1_LONG) * g
        corrected = debias == "both" and start == "zero"
        m = blend * short / (1 - B1**t if corrected else 1)
        m = m + (1 - blend) * long / (1 - B1_LONG**t if corrected else 1)
        nu = B2 * nu + (1 - B2) * g * g
        seen.append(m / (np.sqrt(nu / (1 - B2**t)) + EPS) if with_nu else m)
    return seen


@pytest.mark.parametrize("blend", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("start", ["zero", "gradient"])
@pytest.mark.parametrize("debias", ["both", "second"])
def test_follows_the_formula(blend, start, debias):
    tx = scale_by_dual_ema(
        B1, b1_long=B1_LONG, b2=B2, eps=EPS, blend=blend, start=start, debias=debias
    )
    seen, _ = run(tx, jnp.zeros(6), GRADS)
    assert_close(seen, formula(blend, start, debias), bounds.stepped(5))


def test_without_a_second_moment_it_is_momentum():
    tx = scale_by_dual_ema(B1, b1_long=B1_LONG, b2=None, blend=0.3)
    seen, state = run(tx, jnp.zeros(6), GRADS)
    assert state.nu is None
    assert_close(seen, formula(0.3, with_nu=False), bounds.stepped(5))


def test_the_short_ema_alone_is_adam():
    ours, _ = run(scale_by_dual_ema(), jnp.zeros(6), GRADS)
    theirs, _ = run(optax.scale_by_adam(), jnp.zeros(6), GRADS)
    # optax computes 1 - b2**t in float32.
    assert_close(
        ours, theirs, bounds.stepped(5) + bounds.corrected(0.999) / 2 + bounds.corrected(0.9)
    )


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, ["mu", "nu"]),
        ({"blend": 0.0}, ["mu_long", "nu"]),
        ({"blend": 0.5}, ["mu", "mu_long", "nu"]),
        ({"keep_long": True, "b2": None}, ["mu", "mu_long"]),
    ],
    ids=str,
)
def test_what_the_blend_does_not_use_is_not_kept(settings, kept):
    state = scale_by_dual_ema(**settings, state_dtype=jnp.bfloat16).init(jnp.zeros(6))
    held = {name: x for name, x in state._asdict().items() if x is not None and name != "count"}
    assert sorted(held) == kept
    assert {x.dtype for x in held.values()} == {jnp.dtype(jnp.bfloat16)}


def test_a_blend_for_each_tier_takes_the_tier_in_force():
    tx = scale_by_dual_ema(B1, b1_long=B1_LONG, blend=(0.0, 0.5, 1.0), blend_by="tier")
    start = tx.init(jnp.zeros(6))
    _, state = tx.update(GRADS[0], start, tier=2, synced_tier=0)
    for tier, blend in enumerate((0.0, 0.5, 1.0)):
        one = scale_by_dual_ema(B1, b1_long=B1_LONG, blend=blend, keep_long=True)
        _, after = one.update(GRADS[0], one.init(jnp.zeros(6)))
        expected, _ = one.update(GRADS[1], after)
        actual, _ = tx.update(GRADS[1], state, tier=tier, synced_tier=0)
        assert_close(actual, expected)


def test_the_clock_of_the_chain_takes_large_first_steps():
    """COSMIC's: after a promotion at step 1000 only nu's correction is that of step 1000."""
    g = jnp.ones(1)
    own, chain = (
        scale_by_dual_ema(clock=clock, debias="second", eps=0.0) for clock in ("own", "chain")
    )
    late = jnp.int32(1000)
    usual, _ = own.update(g, own.init(g), step=late)
    large, _ = chain.update(g, chain.init(g), step=late)
    np.testing.assert_allclose(usual, 0.1, rtol=bounds.stepped(1))
    b2 = float(np.float32(0.999))  # decays are float32
    root = np.sqrt((1 - b2**1000) / (1 - b2))
    np.testing.assert_allclose(large, 0.1 * root, rtol=bounds.stepped(1))
