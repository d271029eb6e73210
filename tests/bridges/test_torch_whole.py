"""A step is whole, and the same in every mode: interrupts, autocast, `differentiable`, rates that are no rates."""

import copy
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from chainrule import TorchBridge, chains
from chainrule.bridges.lowering.backends.elements import Elements
from chainrule.bridges.lowering.backends.kernel import KernelCall
from chainrule.native import _kernel
from chainrule.transforms import TierPolicy
from exported import without_kernel

TORN = r"an earlier step was interrupted while it wrote.*load a checkpoint"


def parameters(shapes: Any = ((4, 3), (3,), (5, 2))) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def content(bridge: TorchBridge, params: list[nn.Parameter]) -> Any:
    state = {i: {k: v.clone() for k, v in bridge.state[p].items()} for i, p in enumerate(params)}
    return [p.detach().clone() for p in params], state


def equal(one: Any, other: Any) -> bool:
    try:
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


# ---- interrupts ----------------------------------------------------------------------------


class InterruptAt(TorchDispatchMode):
    """Raises `KeyboardInterrupt` in the place of the operation of that number."""

    def __init__(self, number: int):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("in_kernel", [False, True])
def test_a_step_that_is_interrupted_anywhere_is_whole_or_refuses_to_go_on(
    in_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each operation of torch; where the kernel does what they do, before each of its calls."""
    if in_kernel:
        run = Elements.__call__
        monkeypatch.setattr(Elements, "__call__", lambda *args: (torch.empty(0), run(*args)))
    else:
        without_kernel(monkeypatch)
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.1}]
    bridge = TorchBridge(chains.adam(0.01), groups)
    give_gradients(params, 0)
    bridge.step()
    values, state = [p.detach().clone() for p in params], copy.deepcopy(bridge.state_dict())
    before = content(bridge, params)
    give_gradients(params, 1)
    bridge.step()
    want = content(bridge, params)

    def restore() -> None:
        with torch.no_grad():
            for p, value in zip(params, values, strict=True):
                p.copy_(value)
        bridge.load_state_dict(state)

    refused, whole = 0, []
    for number in itertools.count():
        restore()
        try:
            with InterruptAt(number):
                bridge.step()
            break
        except KeyboardInterrupt:
            pass
        if bridge._torn:
            refused += 1
            copied = functools.partial(copy.deepcopy, bridge)
            for call in (bridge.step, bridge.state_dict, bridge.jax_state, copied):
                with pytest.raises(RuntimeError, match=TORN):
                    call()
            continue
        whole.append(equal(content(bridge, params), want))
        if not whole[-1]:  # nothing was written: the same step can be made again
            assert equal(content(bridge, params), before)
            bridge.step()
            assert equal(content(bridge, params), want)
    assert equal(content(bridge, params), want)
    assert refused > 0 and set(whole) == {False, True}


def test_a_torn_step_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    if _kernel is None:
        pytest.skip("the compiled kernel is not built here")
    params = parameters()
    bridge = TorchBridge(chains.cosmic(0.01), params)
    give_gradients(params, 0)
    bridge.step()
    values, state = copy.deepcopy(([p.detach() for p in params], bridge.state_dict()))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(KernelCall, "__call__", interrupt)
        with pytest.raises(KeyboardInterrupt):
            bridge.step()
    assert params[0].equal(values[0]) and int(bridge.state[params[0]]["count"]) == 2  # half a step
    with pytest.raises(RuntimeError, match=TORN):
        bridge.step()
    bridge.load_state_dict(state)
    bridge.step()
    assert int(bridge.state[params[0]]["count"]) == 2 and not params[0].equal(values[0])


def test_a_closure_that_is_not_called_by_a_torn_bridge() -> None:
    bridge = TorchBridge(chains.adam(0.01), parameters())
    bridge._torn = True
    with pytest.raises(RuntimeError, match=TORN):
        bridge.step(lambda: pytest.fail("the closure ran"))


def test_an_error_before_the_first_write_leaves_the_bridge_as_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A program that does not compile, at the first step of the second group."""
    params = parameters()
    bridge = TorchBridge(chains.adam(0.01), [{"params": params[:2]}, {"params": params[2:]}])
    give_gradients(params, 0)
    before = content(bridge, params)
    second: Any = bridge._groups[1].tree

    def fail() -> Any:
        raise RuntimeError("no compiler")

    with monkeypatch.context() as patch:
        patch.setattr(second.program.step, "_make", fail)
        with pytest.raises(RuntimeError, match="no compiler"):
            bridge.step()
    assert equal(content(bridge, params), before)
    bridge.step()
    assert not equal(content(bridge, params), before)


def compiles_for_vectors() -> optax.GradientTransformation:
    """Of a matrix it asks XLA for a foreign call that nobody registered."""

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        def halved(u: jax.Array) -> jax.Array:
            found = jax.ShapeDtypeStruct(u.shape, u.dtype)
            return 0.5 * u if u.ndim == 1 else jax.ffi.ffi_call("chainrule_no_such_call", found)(u)

        return jax.tree.map(halved, updates), {"count": state["count"] + 1}

    return optax.GradientTransformation(lambda _: {"count": jnp.zeros((), jnp.int32)}, update)


def test_a_step_that_xla_does_not_compile_leaves_the_bridge_as_it_was() -> None:
    vector, matrix = params = parameters(((3,), (2, 2)))
    bridge = TorchBridge(
        compiles_for_vectors(), [{"params": [vector]}, {"params": [matrix]}], engine="xla"
    )
    give_gradients(params, 0)
    before = content(bridge, params)
    for _ in range(2):  # the second is not told of an interrupted step
        with pytest.raises(RuntimeError, match="chainrule_no_such_call"):
            bridge.step()
        assert equal(content(bridge, params), before)
    matrix.grad = None
    bridge.step()
    want = before[0][0] + 0.5 * vector.grad
    assert vector.detach().equal(want) and int(bridge.state[vector]["count"]) == 1


def test_a_bad_hyperparameter_of_one_group_moves_no_parameter_of_another() -> None:
    policy = TierPolicy({2: 1.0}, reassignment_interval=1, warmup_steps=0)
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    bridge = TorchBridge(chains.cosmic(policy=policy), groups)
    give_gradients(params, 0)
    before = content(bridge, params)
    bridge.param_groups[1]["lr"] = -1.0
    with pytest.raises(ValueError, match="param group 1"):
        bridge.step()
    bridge.param_groups[1]["lr"] = bridge.param_groups[0]["lr"]
    torch.testing.assert_close(content(bridge, params), before, rtol=0, atol=0, equal_nan=True)
    bridge.step()
    assert set(bridge.state[params[0]]["tiers"].tolist()) == {2}


# ---- autocast ------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, True])
def test_autocast_around_a_step_changes_nothing(compile: bool) -> None:
    inside, outside = parameters([(6, 4)]), parameters([(6, 4)])
    bridges = []
    for params in (inside, outside):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=params is inside):
            chain = chains.adam(0.1) if compile else optax.contrib.muon(0.1)
            bridge = TorchBridge(chain, params, compile=compile)
            for step in range(2):
                give_gradients(params, step)
                bridge.step(lambda: torch.mm(torch.ones(2, 2), torch.ones(2, 2)).sum())
            bridges.append(bridge)
    assert inside[0].equal(outside[0])
    assert equal(content(bridges[0], inside)[1], content(bridges[1], outside)[1])


def test_the_closure_keeps_its_autocast() -> None:
    params = parameters()
    bridge = TorchBridge(chains.adam(0.01), params)
    give_gradients(params, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = bridge.step(lambda: torch.mm(torch.ones(2, 2), torch.ones(2, 2)))
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    assert loss.dtype == torch.bfloat16


# ---- differentiable ------------------------------------------------------------------------


def test_differentiable_steps_are_refused() -> None:
    params = parameters()
    with pytest.raises(ValueError, match=r"`differentiable` cannot be True.*run the chain in JAX"):
        TorchBridge(chains.adam(0.01), params, differentiable=True)
    with pytest.raises(ValueError, match="`differentiable` cannot be True"):
        TorchBridge(chains.adam(0.01), [{"params": params, "differentiable": True}])
    bridge = TorchBridge(chains.adam(0.01), params, differentiable=False)
    give_gradients(params, 0)
    bridge.param_groups[0]["differentiable"] = True
    with pytest.raises(ValueError, match="`differentiable` cannot be True"):
        bridge.step()


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_parameter_that_is_no_leaf_is_refused_as_in_torch(differentiable: bool) -> None:
    product = parameters()[0] * 2
    with pytest.raises(ValueError, match=r"non-leaf Tensor|`differentiable` cannot be True"):
        TorchBridge(chains.adam(0.01), [product], differentiable=differentiable)


# ---- rates ---------------------------------------------------------------------------------

BAD = [
    (torch.tensor(-0.1), r"`learning_rate` must be in \[0, inf\), got -0\.1"),
    (torch.tensor(float("nan")), "got nan"),
    (torch.ones(2), r"`lr` must be a number or a tensor of one element, got shape \(2,\)"),
    (torch.ones(0), r"got shape \(0,\)"),
]


@pytest.mark.parametrize(("rate", "match"), BAD)
@pytest.mark.parametrize("make", [chains.adam, optax.adamw, optax.inject_hyperparams(optax.adamw)])
def test_a_tensor_that_is_no_rate(make: Any, rate: torch.Tensor, match: str) -> None:
    params = parameters()
    with pytest.raises(ValueError, match=match):
        TorchBridge(make(0.01), params, lr=rate)
    bridge = TorchBridge(make(0.01), [{"params": params[:1]}, {"params": params[1:]}])
    give_gradients(params, 0)
    before = content(bridge, params)
    state = copy.deepcopy(bridge.state_dict())
    bridge.param_groups[1]["lr"] = rate
    with pytest.raises(ValueError, match=match):
        bridge.step()
    assert equal(content(bridge, params), before)
    bridge.param_groups[1]["lr"] = 0.01
    state["param_groups"][1]["lr"] = rate
    with pytest.raises(ValueError, match=match):
        bridge.load_state_dict(state)
    assert bridge.param_groups[1]["lr"] == 0.01


def test_a_tensor_is_a_rate() -> None:
    params, others = parameters(), parameters()
    for p, rate in ((params, torch.tensor([0.25])), (others, 0.25)):
        bridge = TorchBridge(chains.adam(0.01), p, lr=rate)
        give_gradients(p, 0)
        bridge.step()
    assert equal(params, others)


@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_a_saved_rate_that_is_none(rate: float) -> None:
    params = parameters()
    bridge = TorchBridge(chains.adam(0.01), params)
    state = copy.deepcopy(bridge.state_dict())
    state["param_groups"][0]["lr"] = rate
    with pytest.raises(
        ValueError, match=rf"loaded state dict: `learning_rate` must be .* got {rate}"
    ):
        bridge.load_state_dict(state)
    assert bridge.param_groups[0]["lr"] == 0.01


def test_a_rate_from_jax_that_is_none() -> None:
    bridge = TorchBridge(chains.adam(0.01), parameters())
    state = bridge.jax_state()
    rates = {**state.hyperparams, "learning_rate": jnp.float32(-1.0)}
    with pytest.raises(ValueError, match=r"load_jax_state: .*`learning_rate` must be in"):
        bridge.load_jax_state(state._replace(hyperparams=rates))
    assert bridge.param_groups[0]["lr"] == 0.01


def test_an_array_is_a_live_rate() -> None:
    params, others = parameters(), parameters()
    bridge = TorchBridge(chains.adam(jnp.asarray(0.25)), params)
    reference = TorchBridge(chains.adam(0.25), others)
    assert bridge.param_groups[0]["lr"] == 0.25
    for step, rate in enumerate((0.25, 0.125, 0.25)):
        for optimizer, own in ((bridge, params), (reference, others)):
            optimizer.param_groups[0]["lr"] = rate
            give_gradients(own, step)
            optimizer.step()
    assert equal(params, others)
    with pytest.raises(TypeError, match="`lr` must be a number or a tensor"):
        TorchBridge(chains.adam(), params, lr=jnp.asarray(0.1))
