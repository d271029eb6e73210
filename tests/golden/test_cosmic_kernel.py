"""COSMIC against its recordings through the torch bridge, and through the compiled kernel.

By default one or two variants of each file; the `slow` tests replay all.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from chainrule import TorchBridge
from chainrule.transforms import retier
from tests.golden.replay import cases
from tests.golden.test_cosmic import FILES, PACKED, follow, hold_bytes

SHORT = {
    "cosmic_full-default_fused",
    "cosmic_full-default_unfused",
    "cosmic_gate-loss_spike",
    "cosmic_presets-fast_tiered",
    "cosmic_quant4-fused_b2",
    "cosmic_quant4-unfused_int1",
    "cosmic_real-quant4_b16",
    "cosmic_tiered-int4_min_steps",
    "cosmic_tiered-late_promote",
}


def in_bridge(tx, params, gradients, losses):
    """Steps through the torch bridge."""
    tensors = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in params.items()}
    bridge = TorchBridge(tx, tensors.items())
    rows = []
    for t in range(len(next(iter(gradients.values())))):
        for name, p in tensors.items():
            p.grad = torch.tensor(gradients[name][t])
        loss = None if losses is None else float(losses[t])
        bridge.step(None if loss is None else lambda loss=loss: loss)
        state = bridge.jax_state()
        tiered, gate = state.inner_state[0], state.inner_state[1]
        new = {name: p.detach().numpy().copy() for name, p in tensors.items()}
        rows.append((new, tiered.assignment.tiers, gate.gate_scale, tiered.inner))
    return rows


def in_jit(tx, params, gradients, losses):
    """Steps in JAX, compiled once an assignment."""

    @jax.jit
    def step(params, state, grads, value):
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params = {name: jnp.asarray(p) for name, p in params.items()}
    state, rows = tx.init(params), []
    for t in range(len(next(iter(gradients.values())))):
        grads = {name: jnp.asarray(g[t]) for name, g in gradients.items()}
        state = retier(state, grads, params)
        loss = None if losses is None else jnp.float32(losses[t])
        params, state = step(params, state, grads, loss)
        tiered, gate = state.inner_state[0], state.inner_state[1]
        rows.append((params, tiered.assignment.tiers, gate.gate_scale, tiered.inner))
    return rows


WAYS = {
    "bridge, kernel": (in_bridge, "auto"),
    "bridge, torch": (in_bridge, "xla"),
    "jax, kernel": (in_jit, "native"),
}


def thinned(parameters):
    """The parameters, those beyond `SHORT` marked slow."""
    return [
        p if p.id in SHORT else pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
        for p in parameters
    ]


@pytest.mark.parametrize("case", thinned(cases(FILES)))
@pytest.mark.parametrize("way", WAYS)
def test_follows(case, way):
    run, kernel = WAYS[way]
    follow(case, run, kernel=kernel)


@pytest.mark.parametrize("case", thinned(PACKED))
@pytest.mark.parametrize("way", WAYS)
def test_packed_bytes(case, way):
    run, kernel = WAYS[way]
    hold_bytes(case, run, kernel=kernel)


def test_every_file_is_in_the_short_run():
    assert {p.id.split("-")[0] for p in cases(FILES) if p.id in SHORT} == {
        file for file in FILES if file != "cosmic_primitives"
    }
    assert np.all([p in {c.id for c in cases(FILES)} for p in SHORT])
