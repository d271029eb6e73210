"""A chain with tiers through `TorchBridge`: it moves parameters by itself, as `chainrule.retier` does in JAX."""

import copy
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import bounds
import chainrule
from chainrule import TorchBridge, chains
from chainrule.transforms import TierPolicy

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 6), "d": (7,)}
STEPS = 12


def cosmic(**settings: Any) -> Any:
    eager = {
        "min_tier_steps": 0,
        "signal_ema_decay": None,
        "signal_margin": 0.0,
        "confirmations": 1,
    }
    policy = TierPolicy({2: 0.25, 1: 0.25}, reassignment_interval=3, warmup_steps=0, **eager)
    return chains.cosmic(0.01, policy=policy, gate_warmup_steps=4, kernel="xla", **settings)


def gradients() -> list[dict[str, np.ndarray]]:
    """Each tensor has the largest gradients for a while."""
    rng = np.random.default_rng(0)
    return [
        {
            name: (rng.normal(size=shape) * 10.0 ** ((i + step // 4) % 4)).astype(np.float32)
            for i, (name, shape) in enumerate(SHAPES.items())
        }
        for step in range(STEPS)
    ]


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}


def run(bridge: TorchBridge, params: dict[str, nn.Parameter], grads: Any) -> list[tuple[int, ...]]:
    """The assignment after each step."""
    seen = []
    for grad in grads:
        for name, p in params.items():
            p.grad = torch.tensor(grad[name])
        bridge.step()
        seen.append(tuple(bridge.state[params["a"]]["tiers"].tolist()))
    return seen


def test_parameters_move_as_in_jax() -> None:
    tx, params = cosmic(), parameters()
    bridge = TorchBridge(tx, params.items())
    seen = run(bridge, params, gradients())
    assert len(set(seen)) > 2

    want: Any = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    state = tx.init(want)
    for grad in gradients():
        state = chainrule.retier(state, grad, want)
        updates, state = tx.update(grad, state, want)
        want = optax.apply_updates(want, updates)
    assert jax.tree.structure(bridge.jax_state()) == jax.tree.structure(state)
    for name, p in params.items():
        np.testing.assert_allclose(
            p.detach().numpy(), want[name], rtol=0, atol=bounds.stepped(len(gradients()))
        )
    assert bridge.metrics()["tier_occupancy"] == chainrule.metrics(state)["tier_occupancy"]


@pytest.mark.slow
def test_moves_keep_the_width_of_float64_parameters() -> None:
    tx = cosmic(bits=4, block=4)
    params = {name: nn.Parameter(p.detach().double()) for name, p in parameters().items()}
    grads = [{name: g.astype(np.float64) for name, g in grad.items()} for grad in gradients()]
    bridge = TorchBridge(tx, params.items())
    assert len(set(run(bridge, params, grads))) > 2  # and no warning that float64 is truncated

    with jax.enable_x64(True):
        want = {name: jnp.ones(shape, jnp.float64) for name, shape in SHAPES.items()}
        state = tx.init(want)
        for grad in grads:
            state = chainrule.retier(state, grad, want)
            state = tx.update(grad, state, want)[1]
        chex.assert_trees_all_equal_shapes_and_dtypes(bridge.jax_state(), state)


def test_a_run_in_jax_goes_on_in_torch_with_the_tiers_that_it_has() -> None:
    params, other, grads = parameters(), parameters(), gradients()
    bridge = TorchBridge(cosmic(), params.items())
    run(bridge, params, grads[:7])
    state = bridge.jax_state()
    loaded = TorchBridge(cosmic(), other.items())
    assert jax.tree.structure(loaded.jax_state()) != jax.tree.structure(state)
    loaded.load_jax_state(state)
    for name, p in other.items():
        p.data.copy_(params[name])
    assert run(loaded, other, grads[7:]) == run(bridge, params, grads[7:])
    for name, p in other.items():
        assert p.equal(params[name])


def test_a_resumed_run_finds_its_tiers() -> None:
    params, grads = parameters(), gradients()
    bridge = TorchBridge(cosmic(), params.items())
    run(bridge, params, grads[:7])
    values, state = copy.deepcopy((list(params.values()), bridge.state_dict()))
    seen = run(bridge, params, grads[7:])

    other = dict(zip(params, values, strict=True))
    resumed = TorchBridge(cosmic(), other.items())
    resumed.load_state_dict(state)
    assert run(resumed, other, grads[7:]) == seen
    for name in params:
        assert other[name].equal(params[name])


# A move is due at the second step after it, and at the next.
@pytest.mark.parametrize("cut", [7, 8])
def test_copies_and_pickles_keep_their_tiers(cut: int) -> None:
    params, grads = parameters(), gradients()
    bridge = TorchBridge(cosmic, params.items())
    run(bridge, params, grads[:cut])
    twins = [copy.deepcopy((params, bridge)), pickle.loads(pickle.dumps((params, bridge)))]
    seen = run(bridge, params, grads[cut:])
    for other, twin in twins:
        assert run(twin, other, grads[cut:]) == seen
        for name in params:
            assert other[name].equal(params[name])


def test_the_step_count_is_read_once_and_again_when_it_is_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An accelerator would be waited for at each reading."""
    p = torch.nn.Parameter(torch.ones(8))
    policy = TierPolicy({2: 1.0}, reassignment_interval=4)
    bridge = TorchBridge(chains.cosmic(policy=policy), [p])
    asked = []
    due = TierPolicy.due
    monkeypatch.setattr(TierPolicy, "due", lambda self, t: asked.append(t) or due(self, t))
    reads = []
    read = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: reads.append(1) or read(self))

    def step() -> None:
        p.grad = torch.arange(8.0)
        bridge.step()

    step()  # moves the parameter to tier 2, for a new tree
    step()
    first = len(reads)
    step()
    assert asked[-1] == 3 and len(reads) == first
    saved = copy.deepcopy(bridge.state_dict())
    step()
    bridge.load_state_dict(saved)
    asked.clear()
    step()
    assert asked[0] == 4


def test_a_move_traces_the_chain_once_and_without_the_loss_that_it_has_not() -> None:
    """The gate reads the loss where there is one; the step with it and the step without it are two traces."""
    params, grads, traced = parameters(), gradients(), []
    chain = cosmic()

    def update(*args: Any, **kwargs: Any) -> Any:
        traced.append("value" in kwargs)
        return chain.update(*args, **kwargs)

    counted = optax.GradientTransformationExtraArgs(chain.init, update)
    bridge = TorchBridge(counted, params.items())
    (before,) = run(bridge, params, grads[:1])
    moves = 0
    for grad in grads[1:]:
        del traced[:]
        (after,) = run(bridge, params, [grad])
        assert traced == ([] if after == before else [False])
        moves += after != before
        before = after
    assert moves > 1
