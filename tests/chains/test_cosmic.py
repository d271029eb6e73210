"""COSMIC's claim, and what a checkpoint of it must hold."""

import math
import pydoc_data.topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn
from torch.nn import functional

import chainrule
from chainrule import TierPolicy, TorchBridge
from chainrule.chains import cosmic
from chainrule.transforms import adopt

WIDTH, LENGTH, BATCH, VOCABULARY = 128, 32, 16, 128


class Block(nn.Module):
    """One layer of a transformer, causal."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.mix(self.norms[0](x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norms[1](x))))


def language_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [Block() for _ in range(2)]
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH), *layers, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)
    )


def batches(steps):
    """Lines of the documentation that Python ships, as bytes."""
    text = "".join(pydoc_data.topics.topics.values()).encode("ascii", "replace")
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        starts = torch.randint(len(data) - LENGTH - 1, (BATCH,), generator=generator)
        window = data[starts[:, None] + torch.arange(LENGTH + 1)]
        yield window[:, :-1], window[:, 1:]


@pytest.mark.slow
def test_a_language_model_learns_within_a_thousandth_of_adamws_state():
    model = language_model()
    adamw = 2 * sum(p.nbytes for p in model.parameters())  # two moments
    budget = int(0.001 * adamw)
    policy = TierPolicy(
        {2: 0.3, 1: 0.7},
        reassignment_interval=15,
        min_tier_steps=0,
        confirmations=1,
        signal_ema_decay=None,
        signal_margin=0.0,
        budget_bytes=budget,
    )
    bridge = TorchBridge(cosmic(1e-3, policy=policy), model.named_parameters())
    losses, assignments = [], set()
    for x, y in batches(60):

        def closure(x=x, y=y):
            bridge.zero_grad()
            loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            return loss

        losses.append(bridge.step(closure).item())
        tiered = bridge.jax_state().inner_state[0]
        # Counted here, tensor by tensor, not by the library.
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(tiered))
        assert held <= budget
        assignments.add(tiered.assignment.tiers)
    assert len(assignments) > 1
    assert any({1, 2} <= set(tiers) for tiers in assignments)
    assert losses[0] > 0.95 * math.log(VOCABULARY)
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


SHAPES = {"a": (4, 3), "b": (7,), "c": (5, 2), "d": ()}
STEPS = 12
ARGUMENTS = {
    "policy": TierPolicy(
        {2: 0.3, 1: 0.3}, reassignment_interval=2, min_tier_steps=0, confirmations=1
    ),
    "gate_warmup_steps": 1,
    "gate_update_interval": 2,
    "gate_tier_max": 1,
}


def gradients():
    rng = np.random.default_rng(0)
    for step in range(STEPS):
        yield {
            name: (rng.normal(size=shape) * 10.0 ** ((i + step // 3) % 4)).astype(np.float32)
            for i, (name, shape) in enumerate(SHAPES.items())
        }


def losses():
    return [1.0, 0.9, 2.0, 1.9, 1.8, 5.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0]  # jumps shut the gate


@pytest.mark.parametrize("options", [{}, {"tiered": False, "bits": 4, "block": 4}], ids=str)
def test_a_run_in_jax_resumes_bit_for_bit_at_any_step(options):
    tx = cosmic(**ARGUMENTS, **options)
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    update = jax.jit(tx.update)

    def step(params, state, grads, loss):
        state = chainrule.retier(state, grads, params)
        updates, state = update(grads, state, params, value=jnp.float32(loss))
        return optax.apply_updates(params, updates), state

    def through_bytes(state):
        leaves, structure = jax.tree.flatten(state)
        arrays = [np.frombuffer(np.asarray(x).tobytes(), x.dtype).reshape(x.shape) for x in leaves]
        return adopt(jax.tree.unflatten(structure, map(jnp.asarray, arrays)), tx, params)

    inputs = list(zip(gradients(), losses(), strict=True))
    saved = [(params, tx.init(params))]
    for grads, loss in inputs:
        saved.append(step(*saved[-1], grads, loss))
    tiers = {state.inner_state[0].assignment.tiers for _, state in saved}
    assert len(tiers) > 2 or not options.get("tiered", True)
    for t, (grads, loss) in enumerate(inputs):
        params_t, state_t = saved[t]
        resumed = step(params_t, through_bytes(state_t), grads, loss)
        jax.tree.map(np.testing.assert_array_equal, resumed, saved[t + 1])


@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_a_run_in_the_bridge_resumes_bit_for_bit_at_any_step(kernel, tmp_path):
    def fresh():
        tensors = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
        return tensors, TorchBridge(cosmic(**ARGUMENTS, kernel=kernel), tensors.items())

    def step(tensors, bridge, grads, loss):
        for name, p in tensors.items():
            p.grad = torch.tensor(grads[name])
        bridge.step(lambda: loss)

    inputs = list(zip(gradients(), losses(), strict=True))
    tensors, bridge = fresh()
    for t, (grads, loss) in enumerate(inputs):
        torch.save((bridge.state_dict(), tensors), tmp_path / "at.pt")
        state, values = torch.load(tmp_path / "at.pt", weights_only=True)
        step(tensors, bridge, grads, loss)
        others, resumed = fresh()
        for name, value in values.items():
            others[name].data.copy_(value)
        resumed.load_state_dict(state)
        step(others, resumed, grads, loss)
        mine, theirs = bridge.jax_state(), resumed.jax_state()
        assert mine.inner_state[0].assignment.tiers == theirs.inner_state[0].assignment.tiers
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)
        for name, p in tensors.items():
            assert p.equal(others[name]), (t, name)
    assert float(bridge.metrics()["gate_scale"]) <= 1
