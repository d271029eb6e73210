"""What may happen to a model, its state and its process around a `TorchBridge`: devices, dtypes, modes, clearing."""

import contextlib
import copy
import functools
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import optax
import pytest
import torch
from torch import nn

import bounds
from chainrule import TorchBridge, chain, chains
from chainrule.transforms import TierPolicy, quantized_state, scale_by_adam, tiered_state


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def in_codes(rate: float) -> Any:
    return chain(quantized_state(scale_by_adam(), 8, 2), optax.scale(-rate))


def step(bridge: TorchBridge, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in bridge.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator, device="cpu").to(p)
    bridge.step()


def weights(net: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def assert_same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


# ---- the state is cleared ------------------------------------------------------------------


@pytest.mark.parametrize("make", [chains.adam, chains.stam, chains.cosmic])
def test_a_cleared_state_starts_afresh(make: Any) -> None:
    net = model()
    bridge = TorchBridge(make(0.1), net.parameters())
    for i in range(3):
        step(bridge, i)
    fresh_net = copy.deepcopy(net)
    fresh = TorchBridge(make(0.1), fresh_net.parameters())
    bridge.state.clear()
    assert_same(bridge.state_dict()["state"], fresh.state_dict()["state"])
    bridge.state.clear()
    for i in range(3):
        step(bridge, i)
        step(fresh, i)
    assert_same(weights(net), weights(fresh_net))
    assert_same(bridge.state_dict()["state"], fresh.state_dict()["state"])


def test_parameters_may_be_replaced_where_the_state_is_cleared() -> None:
    net, other_net = model(), model()
    bridge = TorchBridge(chains.adam(0.1), net.parameters())
    step(bridge)
    bridge.state.clear()
    bridge.param_groups[0]["params"] = list(other_net.parameters())
    step(bridge)
    fresh_net = model()
    step(TorchBridge(chains.adam(0.1), fresh_net.parameters()))
    assert_same(weights(other_net), weights(fresh_net))


def test_a_cleared_state_loads() -> None:
    net = model()
    bridge = TorchBridge(chains.adam(0.1), net.parameters())
    step(bridge)
    saved = copy.deepcopy(bridge.state_dict())
    bridge.state.clear()
    bridge.load_state_dict(saved)
    assert_same(bridge.state_dict()["state"], saved["state"])


def test_a_parameter_without_state_starts_afresh_under_the_groups_count() -> None:
    net = model()
    bridge = TorchBridge(chains.adam(0.1), net.parameters())
    step(bridge)
    head = copy.deepcopy(bridge.state[net.weight])
    del bridge.state[net.bias]
    bridge.explain()
    assert_same(bridge.state[net.weight], head)
    assert {name: float(x.sum()) for name, x in bridge.state[net.bias].items()} == {
        "mu": 0,
        "nu": 0,
    }
    step(bridge)
    assert bridge.state[net.weight]["count"] == 2


@pytest.mark.parametrize(("name", "entry"), [("bias", "mu"), ("weight", "count")])
def test_a_state_entry_that_is_missing(name: str, entry: str) -> None:
    net = model()
    bridge = TorchBridge(chains.adam(0.1), net.named_parameters())
    step(bridge)
    before = weights(net)
    del bridge.state[getattr(net, name)][entry]
    with pytest.raises(RuntimeError, match=f"has no `{entry}` of parameter {name} any more; clear"):
        bridge.step()
    assert_same(weights(net), before)


def test_a_removed_parameter_cannot_take_the_groups_state_along() -> None:
    net = model()
    bridge = TorchBridge(chains.adam(0.1), net.named_parameters())
    step(bridge)
    del bridge.state[net.weight]  # with the count
    with pytest.raises(RuntimeError, match="has no `count` of parameter weight any more"):
        bridge.step()


# ---- other memory, dtypes and devices ------------------------------------------------------


def momentum(learning_rate: float) -> Any:
    return optax.sgd(learning_rate, momentum=0.9)


@pytest.mark.parametrize(
    ("make", "compile"), [(momentum, True), (chains.adam, False), (chains.stam, False)]
)
def test_a_parameter_may_get_other_memory(make: Any, compile: bool) -> None:
    ours, theirs = model(), model()
    bridge = TorchBridge(make(0.1), ours.parameters(), compile=compile)
    other = TorchBridge(make(0.1), theirs.parameters(), compile=compile)
    for i in range(3):
        step(bridge, i)
        step(other, i)
        ours.weight.data = ours.weight.data.clone()
        assert_same(weights(ours), weights(theirs))
    # A square's transpose lies in the same memory, in another order.
    square = nn.Parameter(torch.arange(4.0).reshape(2, 2))
    bridge = TorchBridge(optax.sgd(1.0), [square], compile=compile)
    step(bridge)
    square.data = square.data.t()
    want = square.detach().clone()
    square.grad = torch.arange(4.0).reshape(2, 2)
    bridge.step()
    assert_same(square.detach(), want - square.grad)


@pytest.mark.parametrize("rounding", [None, "stochastic"])
@pytest.mark.parametrize("make", [chains.adam, chains.cosmic])
def test_a_model_may_be_cast_before_the_first_step(make: Any, rounding: Any) -> None:
    ours, theirs = model(), model().to(torch.bfloat16)
    torch.manual_seed(7)
    bridge = TorchBridge(make(0.1), ours.parameters(), rounding=rounding)
    other = TorchBridge(make(0.1), theirs.parameters(), rounding=rounding)
    torch.manual_seed(8)  # bits are those of the seed at construction
    ours.to(torch.bfloat16)
    for i in range(3):
        step(bridge, i)
        step(other, i)
    assert_same(weights(ours), weights(theirs))
    assert_same(bridge.state_dict()["state"], other.state_dict()["state"])


def copied(net: Any, bridge: TorchBridge) -> Any:
    return copy.deepcopy((net, bridge))


def pickled(net: Any, bridge: TorchBridge) -> Any:
    return pickle.loads(pickle.dumps((net, bridge)))


@pytest.mark.parametrize("rounding", [None, "stochastic"])
@pytest.mark.parametrize("when", ["before", "after", "after its first look"])
@pytest.mark.parametrize("again", [copied, pickled])
def test_a_copy_that_has_made_no_step_may_be_cast(again: Any, when: str, rounding: Any) -> None:
    net, want = model(), model().to(torch.bfloat16)
    torch.manual_seed(7)
    make = functools.partial(optax.adamw, 0.1)
    bridge = TorchBridge(make, net.parameters(), rounding=rounding)
    other = TorchBridge(make, want.parameters(), rounding=rounding)
    torch.manual_seed(8)
    if when == "before":
        net.to(torch.bfloat16)
    net, bridge = again(net, bridge)
    if when == "after its first look":
        bridge.state_dict()
    net.to(torch.bfloat16)
    for i in range(2):
        step(bridge, i)
        step(other, i)
    assert_same(weights(net), weights(want))
    assert_same(bridge.state_dict()["state"], other.state_dict()["state"])


@pytest.mark.parametrize("again", [copied, pickled])
def test_a_copy_that_has_made_steps_is_not_made_again(again: Any) -> None:
    net = model()
    bridge = TorchBridge(functools.partial(optax.adamw, 0.1), net.parameters())
    step(bridge)
    net, bridge = again(net, bridge)
    bridge.state_dict()
    net.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"parameter 0 was torch.float32"):
        step(bridge)


def test_a_shallow_copy_does_not_make_again_what_another_stepped() -> None:
    net = model()
    bridge = TorchBridge(chains.adam(0.1), net.parameters())
    other = copy.copy(bridge)
    step(bridge)
    other.state_dict()
    net.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"parameter 0 was torch.float32"):
        step(other)


def test_a_loaded_state_is_no_fresh_one() -> None:
    net = model()
    bridge = TorchBridge(chains.adam(0.1), net.parameters())
    step(bridge)
    saved = copy.deepcopy(bridge.state_dict())
    other = TorchBridge(chains.adam(0.1), net.parameters())
    other.load_state_dict(saved)
    net.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"parameter 0 was torch.float32"):
        step(other)


@contextlib.contextmanager
def swapped() -> Any:
    """`Module.to_empty` keeps the parameters and gives them other tensors."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("make", [chains.adam, chains.cosmic])
def test_parameters_may_leave_meta(make: Any) -> None:
    with torch.device("meta"):
        net = model()
    bridge = TorchBridge(make(0.1), net.parameters())
    assert bridge.param_groups[0]["lr"] == 0.1
    with swapped():
        net.to_empty(device="cpu")
    net.load_state_dict(model().state_dict())
    other_net = model()
    other = TorchBridge(make(0.1), other_net.parameters())
    for i in range(3):
        step(bridge, i)
        step(other, i)
    assert_same(weights(net), weights(other_net))


def test_parameters_that_were_left_behind_on_meta() -> None:
    with torch.device("meta"):
        net = model()
    bridge = TorchBridge(chains.adam(0.1), net.parameters())
    net.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match=r"on the device `meta` and have no gradients.*to_empty"):
        bridge.step()


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (chains.adam, {}),
        (chains.stam, {}),
        (momentum, {"compile": True}),
        (chains.stam, {"engine": "xla"}),
        (chains.cosmic, {}),
        (chains.muon, {"rounding": "stochastic"}),
        (in_codes, {}),
        pytest.param(in_codes, {"compile": True}, marks=pytest.mark.slow),
    ],
)
def test_the_default_device_is_nothing_to_a_bridge(make: Any, options: dict[str, Any]) -> None:
    net = model()
    with torch.device("meta"):
        bridge = TorchBridge(make(0.1), net.parameters(), **options)
        step(bridge)
        bridge.load_state_dict(copy.deepcopy(bridge.state_dict()))
        bridge.load_jax_state(bridge.jax_state())
        step(copy.deepcopy(bridge))
        bridge.metrics()
    step(bridge)
    tensors = [x for entry in bridge.state.values() for x in entry.values()]
    assert all(x.device == torch.device("cpu") for x in tensors)


def test_adam_loads_under_another_default_device() -> None:
    net = model()
    adam = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    adam.step()
    bridge = TorchBridge(chains.adam(0.1), net.parameters())
    with torch.device("meta"):
        bridge.load_torch_adam(adam.state_dict())
    assert bridge.state[net.weight]["count"] == 1


# ---- inference mode ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "compile"), [(momentum, True), (chains.adam, False), (chains.cosmic, False)]
)
def test_inference_mode_leaves_no_tensors_behind(make: Any, compile: bool) -> None:
    net, other_net = model(), model()
    other = TorchBridge(make(0.1), other_net.parameters(), compile=compile)
    with torch.inference_mode():
        bridge = TorchBridge(make(0.1), net.parameters(), compile=compile)
        step(bridge)
        saved = copy.deepcopy(bridge.state_dict())
        bridge.state.clear()
        bridge.load_state_dict(saved)
    step(other)
    for i in range(2):
        step(bridge, i)
        step(other, i)
    assert_same(weights(net), weights(other_net))
    assert not any(x.is_inference() for entry in bridge.state.values() for x in entry.values())


# ---- live chains as tiers ------------------------------------------------------------------


def test_a_tier_may_be_a_chain_with_hyperparameters() -> None:
    params = [nn.Parameter(torch.full((4,), float(i + 1))) for i in range(5)]
    policy = TierPolicy(fractions={1: 0.4, 2: 0.2})
    tiers = {2: optax.trace(0.9), 1: chains.stam(0.1), 0: optax.scale(-0.1)}
    bridge = TorchBridge(tiered_state(tiers, policy), params)
    keys = set(bridge.param_groups[0])
    for i in range(3):
        step(bridge, i)
    occupancy = bridge.metrics()["tier_occupancy"]
    assert occupancy == {0: 2, 1: 2, 2: 1}
    assert set(bridge.param_groups[0]) == keys == {"params", "lr"}  # lr: a factor on all updates
    rates = [entry["learning_rate"] for entry in bridge.state.values() if "learning_rate" in entry]
    np.testing.assert_allclose(
        rates, [0.1, 0.1], rtol=bounds.gamma(1)
    )  # in each tensor's own state
    saved = copy.deepcopy(bridge.state_dict())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    other = TorchBridge(tiered_state(tiers, policy), others)
    other.load_state_dict(saved)
    for i in range(3, 6):
        step(bridge, i)
        step(other, i)
    assert_same(params, others)


# ---- copies --------------------------------------------------------------------------------


def test_a_shallow_copy_shares_the_state_as_torchs_do() -> None:
    net = model()
    bridge = TorchBridge(chains.adam(0.1), net.parameters())
    other = copy.copy(bridge)
    step(bridge)
    step(other)
    assert other.state is bridge.state and other.param_groups is bridge.param_groups
    assert bridge.state[net.weight]["count"] == 2


# ---- dropped -------------------------------------------------------------------------------


def left_for_the_collector(make: Any, count: int, compile: bool) -> int:
    """Objects that only the cyclic collector frees when a bridge over `count` tensors is dropped."""
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(count)]
    bridge = TorchBridge(make(), params, compile=compile)
    for p in params:
        p.grad = torch.ones_like(p)
    bridge.step()
    bridge.explain()
    state = weakref.ref(next(iter(bridge.state[params[0]].values())))
    gc.collect()
    gc.disable()
    try:
        del bridge
        assert state() is None
        return gc.collect()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("make", "compile"),
    [
        (lambda: optax.adamw(0.1), False),
        (lambda: optax.sgd(0.1, momentum=0.9), True),
        pytest.param(lambda: chains.stam(0.1), False, marks=pytest.mark.slow),
        pytest.param(lambda: chains.cosmic(0.1), False, marks=pytest.mark.slow),
    ],
    ids=["adamw", "sgd-compiled", "stam", "cosmic"],
)
def test_a_dropped_bridge_is_gone(make: Any, compile: bool) -> None:
    # The classes that torch makes for its graph modules remain: some for each program, none for each tensor.
    few, many = (left_for_the_collector(make, count, compile) for count in (12, 36))
    assert many <= few
