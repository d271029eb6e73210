"""What the engines must agree on: dtypes, aliasing, layouts; and how the cost of tracing grows."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from torch import nn

import bounds
from chainrule import TorchBridge, chains
from chainrule.bridges.step.slots import slots
from chainrule.transforms import quantized_state

ENGINES = ("torch", "xla")


def keeps_parameters() -> optax.GradientTransformation:
    """Its state is the parameters before the step: an output that is another input unchanged."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda u: -0.5 * u, updates), {"before": params}

    return optax.GradientTransformation(lambda params: {"before": params}, update)


def steps(bridge: TorchBridge, params: list[nn.Parameter], count: int) -> None:
    for step in range(count):
        for p in params:
            p.grad = torch.cos(p.detach() + step)
        bridge.step()


@pytest.mark.parametrize("engine", ENGINES)
def test_an_input_handed_through_is_read_before_it_is_written(engine: str) -> None:
    p = nn.Parameter(torch.tensor([1.0, 2.0]))
    bridge = TorchBridge(keeps_parameters(), [p], engine=engine)
    for _ in range(3):
        before = p.detach().clone()
        p.grad = torch.ones(2)
        bridge.step()
        assert bridge.state[p]["before"].equal(before)
        assert p.detach().equal(before - 0.5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_stay_what_they_are(engine: str, dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 6, dtype=dtype))
    start = p.detach().clone()
    bridge = TorchBridge(chains.adam(0.01), [p], engine=engine)
    kinds = {name: value.dtype for name, value in bridge.state[p].items()}
    steps(bridge, [p], 3)
    assert p.dtype == dtype and not p.detach().equal(start) and p.isfinite().all()
    assert {name: value.dtype for name, value in bridge.state[p].items()} == kinds


def test_float64_is_not_narrowed() -> None:
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64)) for _ in range(2))
    bridge = TorchBridge(optax.adam(0.01), [ours])
    reference = torch.optim.Adam([theirs], lr=0.01)
    steps(bridge, [ours], 5)
    for step in range(5):
        theirs.grad = torch.cos(theirs.detach() + step)
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=bounds.gamma(12 * 5, "float64"))


@pytest.mark.parametrize(
    "chain", [lambda: optax.add_noise(0.1, 0.5, key=jax.random.key(1)), chains.stam]
)
def test_engines_agree_also_on_strided_parameters(chain: Any) -> None:
    ends = []
    for engine in ENGINES:
        p = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
        steps(TorchBridge(chain(), [p], engine=engine), [p], 4)
        assert p.stride() == (1, 4)
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=bounds.stepped(4), atol=bounds.stepped(4))


def test_a_live_learning_rate_inside_multi_steps_is_the_groups() -> None:
    p = nn.Parameter(torch.ones(2))
    chain = optax.MultiSteps(optax.inject_hyperparams(optax.sgd)(0.5), every_k_schedule=2)
    bridge = TorchBridge(chain, [p])
    assert bridge.param_groups[0]["lr"] == 0.5
    for lr, want in ((0.25, 1.0), (0.25, 0.75), (1.0, 0.75), (1.0, -0.25)):
        bridge.param_groups[0]["lr"] = lr
        p.grad = torch.ones(2)
        bridge.step()
        assert p.tolist() == [want, want]


def test_names_of_state_entries_are_unique() -> None:
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    chain = optax.chain(
        optax.scale_by_adam(), optax.ema(0.9), optax.trace(0.9), optax.scale_by_adam()
    )
    found = slots(chain.init(params), params)
    assert len(set(found)) == len(found)
    assert {slot.name for slot in found if slot.owner == 0} == {
        "0.mu",
        "0.nu",
        "ema",
        "trace",
        "3.mu",
        "3.nu",
    }
    assert {slot.name for slot in found if slot.owner is None} == {"0.count", "1.count", "3.count"}


def last_norms(count: int) -> optax.GradientTransformation:
    """Divides by the largest of the last norms, which its state holds as a list."""

    def update(updates, state, params=None):
        last = [*state["last"][1:], optax.tree.norm(updates)]
        size = jnp.stack(last).max()
        return jax.tree.map(lambda u: -u / size, updates), {"last": last}

    return optax.GradientTransformation(lambda _: {"last": [jnp.zeros(())] * count}, update)


def by_order(make: Any) -> optax.GradientTransformation:
    """A state that is a list made of the list of parameters, and of nothing else."""

    def update(updates, state, params=None):
        return jax.tree.map(jnp.negative, updates), state

    return optax.GradientTransformation(lambda params: {"own": make(params)}, update)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_list_of_the_chains_own_is_the_groups_whatever_its_length(count: int) -> None:
    params = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    bridge = TorchBridge(optax.chain(optax.trace(0.5), last_norms(count)), params)
    assert set(bridge.state[params[1]]) == {"trace"}
    for size in (3.0, 4.0):  # of the second parameter too the last norms go on without its gradient
        params[0].grad = torch.tensor([size, 0.0])
        bridge.step()
    last = [float(bridge.state[params[0]][f"last.{i}"]) for i in range(count)]
    assert last == [0.0, 3.0, 3.0 / 2 + 4.0][-count:]


@pytest.mark.parametrize(
    "chain",
    [
        optax.trace(0.9),
        optax.masked(optax.trace(0.9), [True, True]),
        optax.masked(optax.trace(0.9), lambda params: [True] * len(params)),
        by_order(lambda params: [jnp.zeros(()) for _ in params]),
        by_order(lambda params: [jnp.zeros(()) for _ in jax.tree.leaves(params)]),
        by_order(lambda params: jax.tree.map(lambda p: (jnp.zeros(3), p), params)),
        by_order(lambda params: [optax.tree.zeros_like(params)] * 2),
        chains.muon(0.1),
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        quantized_state(optax.trace(0.9)),
    ],
)
def test_a_list_that_is_made_of_the_parameters_is_theirs(chain: Any) -> None:
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 4))]
    bridge = TorchBridge(chain, params)
    second = set(bridge.state[params[1]])
    assert second and second <= set(bridge.state[params[0]])


def keeps(name: str, rounding: Any = None) -> Any:
    """A chain whose state has a field of that name, in a bridge with two parameters."""

    def update(updates, state, params=None):
        return jax.tree.map(jnp.negative, updates), {name: state[name] + 2}

    chain = optax.GradientTransformation(lambda _: {name: jnp.zeros((2,), jnp.int32)}, update)
    params = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2)]
    return params, TorchBridge(chain, params, rounding=rounding)


@pytest.mark.parametrize("name", ["rounding", "tiers"])
def test_a_field_with_the_name_of_an_entry_of_the_bridges_own(name: str) -> None:
    params, bridge = keeps(name, rounding="stochastic")
    steps(bridge, params, 1)
    params, bridge = copy.deepcopy((params, bridge))
    steps(bridge, params, 2)
    assert bridge.jax_state()[name].tolist() == [6, 6]
    assert bridge.state[params[0]]["rounding"][1] == 3  # seed and step
    state = bridge.state_dict()
    params, bridge = keeps(name, rounding="stochastic")
    bridge.load_state_dict(state)
    steps(bridge, params, 1)
    assert bridge.jax_state()[name].tolist() == [8, 8]
    assert bridge.state[params[0]]["rounding"][1] == 4


def test_a_field_called_rounding_has_its_name_where_the_bridge_keeps_none() -> None:
    params, bridge = keeps("rounding")
    steps(bridge, params, 1)
    assert bridge.state[params[0]]["rounding"].tolist() == [2, 2]


def test_a_partitioned_chain_keeps_each_part_with_its_parameter() -> None:
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
    bridge = TorchBridge(optax.contrib.muon(0.01), params)
    entries = [set(bridge.state[p]) for p in params]
    assert not any(name.endswith("nu") for name in entries[0])
    assert any(name.endswith("nu") for name in entries[1])
