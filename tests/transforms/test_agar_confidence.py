import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
import chainrule
from chainrule.transforms import agar_confidence, chain, scale_by_adam
from harness import assert_close, flat, random_tree, run
from reference import adam as adam_reference
from reference import casmo as casmo_reference

SHAPES = {"a": (5,), "b": (4, 3), "c": ()}


def gradients(n, seed=0, scale=1.0):
    return [
        jax.tree.map(lambda g: scale * (g + 0.3), random_tree(SHAPES, seed + i)) for i in range(n)
    ]


def jitted(tx):
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


REPOSITORY = {
    "center": "median",
    "tau_clip_range": (0.01, 0.5),
    "clamp_factor": 3.0,
    "debias": False,
    "eps": 1e-8,
    "adapt_c_min": True,
}


@pytest.mark.parametrize(
    "setting",
    [
        {"tau_init_steps": 4},
        {"tau_init_steps": 3, "granularity": "parameter", "center": "median"},
        {"tau_init_steps": 5, "granularity": "parameter", "shared_calibration": True, **REPOSITORY},
        {"tau_init_steps": 6, **REPOSITORY},
    ],
    ids=["group", "parameter", "shared", "repository"],
)
def test_follows_the_formulas(setting):
    grads = gradients(9)
    params = random_tree(SHAPES, 99)
    seen, _ = run(jitted(chain(scale_by_adam(), agar_confidence(**setting))), params, grads)
    reference = casmo_reference.agar_confidence(adam_reference.adam(), **setting)
    for got, g in zip(seen, grads, strict=True):
        expected = reference({k: np.float64(x) for k, x in flat(g).items()}, flat(params))
        for name, x in flat(got).items():
            assert_close(x, expected[name], bounds.stepped(len(grads)))


def test_a_constant_gradient_is_all_signal_and_noise_is_not():
    tx = jitted(chain(scale_by_adam(), agar_confidence(1000)))
    g = {"w": jnp.full(400, -2.0)}
    _, state = run(tx, g, [g] * 5)
    assert float(chainrule.metrics(state)["agar"]) == bounds.near(1, bounds.summed(400))
    noise = [{"w": x} for x in np.random.default_rng(0).normal(size=(60, 400)).astype(np.float32)]
    _, state = run(tx, g, noise)
    # (1 - b1) / (1 + b1) is .053; raw moments, as in the repository, see several times that.
    assert float(chainrule.metrics(state)["agar"]) < 0.1
    raw = jitted(chain(scale_by_adam(), agar_confidence(1000, debias=False)))
    _, state = run(raw, g, noise)
    assert float(chainrule.metrics(state)["agar"]) > 0.3
