"""Bad input to `TorchBridge`: the error names it, and parameters and state stay as they are."""

import copy
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
from torch import nn

import bounds
import chainrule
from chainrule import TorchBridge, chains
from chainrule.bridges.lowering import UnsupportedPrimitive
from chainrule.bridges.step.settled import NeedsLossFunction, StateChanges

PARAMS = {"w": (3, 2), "b": (2,)}


def tensors() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in PARAMS.items()}


def with_grads(params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    for p in params.values():
        p.grad = torch.ones_like(p)
    return params


def assert_untouched(bridge: TorchBridge, act: Any, error: type[Exception], match: str) -> None:
    """`act` raises, and neither parameters nor state nor groups have changed."""
    params = [p for group in bridge.param_groups for p in group["params"]]
    before = copy.deepcopy(([p.detach() for p in params], bridge.state_dict()["state"]))
    groups = copy.deepcopy(bridge.state_dict()["param_groups"])
    with pytest.raises(error, match=match):
        act()
    after = ([p.detach() for p in params], bridge.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert bridge.state_dict()["param_groups"] == groups


# ---- construction --------------------------------------------------------------------------


def test_an_empty_list() -> None:
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        TorchBridge(chains.adam(), [])


def test_a_generator_consumed_twice() -> None:
    params = (p for p in tensors().values())
    TorchBridge(chains.adam(), params)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        TorchBridge(chains.adam(), params)


def test_one_tensor_is_no_list() -> None:
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        TorchBridge(chains.adam(), nn.Parameter(torch.ones(2)))


def test_a_set_has_no_order() -> None:
    with pytest.raises(TypeError, match="ordered collections"):
        TorchBridge(chains.adam(), [{"params": set(tensors().values())}])


def test_no_tensor() -> None:
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        TorchBridge(chains.adam(), [jnp.ones(3)])


def test_a_parameter_in_two_groups() -> None:
    p = tensors()["w"]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        TorchBridge(chains.adam(), [{"params": [p]}, {"params": [p]}])


def test_a_parameter_twice_in_a_group() -> None:
    p = tensors()["w"]
    with pytest.raises(ValueError, match="twice in one parameter group"):
        TorchBridge(chains.adam(), [p, p])


def test_parameters_that_overlap_in_memory() -> None:
    memory = torch.arange(6.0)
    apart = [torch.nn.Parameter(memory[:3]), torch.nn.Parameter(memory[3:])]
    TorchBridge(optax.sgd(1.0), apart)
    with pytest.raises(ValueError, match=r"parameters 1 and 2 overlap in memory.*clone one"):
        TorchBridge(optax.sgd(1.0), [*apart, torch.nn.Parameter(memory[4:])])


def test_a_name_twice() -> None:
    a, b = tensors().values()
    with pytest.raises(ValueError, match="have the same name"):
        TorchBridge(chains.adam(), [("w", a), ("w", b)])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_parameters_that_are_no_real_numbers(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=dtype.is_complex)
    with pytest.raises(TypeError, match=rf"parameter 0 is {dtype}"):
        TorchBridge(chains.adam(), [p])


def test_no_chain() -> None:
    with pytest.raises(TypeError, match=r"expected a gradient transformation .* got int"):
        TorchBridge(3, tensors().values())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"engine": "tpu"}, "`engine` must be one of 'torch', 'xla', got 'tpu'"),
        ({"rounding": "up"}, "`rounding` must be one of None, 'stochastic', got 'up'"),
        ({"engine": "xla", "compile": True}, '`compile` is for engine="torch"'),
        ({"lrr": 0.1}, "`lrr` is no live hyperparameter of this chain; they are .*'lr'"),
        ({"lr": -1.0}, r"param group 0: `learning_rate` must be in \[0, inf\), got -1.0"),
        ({"betas": (0.9, 1.5)}, r"`b2` must be in \[0, 1\), got 1.5"),
    ],
)
def test_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TorchBridge(chains.adam(), tensors().values(), **options)


def test_an_override_that_the_chain_cannot_follow() -> None:
    group = {"params": tensors().values(), "weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"`weight_decay` is no live hyperparameter.*inject_hyper"):
        TorchBridge(optax.adamw(0.1), [group])


FLAGS = ("foreach", "fused", "maximize", "capturable", "amsgrad")


def test_flags_of_torch_that_ask_for_nothing() -> None:
    params = with_grads(tensors())
    off: dict[str, Any] = dict.fromkeys(FLAGS, False)
    groups = [{"params": [params["w"]], **off}, {"params": [params["b"]], "fused": None}]
    bridge = TorchBridge(chains.adam(), groups, **off)
    bridge.step()
    assert all(group[flag] is False for group in bridge.param_groups[:1] for flag in FLAGS)
    bridge.load_state_dict(bridge.state_dict())


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_torch_that_ask_for_more(flag: str) -> None:
    with pytest.raises(ValueError, match=f"group 0: `{flag}` cannot be True in a bridge; .+"):
        TorchBridge(chains.adam(), tensors().values(), **{flag: True})
    bridge = TorchBridge(chains.adam(), with_grads(tensors()).values())
    saved = copy.deepcopy(bridge.state_dict())
    saved["param_groups"][0][flag] = True
    message = f"`{flag}` cannot be True"
    assert_untouched(bridge, lambda: bridge.load_state_dict(saved), ValueError, message)
    bridge.param_groups[0][flag] = True
    assert_untouched(bridge, bridge.step, ValueError, message)


def test_hyperparameters_that_half_precision_rounds_out_of_bounds() -> None:
    params = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    message = (
        r"`b2` must be in \[0, 1\), got 1.0. .*bfloat16, where 0.999 is 1.*hyperparam_dtype=jnp"
    )
    with pytest.raises(ValueError, match=message):
        TorchBridge(optax.inject_hyperparams(optax.adamw)(1e-3), params)
    bridge = TorchBridge(optax.inject_hyperparams(optax.adamw)(1e-3, b2=0.9), params)
    bridge.param_groups[0]["b2"] = 0.999
    params[0].grad = torch.ones_like(params[0])
    assert_untouched(bridge, bridge.step, ValueError, message)
    chain = optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)(1e-3)
    TorchBridge(chain, params).step()


def test_parameters_without_a_shape() -> None:
    with pytest.raises(ValueError, match="parameter 0 has no shape yet; run the model once"):
        TorchBridge(chains.adam(), nn.LazyLinear(3).parameters())


def test_parameters_of_inference_mode() -> None:
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"parameter 0 was made in torch.inference_mode.*outside"):
        TorchBridge(chains.adam(), [p])


def test_a_chain_that_evaluates_the_loss() -> None:
    with pytest.raises(NeedsLossFunction, match=r"asks for `value_fn`.*linesearch=None"):
        TorchBridge(optax.lbfgs(), tensors().values())


def _growing(shape_of: Any) -> optax.GradientTransformation:
    def update(updates, state, params=None):
        return updates, {"trail": jnp.zeros(shape_of(state["trail"]))}

    return optax.GradientTransformation(lambda params: {"trail": jnp.zeros(1)}, update)


def test_a_chain_whose_state_changes_shape() -> None:
    chain = _growing(lambda trail: trail.shape[0] + 1)
    with pytest.raises(StateChanges, match=r"shape of `trail` in its state from \(1,\) to \(2,\)"):
        TorchBridge(chain, tensors().values())


def test_a_chain_whose_updates_have_another_shape() -> None:
    def update(updates, state, params=None):
        return {name: u[None] for name, u in updates.items()}, state

    chain = optax.GradientTransformation(lambda params: (), update)
    with pytest.raises(
        StateChanges, match=r"shape of `b` in its parameters from \(2,\) to \(1, 2\)"
    ):
        TorchBridge(chain, tensors().items())


def test_a_primitive_without_a_lowering_runs_in_xla() -> None:
    def update(updates, state, params=None):
        return jax.tree.map(lambda g: jax.lax.igamma(0 * g + 1, g), updates), state

    chain = optax.GradientTransformation(lambda params: (), update)
    params = with_grads(tensors())
    with pytest.raises(UnsupportedPrimitive, match=r'`igamma`.*engine="xla"'):
        TorchBridge(chain, params.values())
    bridge = TorchBridge(chain, params.values(), engine="xla")
    bridge.step()
    want = torch.full((3, 2), 2 - math.exp(-1))  # igamma(1, x) = 1 - e^-x
    torch.testing.assert_close(params["w"].detach(), want, rtol=bounds.FUNCTION, atol=0)


# ---- add_param_group -----------------------------------------------------------------------


def test_a_refused_group_is_not_added() -> None:
    params = tensors()
    bridge = TorchBridge(chains.adam(), [params["w"]])
    with pytest.raises(ValueError, match="`momentum` is no live hyperparameter"):
        bridge.add_param_group({"params": [params["b"]], "momentum": 0.9})
    assert len(bridge.param_groups) == 1 and params["b"] not in bridge.state
    with pytest.raises(TypeError, match="param_group must be a dict"):
        bridge.add_param_group([params["b"]])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="with names"):
        bridge.add_param_group({"params": [("b", params["b"])]})
    bridge.add_param_group({"params": [params["b"]]})


def test_an_empty_group_is_allowed_as_in_torch() -> None:
    params = with_grads(tensors())
    bridge = TorchBridge(chains.adam(0.5), [{"params": params.values()}, {"params": []}])
    assert bridge.param_groups[1]["lr"] == 0.5
    bridge.step()
    bridge.load_state_dict(bridge.state_dict())


# ---- a step --------------------------------------------------------------------------------


def test_sparse_gradients() -> None:
    params = with_grads(tensors())
    bridge = TorchBridge(chains.adam(), params.items())
    params["w"].grad = torch.ones(3, 2).to_sparse()
    message = "does not support sparse gradients, got one for parameter w"
    assert_untouched(bridge, bridge.step, RuntimeError, message)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.9 refuses the assignment itself"
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.int32])
def test_gradients_of_another_dtype(dtype: torch.dtype) -> None:
    params = with_grads(tensors())
    bridge = TorchBridge(chains.adam(), params.items())
    params["w"].grad_dtype = None
    params["w"].grad = torch.ones(3, 2).to(dtype)
    message = f"gradient of parameter w is {dtype}, the parameter torch.float32"
    assert_untouched(bridge, bridge.step, RuntimeError, message)


@pytest.mark.parametrize(
    ("key", "value", "error", "match"),
    [
        ("lr", -0.1, ValueError, r"param group 1: `learning_rate` must be in \[0, inf\), got -0.1"),
        ("b1", 1.0, ValueError, r"param group 1: `b1` must be in \[0, 1\), got 1.0"),
        ("eps", "small", TypeError, "param group 1: `eps` must be a number or a tensor"),
    ],
)
def test_values_of_the_second_group_leave_the_first_untouched(
    key: str, value: Any, error: type[Exception], match: str
) -> None:
    params = with_grads(tensors())
    bridge = TorchBridge(chains.adam(), [{"params": [p]} for p in params.values()])
    bridge.param_groups[1][key] = value
    before = [p.detach().clone() for p in params.values()]
    with pytest.raises(error, match=match):
        bridge.step()
    torch.testing.assert_close([p.detach() for p in params.values()], before, rtol=0, atol=0)
    counts = [v for state in bridge.state.values() for k, v in state.items() if "count" in k]
    assert counts and not any(int(v) for v in counts)


def test_a_loss_that_is_no_scalar() -> None:
    bridge = TorchBridge(optax.polyak_sgd(), with_grads(tensors()).values())
    message = r"must return a scalar loss, got shape \(2,\)"
    assert_untouched(bridge, lambda: bridge.step(lambda: torch.ones(2)), ValueError, message)


def test_a_parameter_that_changed_its_dtype() -> None:
    params = with_grads(tensors())
    bridge = TorchBridge(chains.adam(), params.items())
    bridge.step()
    params["w"].data = params["w"].data.bfloat16()
    with_grads(params)
    message = r"parameter w was torch.float32 \(3, 2\) when .* is torch.bfloat16 \(3, 2\) now"
    assert_untouched(bridge, bridge.step, RuntimeError, message)


def test_a_parameter_that_changed_its_shape() -> None:
    params = with_grads(tensors())
    bridge = TorchBridge(optax.sgd(0.1), params.items(), compile=True)
    bridge.step()
    params["w"].data = torch.ones(4, 2)
    with_grads(params)
    message = r"parameter w was torch.float32 \(3, 2\) when .* is torch.float32 \(4, 2\) now"
    assert_untouched(bridge, bridge.step, RuntimeError, message)


@pytest.mark.parametrize("entry", [torch.ones(3, 2).double(), torch.ones(1)])
def test_a_state_entry_that_was_replaced_by_another_kind(entry: torch.Tensor) -> None:
    params = with_grads(tensors())
    bridge = TorchBridge(chains.adam(), params.items())
    bridge.step()
    bridge.state[params["w"]]["mu"] = entry
    message = r"state entry `mu` is .*, expected torch.float32 \(3, 2\) on cpu"
    assert_untouched(bridge, bridge.step, RuntimeError, message)


def test_a_group_that_lost_a_hyperparameter() -> None:
    params = with_grads(tensors())
    bridge = TorchBridge(chains.adam(), params.items())
    del bridge.param_groups[0]["lr"]
    assert_untouched(bridge, bridge.step, ValueError, "param group 0 has no `lr` any more")


@pytest.mark.parametrize("betas", [0.9, None, (0.9, 0.99, 0.999)])
def test_betas_that_are_no_pair(betas: Any) -> None:
    with pytest.raises(ValueError, match=r"`betas` must be a pair \(b1, b2\), got"):
        TorchBridge(chains.adam(), tensors().values(), betas=betas)
    bridge = TorchBridge(chains.adam(), with_grads(tensors()).values())
    bridge.param_groups[0]["betas"] = betas
    with pytest.raises(ValueError, match=r"`betas` must be a pair \(b1, b2\), got"):
        bridge.step()


def test_a_loss_that_is_no_number() -> None:
    bridge = TorchBridge(optax.polyak_sgd(), with_grads(tensors()).values())
    message = "must return a scalar loss, got str"
    assert_untouched(bridge, lambda: bridge.step(lambda: "loss"), TypeError, message)


# ---- state dicts ---------------------------------------------------------------------------


def _drop(state: Any) -> None:
    del state["state"][1]["mu"]


def _add(state: Any) -> None:
    state["state"][1]["momentum_buffer"] = torch.ones(2)


def _reshape(state: Any) -> None:
    state["state"][1]["nu"] = torch.ones(4)


def _count(state: Any) -> None:
    state["state"][0]["count"] = torch.tensor(1.0)


def _group(state: Any) -> None:
    del state["param_groups"][0]["b2"]


def _groups(state: Any) -> None:
    state["param_groups"].append(state["param_groups"][0])


def _size(state: Any) -> None:
    state["param_groups"][0]["params"].append(7)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_drop, "parameter b has no state entry `mu`; is it of another chain"),
        (_add, "state entry `momentum_buffer` of parameter b is none of this chain's: .*mu, nu"),
        (_reshape, r"`nu` of parameter b is torch.float32 \(4,\), expected torch.float32 \(2,\)"),
        (_count, r"`count` of parameter w is torch.float32 \(\), expected torch.int32 \(\)"),
        (_group, "param group 0 of the loaded state dict has no `b2`"),
        (_groups, "different number of parameter groups"),
        (_size, "doesn't match the size of optimizer's group"),
    ],
)
def test_a_state_dict_that_does_not_fit(spoil: Any, match: str) -> None:
    bridge = TorchBridge(chains.adam(0.1), with_grads(tensors()).items())
    bridge.step()
    state = copy.deepcopy(bridge.state_dict())
    spoil(state)
    assert_untouched(bridge, lambda: bridge.load_state_dict(state), ValueError, match)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda s: s.pop("state"), "state dict has no `state`; its keys are .'param_groups'."),
        (lambda s: s.pop("param_groups"), "state dict has no `param_groups`; its keys"),
        (lambda s: s.update(param_groups=None), "`param_groups` is a NoneType"),
        (lambda s: s["param_groups"][0].pop("params"), "its param group 0 has no list `params`"),
        (lambda s: s["state"].update({0: [1]}), "the state of parameter 0 is a list, expected a d"),
        (lambda s: s["state"].pop(0), "parameter 0 has no state entry `count`"),
        (lambda s: s["state"].pop(1), "parameter 1 has no state entry `.*mu`"),
        (lambda s: s["state"][1].update({"mu": "gone"}), "`mu` of parameter 1 is a str, expected"),
        (lambda s: s["state"][0].update(tiers="all"), "`tiers` is a str, expected a vector of int"),
    ],
)
def test_a_state_dict_that_is_incomplete(spoil: Any, match: str) -> None:
    bridge = TorchBridge(chains.adam(0.1), with_grads(tensors()).values())
    bridge.step()
    state = copy.deepcopy(bridge.state_dict())
    spoil(state)
    assert_untouched(bridge, lambda: bridge.load_state_dict(state), ValueError, match)


def test_no_state_dict() -> None:
    bridge = TorchBridge(chains.adam(0.1), tensors().values())
    with pytest.raises(TypeError, match="must be a dict, as `state_dict"):
        bridge.load_state_dict(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="load_torch_adam: the state dict has no `state`"):
        bridge.load_torch_adam({})


@pytest.mark.parametrize(
    ("tiers", "match"),
    [
        (torch.tensor([7, 7]), r"one of \[0, 1, 2\] for each of 2 tensors, got \[7, 7\]"),
        (torch.tensor([0]), r"one of \[0, 1, 2\] for each of 2 tensors, got \[0\]"),
    ],
)
def test_tiers_that_the_chain_has_not(tiers: torch.Tensor, match: str) -> None:
    bridge = TorchBridge(chains.cosmic(0.1), with_grads(tensors()).values())
    state = copy.deepcopy(bridge.state_dict())
    state["state"][0]["tiers"] = tiers
    assert_untouched(bridge, lambda: bridge.load_state_dict(state), ValueError, match)
    plain = TorchBridge(chains.adam(0.1), tensors().values())
    state = copy.deepcopy(plain.state_dict())
    state["state"][0]["tiers"] = tiers
    message = "has tiers, this chain has none"
    assert_untouched(plain, lambda: plain.load_state_dict(state), ValueError, message)


def test_the_state_dict_of_another_chain() -> None:
    params = tensors()
    bridge = TorchBridge(optax.adam(0.1), params.items())
    others = {
        "no state entry `count`": torch.optim.SGD(params.values(), lr=0.1),
        "`trace`": TorchBridge(optax.sgd(0.1, momentum=0.9), params.items()),
        "`exp_avg": torch.optim.Adam(params.values()),
    }
    for p in with_grads(params).values():
        others["`exp_avg"].state[p] = {"exp_avg": torch.ones_like(p)}
    for name, other in others.items():
        state = copy.deepcopy(other.state_dict())
        assert_untouched(
            bridge, lambda state=state: bridge.load_state_dict(state), ValueError, name
        )


def test_errors_are_exported_with_the_bridge() -> None:
    assert chainrule.TorchBridge is TorchBridge
    assert issubclass(NeedsLossFunction, TypeError) and issubclass(StateChanges, TypeError)
