"""COSMIC against its recordings through the torch bridge, and through the compiled kernel.

By default one or two variants of each file; the `slow` tests replay all.
"""

import pytest
import torch

from chainrule import TorchBridge
from tests.golden.replay import cases
from tests.golden.test_cosmic import FILES, PACKED, follow, hold_bytes
from tests.golden.test_cosmic import run as in_jit

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
    assert {p.id for p in cases(FILES)} >= SHORT
