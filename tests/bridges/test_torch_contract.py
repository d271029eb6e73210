"""`TorchBridge` keeps torch's contract: schedulers, scaler, clipping, hooks, saving, resuming, groups."""

import copy
import functools
import io
import pickle
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler, swa_utils
from torch.utils._python_dispatch import TorchDispatchMode

import bounds
import chainrule
from chainrule import TorchBridge, chains
from chainrule.bridges.lowering import to_jax
from chainrule.bridges.lowering.rules import kernel
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native import _kernel
from harness import assert_close

FEATURES, CLASSES = 6, 3


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, FEATURES, generator=generator)
    return x, torch.randint(CLASSES, (16,), generator=generator)


def loss_of(net: nn.Module, step: int) -> torch.Tensor:
    x, y = batch(step)
    return nn.functional.cross_entropy(net(x), y)


def train(net: nn.Module, optimizer: Any, steps: range, schedulers: Any = ()) -> None:
    for step in steps:

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(net, step)
            loss.backward()
            return loss

        optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step()


def grad_of(p: Any) -> torch.Tensor:
    assert p.grad is not None
    return p.grad


def weights(net: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def adamw(learning_rate: float = 0.01, **settings: Any) -> Any:
    return optax.inject_hyperparams(optax.adamw)(learning_rate, **settings)


# ---- against torch's own optimizer ---------------------------------------------------------


def pairs(
    **settings: Any,
) -> tuple[Any, TorchBridge, Any, torch.optim.Optimizer]:
    """A model on `optax.adamw` through the bridge and its copy on torch's AdamW."""
    ours, theirs = model(), model()
    bridge = TorchBridge(adamw(weight_decay=0.1), ours.parameters(), **settings)
    return ours, bridge, theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    torch.testing.assert_close(
        weights(ours), weights(theirs), rtol=0, atol=bounds.of_adam(0.01, 10)
    )


SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=8, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=8),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=1e-3, max_lr=0.02, step_size_up=3, cycle_momentum=True
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=12),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 6)],
        milestones=[3],
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.002, anneal_epochs=5),
}


def test_every_scheduler_of_torch_is_here() -> None:
    public = {
        name
        for name in lr_scheduler.__all__
        if name != "LRScheduler" and isinstance(getattr(lr_scheduler, name), type)
    }
    assert public | {"SWALR"} == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_the_bridge_as_they_drive_torch(name: str) -> None:
    ours, bridge, theirs, reference = pairs()
    first, second = SCHEDULERS[name](bridge), SCHEDULERS[name](reference)
    for step in range(10):
        for net, optimizer, scheduler in ((ours, bridge, first), (theirs, reference, second)):
            train(net, optimizer, range(step, step + 1))
            if name == "ReduceLROnPlateau":
                scheduler.step(1.0)
            else:
                scheduler.step()
        assert bridge.param_groups[0]["lr"] == bounds.near(reference.param_groups[0]["lr"])
        assert bridge.param_groups[0]["betas"] == bounds.near(reference.param_groups[0]["betas"])
    assert_same(ours, theirs)


def test_scheduler_on_a_chain_without_a_learning_rate_scales_its_updates() -> None:
    ours, theirs = model(), model()
    bridge = TorchBridge(optax.adamw(0.01, weight_decay=0.1), ours.parameters())
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    assert bridge.param_groups[0]["lr"] == 1.0
    for optimizer, net in ((bridge, ours), (reference, theirs)):
        train(net, optimizer, range(8), [lr_scheduler.ExponentialLR(optimizer, 0.7)])
    assert_same(ours, theirs)


def test_cycling_a_momentum_that_the_chain_has_not_is_torchs_error() -> None:
    bridge = TorchBridge(chains.stam(), model().parameters())
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        lr_scheduler.OneCycleLR(bridge, max_lr=0.1, total_steps=5)


def test_a_schedule_in_the_chain_follows_the_chains_count() -> None:
    ours, theirs = model(), model()
    bridge = TorchBridge(chains.adam(optax.exponential_decay(0.01, 1, 0.7)), ours.parameters())
    reference = torch.optim.Adam(theirs.parameters(), lr=0.01)
    train(ours, bridge, range(8))
    train(theirs, reference, range(8), [lr_scheduler.ExponentialLR(reference, 0.7)])
    assert_same(ours, theirs)
    assert bridge.param_groups[0]["lr"] == 1.0
    last = bridge.jax_state().hyperparams["learning_rate"]
    assert float(last) == bounds.near(0.01 * 0.7**7)


def test_group_values_flow_in_without_another_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, bridge, theirs, reference = pairs()
    train(ours, bridge, range(1))
    train(theirs, reference, range(1))
    monkeypatch.setattr(jax, "make_jaxpr", None)
    for optimizer in (bridge, reference):
        optimizer.param_groups[0].update(lr=0.03, weight_decay=0.0, eps=1e-4, betas=(0.7, 0.9))
    train(ours, bridge, range(1, 4))
    train(theirs, reference, range(1, 4))
    assert_same(ours, theirs)
    assert (bridge.param_groups[0]["b1"], bridge.param_groups[0]["b2"]) == (0.7, 0.9)
    bridge.param_groups[0]["b1"] = 0.8
    reference.param_groups[0]["betas"] = (0.8, 0.9)
    bridge.param_groups[0]["lr"] = torch.tensor(0.02)
    reference.param_groups[0]["lr"] = 0.02
    train(ours, bridge, range(4, 6))
    train(theirs, reference, range(4, 6))
    assert_same(ours, theirs)
    assert bridge.param_groups[0]["betas"] == (0.8, 0.9)


def test_groups_have_their_own_values_and_state() -> None:
    ours, theirs = model(), model()
    groups = [
        [
            {"params": [p for p in net.parameters() if p.ndim > 1], "lr": 0.02},
            {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        for net in (ours, theirs)
    ]
    bridge = TorchBridge(adamw(weight_decay=0.1), groups[0], betas=(0.8, 0.99))
    reference = torch.optim.AdamW(groups[1], lr=0.01, weight_decay=0.1, betas=(0.8, 0.99))
    assert [g["lr"] for g in bridge.param_groups] == [0.02, 0.01]
    assert [g["b1"] for g in bridge.param_groups] == [0.8, 0.8]
    train(ours, bridge, range(5))
    train(theirs, reference, range(5))
    assert_same(ours, theirs)
    counts = [s["count"] for s in bridge.state.values() if "count" in s]
    assert len(counts) == 2 and all(int(count) == 5 for count in counts)


def test_add_param_group_starts_a_count_of_its_own() -> None:
    ours, theirs = model(), model()
    bridge = TorchBridge(adamw(weight_decay=0.1), ours[0].parameters())
    reference = torch.optim.AdamW(theirs[0].parameters(), lr=0.01, weight_decay=0.1)
    train(ours, bridge, range(3))
    train(theirs, reference, range(3))
    bridge.add_param_group({"params": ours[2].parameters(), "lr": 0.05})
    reference.add_param_group({"params": theirs[2].parameters(), "lr": 0.05})
    train(ours, bridge, range(3, 7))
    train(theirs, reference, range(3, 7))
    assert_same(ours, theirs)


def test_names_make_the_tree() -> None:
    def route(params: Any) -> Any:
        return {name: "head" if name.startswith("2.") else "body" for name in params}

    chain = optax.partition({"head": optax.sgd(1.0), "body": optax.set_to_zero()}, route)
    net = model()
    before = copy.deepcopy(net.state_dict())
    bridge = TorchBridge(chain, net.named_parameters())
    train(net, bridge, range(1))
    changed = {name for name, value in net.state_dict().items() if not value.equal(before[name])}
    assert changed == {"2.weight", "2.bias"}


# ---- gradients that are missing ------------------------------------------------------------


def test_missing_gradients_leave_value_and_state_as_torch_does() -> None:
    ours, theirs = model(), model()
    bridge = TorchBridge(optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9), ours.parameters())
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        for net, optimizer in ((ours, bridge), (theirs, reference)):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            list(net.parameters())[step % 4].grad = None
            optimizer.step()
    assert_same(ours, theirs)


def test_a_missing_gradient_keeps_moments_while_the_groups_count_goes_on() -> None:
    net = model()
    bridge = TorchBridge(adamw(), net.parameters())
    train(net, bridge, range(2))
    still = net[0].weight
    kept = {name: value.clone() for name, value in bridge.state[still].items()}
    value = still.detach().clone()
    loss_of(net, 2).backward()
    still.grad = None
    bridge.step()
    assert still.equal(value)
    for name in ("mu", "nu"):
        assert bridge.state[still][name].equal(kept[name])
    assert (
        int(bridge.state[still]["count"]) == int(kept["count"]) + 1
    )  # kept with the first parameter


@pytest.mark.parametrize("compile", [False, True])
def test_a_missing_gradient_keeps_the_numbers_of_its_parameter(compile: bool) -> None:
    """In JAX they are one vector for all parameters; here each has its own."""
    net = model()
    bridge = TorchBridge(chains.stam(), net.named_parameters(), compile=compile)
    train(net, bridge, range(2))
    still, moving = net[0].weight, net[2].weight
    names = {"b1", "b1_prod", "first", "second", "nonfinite"}
    before = {p: {n: bridge.state[p][n].clone() for n in names} for p in (still, moving)}
    loss_of(net, 2).backward()
    still.grad = None
    bridge.step()
    assert all(bridge.state[still][name].equal(before[still][name]) for name in names)
    assert not bridge.state[moving]["b1_prod"].equal(before[moving]["b1_prod"])
    assert {x.shape for x in bridge.metrics()["b1"].values()} == {torch.Size([])}


def test_no_gradient_at_all_is_no_step() -> None:
    net = model()
    bridge = TorchBridge(adamw(), net.parameters())
    before = weights(net)
    bridge.step()
    assert weights(net).equal(before)
    assert int(bridge.state[net[0].weight]["count"]) == 0


def test_frozen_parameters_have_no_state_and_join_when_they_thaw() -> None:
    net = model()
    net[0].requires_grad_(False)
    chain = optax.inject_hyperparams(optax.sgd)(0.1, momentum=0.9)
    bridge = TorchBridge(chain, net.named_parameters())
    assert net[0].weight not in bridge.state
    train(net, bridge, range(2))
    theirs = copy.deepcopy(net)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for p, q in zip(net.parameters(), theirs.parameters(), strict=True):
        if p in bridge.state:
            reference.state[q]["momentum_buffer"] = bridge.state[p]["trace"].clone()
    for thawed in (net, theirs):
        thawed[0].requires_grad_(True)
    train(net, bridge, range(2, 5))
    train(theirs, reference, range(2, 5))
    assert_same(net, theirs)


def test_a_newcomer_brings_its_own_numbers() -> None:
    net = model()
    net[0].requires_grad_(False)
    bridge = TorchBridge(chains.stam_lite(), net.named_parameters())
    train(net, bridge, range(2))
    kept = bridge.state[net[2].weight]["b1_prod"].clone()
    net[0].requires_grad_(True)
    train(net, bridge, range(2, 3))
    assert bridge.state[net[2].weight]["b1_prod"] < kept
    assert bridge.state[net[0].weight]["b1_prod"] > kept  # one update old


def test_a_state_that_spans_all_parameters_takes_no_newcomer() -> None:
    net = model()
    net[0].requires_grad_(False)
    bridge = TorchBridge(optax.flatten(optax.adam(0.1)), net.parameters())
    train(net, bridge, range(1))
    net[0].requires_grad_(True)
    before = weights(net)
    with pytest.raises(ValueError, match="`mu` spans all parameters of the group"):
        train(net, bridge, range(1, 2))
    assert weights(net).equal(before)


# ---- torch's tools -------------------------------------------------------------------------


def test_grad_scaler_skips_a_step_with_infinite_gradients() -> None:
    ours, bridge, theirs, reference = pairs()
    scalers = [torch.amp.GradScaler("cpu", init_scale=64.0) for _ in range(2)]
    for step in range(5):
        cases = ((ours, bridge, scalers[0]), (theirs, reference, scalers[1]))
        for net, optimizer, scaler in cases:
            optimizer.zero_grad()
            scaler.scale(loss_of(net, step)).backward()
            if step == 2:
                grad_of(net[0].weight)[0, 0] = torch.inf
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert_same(ours, theirs)
    assert int(bridge.state[ours[0].weight]["count"]) == 4
    assert scalers[0].get_scale() == scalers[1].get_scale() == 32.0


def test_clip_grad_norm() -> None:
    ours, bridge, theirs, reference = pairs()
    for step in range(4):
        for net, optimizer in ((ours, bridge), (theirs, reference)):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            optimizer.step()
    assert_same(ours, theirs)


def test_hooks_and_zero_grad() -> None:
    net = model()
    bridge = TorchBridge(adamw(), net.parameters())
    seen: list[str] = []
    bridge.register_step_pre_hook(lambda *_: seen.append("before"))
    bridge.register_step_post_hook(lambda *_: seen.append("after"))
    bridge.register_state_dict_pre_hook(lambda _: seen.append("saving"))
    bridge.register_state_dict_post_hook(lambda _, d: {**d, "note": 1})
    bridge.register_load_state_dict_pre_hook(lambda _, d: seen.append(f"loading {d.pop('note')}"))
    bridge.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(net, bridge, range(1))
    bridge.load_state_dict(bridge.state_dict())
    assert seen == ["before", "after", "saving", "loading 1", "loaded"]
    bridge.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())
    bridge.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_step_returns_the_loss_and_the_chain_reads_it() -> None:
    net = model()
    bridge = TorchBridge(optax.polyak_sgd(1.0), net.parameters())
    bridge.zero_grad()
    loss = loss_of(net, 0)

    def closure():
        loss.backward()
        return loss

    params = [to_jax(p) for p in net.parameters()]
    assert bridge.step(closure) is loss
    grads = [to_jax(grad_of(p)) for p in net.parameters()]
    tx = optax.polyak_sgd(1.0)
    updates, _ = tx.update(grads, tx.init(params), params, value=to_jax(loss))
    wanted: Any = optax.apply_updates(params, updates)
    for p, want in zip(net.parameters(), wanted, strict=True):
        assert_close(to_jax(p), want, bounds.stepped(1))


def test_a_chain_that_reads_the_loss_needs_a_closure() -> None:
    net = model()
    bridge = TorchBridge(optax.contrib.momo(1.0), net.parameters())
    loss_of(net, 0).backward()
    before, state = weights(net), copy.deepcopy(bridge.state_dict())
    with pytest.raises(ValueError, match=r"reads the loss \(`value`\); call `step\(closure\)`"):
        bridge.step()
    assert weights(net).equal(before)
    torch.testing.assert_close(bridge.state_dict(), state, rtol=0, atol=0)


def test_channels_last_parameters_stay_so() -> None:
    torch.manual_seed(0)
    ours = nn.Conv2d(3, 4, 3)
    ours.weight.data = ours.weight.data.contiguous(memory_format=torch.channels_last)
    theirs = copy.deepcopy(ours)
    bridge = TorchBridge(adamw(weight_decay=0.1), ours.parameters())
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for net, optimizer in ((ours, bridge), (theirs, reference)):
        for _ in range(3):
            optimizer.zero_grad()
            net(torch.ones(1, 3, 5, 5)).square().sum().backward()
            optimizer.step()
    assert_same(ours, theirs)
    assert ours.weight.is_contiguous(memory_format=torch.channels_last)


class _Calls(TorchDispatchMode):
    """Records the operations that torch dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made.add(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [chains.adam, chains.stam, chains.casmo])
def test_a_step_waits_for_no_device(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU there is nothing to wait for; this is the program that an accelerator runs.
    monkeypatch.setattr(StepProgram, "on_cpu", False)
    monkeypatch.setattr(kernel, "runs_in_kernel", lambda *_: False)
    net = model()
    bridge = TorchBridge(make(), net.parameters())
    train(net, bridge, range(1))
    loss_of(net, 1).backward()

    def refuse(*_: Any) -> Any:
        raise AssertionError("host synchronisation")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    with _Calls() as calls:
        bridge.step()
    monkeypatch.undo()
    # On CUDA this one reads its scalar on the host; those of products and quotients do not.
    assert torch.ops.aten._foreach_add.Tensor not in calls.made
    assert torch.ops.aten._foreach_add_.Tensor not in calls.made
    assert all(torch.is_tensor(v) for state in bridge.state.values() for v in state.values())


# ---- saving, resuming ----------------------------------------------------------------------


def noisy() -> Any:
    return optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(7)), optax.adam(0.01))


RESUMED: dict[str, Any] = {
    "adamw": adamw,
    "noise": noisy,
    "casmo": lambda: chains.casmo(0.01),
    "stam": lambda: chains.stam(0.01),
    "schedule": lambda: chains.adam(optax.cosine_decay_schedule(0.01, 20)),
    "multi_steps": lambda: optax.MultiSteps(adamw(), 3),
    "momo": lambda: optax.contrib.momo(1.0),
    "lbfgs": lambda: optax.lbfgs(0.1, memory_size=3, linesearch=None),
    "muon": lambda: optax.contrib.muon(0.01),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.01),
}


def assert_same_state(one: TorchBridge, other: TorchBridge) -> None:
    first, second = one.state_dict(), other.state_dict()
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["param_groups"] == second["param_groups"]


def saved(optimizer: TorchBridge) -> Any:
    """The state dict after a round trip through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_at_any_step_is_bit_identical(name: str) -> None:
    net = model()
    bridge = TorchBridge(RESUMED[name](), net.named_parameters())
    points = {}
    for step in range(8):
        if step in (0, 1, 4, 7):
            points[step] = (copy.deepcopy(net.state_dict()), saved(bridge))
        train(net, bridge, range(step, step + 1))
    for step, (values, state) in points.items():
        other = model(seed=1)
        other.load_state_dict(values)
        resumed = TorchBridge(RESUMED[name](), other.named_parameters())
        resumed.load_state_dict(state)
        train(other, resumed, range(step, 8))
        assert weights(other).equal(weights(net)), step
        assert_same_state(resumed, bridge)


def test_a_loaded_dict_is_not_written_to() -> None:
    net = model()
    bridge = TorchBridge(adamw(), net.parameters())
    train(net, bridge, range(2))
    kept = copy.deepcopy(bridge.state_dict())
    state = copy.deepcopy(kept)
    other = TorchBridge(adamw(), net.parameters())
    other.load_state_dict(state)
    train(net, other, range(2, 4))
    torch.testing.assert_close(state, kept, rtol=0, atol=0)


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_state_dict(flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    chain = chains.stam(0.01)
    net = model()
    bridge = TorchBridge(chain, net.parameters())
    train(net, bridge, range(3))
    values = copy.deepcopy(net.state_dict())
    state = copy.deepcopy(get_optimizer_state_dict(net, bridge, options=options))
    train(net, bridge, range(3, 6))

    other = model(seed=1)
    other.load_state_dict(values)
    resumed = TorchBridge(chain, other.parameters())
    set_optimizer_state_dict(other, resumed, state, options=options)
    train(other, resumed, range(3, 6))
    assert weights(other).equal(weights(net))


def test_deepcopy_takes_model_and_optimizer_along() -> None:
    net = model()
    bridge = TorchBridge(chains.stam(0.01), net.named_parameters())
    train(net, bridge, range(2))
    net2, bridge2 = copy.deepcopy((net, bridge))
    train(net, bridge, range(2, 4))
    assert not weights(net2).equal(weights(net))
    train(net2, bridge2, range(2, 4))
    assert weights(net2).equal(weights(net))


def test_pickle_of_a_bridge_made_from_a_function() -> None:
    net = model()
    bridge = TorchBridge(functools.partial(optax.adamw, 0.01), net.parameters())
    train(net, bridge, range(2))
    net2, bridge2 = pickle.loads(pickle.dumps((net, bridge)))
    train(net, bridge, range(2, 4))
    train(net2, bridge2, range(2, 4))
    assert weights(net2).equal(weights(net))


def test_pickle_of_closures_is_refused_with_the_remedy() -> None:
    bridge = TorchBridge(optax.adamw(0.01), model().parameters())
    with pytest.raises(pickle.PicklingError, match="with a function that returns the chain"):
        pickle.dumps(bridge)


# ---- rounding ------------------------------------------------------------------------------


def test_stochastic_rounding_applies_small_updates_on_average() -> None:
    chain = optax.inject_hyperparams(optax.sgd)(2.0**-12)
    steps, finals = 64, {}
    for rounding in (None, "stochastic"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        bridge = TorchBridge(chain, [p], rounding=rounding)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            bridge.step()
        assert p.dtype == torch.bfloat16
        finals[rounding] = float(p.detach().double().mean())
    assert finals[None] == 1.0  # half a unit in the last place below 1 is 2^-9
    assert abs(finals["stochastic"] - (1 - steps * 2.0**-12)) <= bounds.sampled(
        4096, steps**0.5 * 2.0**-10
    )


def test_stochastic_rounding_is_seeded_and_resumes() -> None:
    def run(seed: int, stop: int | None = None) -> torch.Tensor:
        torch.manual_seed(seed)
        p = nn.Parameter(torch.linspace(-2, 2, 100, dtype=torch.bfloat16))
        bridge = TorchBridge(chains.adam(1e-3), [p], rounding="stochastic")
        for step in range(6):
            if step == stop:
                state = copy.deepcopy(bridge.state_dict())
                torch.manual_seed(99)
                bridge = TorchBridge(chains.adam(1e-3), [p], rounding="stochastic")
                bridge.load_state_dict(state)
            p.grad = p.detach().sin()
            bridge.step()
        return p.detach()

    assert run(0).equal(run(0)) and not run(0).equal(run(1))
    assert run(0).equal(run(0, stop=3))


# ---- one state, two runtimes ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "stam", "noise", "schedule"])
def test_a_run_moves_from_jax_to_torch_and_back(name: str) -> None:
    tx = RESUMED[name]()
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (3,)}
    grads = [
        {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
        for _ in range(9)
    ]
    step = jax.jit(tx.update, compiler_options={"xla_allow_excess_precision": False})

    def in_jax(params: Any, state: Any, some: Any) -> tuple[Any, Any]:
        for grad in some:
            updates, state = step(grad, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    start = {k: jnp.ones(s) for k, s in shapes.items()}
    want, want_state = in_jax(start, tx.init(start), grads)

    params, state = in_jax(start, tx.init(start), grads[:3])
    tensors = {k: nn.Parameter(torch.tensor(np.asarray(v))) for k, v in params.items()}
    bridge = TorchBridge(RESUMED[name](), tensors.items())
    bridge.load_jax_state(state)
    for grad in grads[3:6]:
        for key, p in tensors.items():
            p.grad = torch.tensor(np.asarray(grad[key]))
        bridge.step()
    got, got_state = in_jax(
        {k: to_jax(p) for k, p in tensors.items()}, bridge.jax_state(), grads[6:]
    )
    assert jax.tree.structure(got_state) == jax.tree.structure(want_state)
    for key in shapes:
        np.testing.assert_allclose(
            got[key], want[key], rtol=0, atol=bounds.stepped(9) * np.abs(want[key]).max(initial=1.0)
        )


def test_load_jax_state_sets_the_groups_and_names_what_does_not_fit() -> None:
    chain = chains.adam(0.01)
    bridge = TorchBridge(chain, {"w": nn.Parameter(torch.ones(3))}.items())
    state = chainrule.set_hyperparams(chain.init({"w": jnp.ones(3)}), learning_rate=0.5, b1=0.25)
    bridge.load_jax_state(state)
    group = bridge.param_groups[0]
    assert (group["lr"], group["betas"]) == (0.5, (0.25, 0.999))
    with pytest.raises(
        ValueError, match=r"state entry `.*mu\.w` is torch.float32 \(4,\), expected float32 \(3,\)"
    ):
        bridge.load_jax_state(chain.init({"w": jnp.ones(4)}))
    with pytest.raises(ValueError, match="expected a state of structure"):
        bridge.load_jax_state(optax.adam(0.1).init({"w": jnp.ones(3)}))
    assert group["lr"] == 0.5


@pytest.mark.parametrize("chain", [adamw, lambda: chains.adam(0.01), lambda: optax.adamw(0.01)])
def test_load_torch_adam_goes_on_where_torch_stopped(chain: Any) -> None:
    theirs = model()
    decay = 0.0 if chain is not adamw else 1e-4
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=decay)
    train(theirs, reference, range(4))
    ours = copy.deepcopy(theirs)
    bridge = TorchBridge(chain(), ours.named_parameters())
    bridge.load_torch_adam(reference.state_dict())
    if "weight_decay" in bridge.param_groups[0]:
        bridge.param_groups[0]["weight_decay"] = decay
    train(theirs, reference, range(4, 8))
    train(ours, bridge, range(4, 8))
    torch.testing.assert_close(
        weights(ours), weights(theirs), rtol=0, atol=bounds.of_adam(0.01, 10)
    )


def test_load_torch_adam_refuses_what_does_not_fit() -> None:
    net = model()
    reference = torch.optim.Adam(net.parameters())
    train(net, reference, range(1))
    state = reference.state_dict()
    with pytest.raises(ValueError, match="no state with `count`, `mu` and `nu`"):
        TorchBridge(optax.sgd(0.1, momentum=0.9), net.parameters()).load_torch_adam(state)
    bridge = TorchBridge(adamw(), net.parameters())
    with pytest.raises(ValueError, match="other parameter groups"):
        bridge.load_torch_adam(torch.optim.Adam(net[0].parameters()).state_dict())
    broken = copy.deepcopy(state)
    broken["state"][1]["exp_avg"] = torch.zeros(5)
    with pytest.raises(ValueError, match=r"`exp_avg` of parameter 1 is of shape \(5,\)"):
        bridge.load_torch_adam(broken)
    broken = copy.deepcopy(state)
    broken["state"][1]["step"] += 1
    with pytest.raises(ValueError, match="different numbers of steps"):
        bridge.load_torch_adam(broken)
    assert not bridge.state[net[0].weight]["mu"].any()


# ---- looking inside ------------------------------------------------------------------------


def test_metrics_and_explain() -> None:
    net = model()
    bridge = TorchBridge(chains.stam(), net.named_parameters())
    train(net, bridge, range(2))
    found = bridge.metrics()
    assert sorted(found["b1"]) == sorted(name for name, _ in net.named_parameters())
    assert all(isinstance(v, torch.Tensor) for v in found["b1"].values())
    text = bridge.explain()
    for part in ("param group 0: 4 parameters, 83 elements, cpu", "adaptive_beta1", "mu", "total"):
        assert part in text
    assert "partition" not in text
    passes = [line.split()[0] for line in bridge.explain(passes=True).splitlines()]
    after = passes.index("pass") + 1
    assert passes[after:] == [
        *("infer_values", "join_measures", "take_kernel_moves"),
        *(("scalarise",) if _kernel is not None else ()),
        *("fuse", "cut_at_sums", "rematerialise_elements", "partition", "overwrite"),
        "foreach_calls",
    ]
    bridge.add_param_group({"params": [("extra", nn.Parameter(torch.ones(2)))]})
    assert len(bridge.metrics()) == 2
    assert "param group 1" in bridge.explain()


def test_a_hyperparameter_called_lr_is_the_learning_rate() -> None:
    weight = nn.Parameter(torch.ones(1))
    bridge = TorchBridge(optax.inject_hyperparams(lambda lr: optax.sgd(lr))(lr=0.5), [weight])
    weight.grad = torch.ones(1)
    bridge.step()
    assert weight.item() == 0.5
    bridge.param_groups[0]["lr"] = 0.25
    bridge.step()
    assert weight.item() == 0.25
    both = optax.inject_hyperparams(lambda lr, learning_rate: optax.sgd(lr * learning_rate))
    with pytest.raises(ValueError, match="`learning_rate` and `lr`"):
        TorchBridge(both(lr=0.5, learning_rate=0.5), [nn.Parameter(torch.ones(1))])


@pytest.mark.parametrize("make", [optax.sign_sgd, chains.cosmic], ids=["sign", "cosmic"])
def test_autograd_knows_that_a_step_changed_what_it_saved(make: Any) -> None:
    weight = nn.Parameter(torch.ones(3))
    bridge = TorchBridge(make(0.1), [weight])
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    bridge.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_repr_shows_the_hyperparameters() -> None:
    text = repr(TorchBridge(adamw(), model().parameters()))
    assert text.startswith("TorchBridge (") and "lr: 0.01" in text


def test_memory_of_the_state_is_the_chains() -> None:
    net = model()
    bridge = TorchBridge(optax.adamw(0.01), net.parameters())
    held = sum(v.nbytes for state in bridge.state.values() for v in state.values())
    assert held == 2 * weights(net).nbytes + 4


def test_no_jax_at_step_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net = model()
    bridge = TorchBridge(chains.stam(), net.parameters())
    loss_of(net, 0).backward()

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("JAX ran")

    from jax._src.interpreters import pxla

    monkeypatch.setattr(pxla.ExecuteReplicated, "__call__", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bridge.step()
