"""The same model, data and chain after 20 steps of `fit`, on this backend and in plain JAX."""

import jax
import numpy as np
import optax
import pytest
from tests.bridges.keras.setting import fitted, in_plain_jax, largest_difference, small_model

import chainrule
from chainrule import chains

pytestmark = pytest.mark.keras

# Float32 over 20 steps of a model whose gradients are rounded in another order on each backend: a rounding of weights
# about 1 (6e-8) at each step and as much again of updates, twice 12 of them in all; Muon multiplies what it is given by
# up to 3.4 in each of its iterations.
CLOSE, CLOSE_MUON = 2e-6, 5e-6
RATE = 3e-3
CHAINS = {
    "adamw": optax.adamw,
    "stam": chains.stam,
    "stam_lite": chains.stam_lite,
    "casmo": chains.casmo,
    "casmo_snr": chains.casmo_snr,
    "muon": lambda rate: chains.muon(
        rate, dims="hwio", routing=chainrule.transforms.Routing("head")
    ),
    "magma": lambda rate: chains.magma(chains.adam(rate)),
    "nadam": chains.nadam,
    "multi_steps": lambda rate: optax.MultiSteps(optax.adam(rate), 4),
    "cosmic": chains.cosmic,
    "inject_hyperparams": lambda rate: optax.inject_hyperparams(optax.adamw)(learning_rate=rate),
    "schedule": lambda rate: chains.adam(optax.linear_schedule(rate, 0.0, 20)),
}


def transformation(name, rate):
    tx = CHAINS[name](rate)
    return tx.gradient_transformation() if hasattr(tx, "gradient_transformation") else tx


@pytest.mark.parametrize("name", CHAINS)
def test_fit_is_plain_jax(name):
    model = fitted(chainrule.KerasBridge(CHAINS[name](RATE)))
    expected = in_plain_jax(transformation(name, RATE))
    assert largest_difference(small_model().get_weights(), expected) > 1000 * CLOSE  # they did move
    assert largest_difference(model.get_weights(), expected) <= (
        CLOSE_MUON if name == "muon" else CLOSE
    )


@pytest.mark.parametrize("name", ["adamw", "stam", "casmo"])
def test_at_a_larger_rate_fit_is_as_near_float64_as_plain_jax(name):
    """What is rounded in a gradient moves the weights by as much again times the rate: no fixed bound is right.

    Both are float32 and differ in the order of sums alone: neither is much farther from the same training in float64.
    """
    rate = 3 * RATE
    model = fitted(chainrule.KerasBridge(CHAINS[name](rate)))
    with jax.enable_x64(True):
        exact = in_plain_jax(transformation(name, rate), dtype=np.float64)
    rounded = largest_difference(in_plain_jax(transformation(name, rate)), exact)
    assert largest_difference(model.get_weights(), exact) <= 4 * rounded
    assert rounded <= 4 * CLOSE  # and the comparison says something
