"""The same model, data and chain after 20 steps of `fit`, on this backend and in plain JAX."""

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
    "adamw": lambda: optax.adamw(RATE),
    "stam": lambda: chains.stam(RATE),
    "stam_lite": lambda: chains.stam_lite(RATE),
    "casmo": lambda: chains.casmo(RATE),
    "casmo_snr": lambda: chains.casmo_snr(RATE),
    "muon": lambda: chains.muon(RATE, dims="hwio", routing=chainrule.transforms.Routing("head")),
    "magma": lambda: chains.magma(chains.adam(RATE)),
    "nadam": lambda: chains.nadam(RATE),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(RATE), 4),
    "cosmic": lambda: chains.cosmic(RATE),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
    "schedule": lambda: chains.adam(optax.linear_schedule(RATE, 0.0, 20)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_fit_is_plain_jax(name):
    model = fitted(chainrule.KerasBridge(CHAINS[name]()))
    tx = CHAINS[name]()
    tx = tx.gradient_transformation() if hasattr(tx, "gradient_transformation") else tx
    expected = in_plain_jax(tx)
    assert largest_difference(small_model().get_weights(), expected) > 1000 * CLOSE  # they did move
    assert largest_difference(model.get_weights(), expected) <= (
        CLOSE_MUON if name == "muon" else CLOSE
    )
