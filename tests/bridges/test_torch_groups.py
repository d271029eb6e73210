"""Parameter groups that others change by hand, as Accelerate, Fabric and FSDP do: followed, or refused."""

import copy
from typing import Any

import jax
import optax
import pytest
import torch
from torch import nn

import bounds
from chainrule import TorchBridge, chains

SHAPES = {"w": (4, 3), "b": (3,), "head": (2, 4)}
Params = dict[str, nn.Parameter]


def parameters() -> Params:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }


def twins(params: Params) -> Params:
    """Other tensors with the same values."""
    return {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}


def run(bridge: Any, params: Params, steps: range) -> None:
    for step in steps:
        for name, p in params.items():
            generator = torch.Generator().manual_seed(step + 100 * len(name))
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        bridge.step()


def assert_equal(one: Params, other: Params) -> None:
    for name, p in one.items():
        assert p.equal(other[name]), name


def entries(bridge: TorchBridge, params: Params) -> dict[str, dict[str, torch.Tensor]]:
    return {name: dict(bridge.state[p]) for name, p in params.items()}


def make(chain: Any, params: Params, named: bool, **settings: Any) -> TorchBridge:
    return TorchBridge(chain, params.items() if named else params.values(), **settings)


CHAINS: dict[str, Any] = {
    "adam": lambda: chains.adam(0.01),
    "magma": lambda: chains.magma(optax.adamw(0.01)),
    "cosmic": lambda: chains.cosmic(0.01, kernel="xla"),
}


# ---- other tensors -------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("name", CHAINS)
def test_other_tensors_go_on_with_the_state(
    name: str, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, params = parameters(), parameters()
    reference, bridge = (make(CHAINS[name](), p, named) for p in (whole, params))
    if name == "adam":  # no other trace; the others make programs later
        monkeypatch.setattr(jax, "make_jaxpr", None)
    for start in (0, 2, 4):  # before the first step, and later
        old, params = params, twins(params)
        bridge.param_groups[0]["params"] = list(params.values())
        for before, after in ((reference, whole), (bridge, params)):
            run(before, after, range(start, start + 2))
        assert_equal(params, whole)
        assert not any(p in bridge.state for p in old.values())
    assert bridge.state_dict()["state"].keys() <= set(range(len(params)))
    assert str(bridge.metrics()) == str(reference.metrics())
    monkeypatch.undo()
    copied, twin = copy.deepcopy((params, bridge))
    for before, after in ((reference, whole), (twin, copied)):
        run(before, after, range(6, 8))
    assert_equal(copied, whole)


def test_other_tensors_in_a_compiled_step() -> None:
    whole, params = parameters(), parameters()
    reference, bridge = (make(chains.adam(0.01), p, True, compile=True) for p in (whole, params))
    for start in (0, 2):
        for before, after in ((reference, whole), (bridge, params)):
            run(before, after, range(start, start + 2))
        params = twins(params)
        bridge.param_groups[0]["params"][:] = params.values()
    run(reference, whole, range(4, 6))
    run(bridge, params, range(4, 6))
    assert_equal(params, whole)


def test_entries_that_were_moved_along_are_kept() -> None:
    """FSDP utilities move `optimizer.state` themselves."""
    whole, params = parameters(), parameters()
    reference, bridge = (make(chains.adam(0.01), p, False) for p in (whole, params))
    run(reference, whole, range(3))
    run(bridge, params, range(3))
    bridge.state[params["b"]]["note"] = torch.ones(())
    new = twins(params)
    bridge.state[new["w"]] = bridge.state.pop(params["w"])
    bridge.param_groups[0]["params"] = list(new.values())
    run(reference, whole, range(3, 5))
    run(bridge, new, range(3, 5))
    assert_equal(new, whole)
    assert bridge.state[new["b"]]["note"] == 1


def test_names_tell_who_is_who() -> None:
    """In another order and with another name among them, which is dropped and joins."""
    whole, params = parameters(), parameters()
    reference, bridge = (make(chains.adam(0.01), p, True) for p in (whole, params))
    run(reference, whole, range(2))
    run(bridge, params, range(2))
    new = {name: twins(params)[name] for name in ("head", "w")}
    new["bias"] = params["b"] = nn.Parameter(torch.zeros(3))
    bridge.param_groups[0].update(params=list(new.values()), param_names=list(new))
    for step in range(2, 4):
        run(reference, whole, range(step, step + 1))
        run(bridge, new, range(step, step + 1))
    assert new["head"].equal(whole["head"]) and new["w"].equal(whole["w"])
    assert bridge.state_dict()["param_groups"][0]["param_names"] == ["head", "w", "bias"]
    assert len(bridge.state) == 3 and int(bridge.state[new["head"]]["count"]) == 4
    assert not bridge.state[new["bias"]]["mu"].equal(torch.zeros(3))


def test_other_dtypes_take_the_state_along() -> None:
    params = parameters()
    bridge = make(chains.adam(0.01), params, True)
    run(bridge, params, range(2))
    kept = {name: entry["mu"] for name, entry in entries(bridge, params).items()}
    new = {name: nn.Parameter(p.detach().bfloat16()) for name, p in params.items()}
    bridge.param_groups[0]["params"] = list(new.values())
    bridge.state_dict()
    for name, entry in entries(bridge, new).items():
        assert entry["mu"].equal(kept[name].to(entry["mu"].dtype))
    run(bridge, new, range(2, 3))
    assert all(p.dtype == torch.bfloat16 for p in new.values())


# ---- fewer and more ------------------------------------------------------------------------


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("gone", SHAPES)
def test_a_parameter_that_was_taken_out_goes_with_its_state(gone: str, named: bool) -> None:
    whole, params = parameters(), parameters()
    reference = torch.optim.AdamW(whole.values(), lr=0.01, weight_decay=0.0)
    bridge = make(chains.adam(0.01), params, named)
    run(reference, whole, range(2))
    run(bridge, params, range(2))
    index = list(params).index(gone)
    del bridge.param_groups[0]["params"][index], reference.param_groups[0]["params"][index]
    state = bridge.state_dict()
    assert sorted(state["state"]) == [0, 1] and params[gone] not in bridge.state
    if named:
        assert gone not in state["param_groups"][0]["param_names"]
    run(reference, whole, range(2, 5))
    run(bridge, params, range(2, 5))
    for name, p in params.items():
        torch.testing.assert_close(p, whole[name], rtol=0, atol=bounds.of_adam(0.01, 5))
    head = next(p for name, p in params.items() if name != gone)
    assert int(bridge.state[head]["count"]) == 5
    assert "2 parameters" in bridge.explain()
    left = {name: p for name, p in params.items() if name != gone}
    fresh = make(chains.adam(0.01), left, named)
    fresh.load_state_dict(bridge.state_dict())
    assert fresh.state[head]["mu"].equal(bridge.state[head]["mu"])


def test_all_are_taken_out() -> None:
    params = parameters()
    bridge = make(chains.adam(0.01), params, False)
    run(bridge, params, range(1))
    bridge.param_groups[0]["params"].clear()
    run(bridge, params, range(1, 2))
    assert not bridge.state and bridge.state_dict()["state"] == {}


def test_parameters_put_in_join_at_their_first_gradient() -> None:
    params = parameters()
    head = params.pop("head")
    bridge = make(chains.adam(0.01), params, False)
    run(bridge, params, range(2))
    before = head.detach().clone()
    bridge.param_groups[0]["params"].append(head)
    run(bridge, {**params, "head": head}, range(2, 3))
    assert not head.equal(before) and "mu" in bridge.state[head]
    assert int(bridge.state[params["w"]]["count"]) == 3


def test_a_group_that_was_popped_or_appended() -> None:
    whole, params = parameters(), parameters()
    groups = [
        {"params": [p], "lr": lr} for p, lr in zip(params.values(), (0.1, 0.2, 0.3), strict=True)
    ]
    theirs = [
        {"params": [p], "lr": lr} for p, lr in zip(whole.values(), (0.1, 0.2, 0.3), strict=True)
    ]
    bridge = TorchBridge(chains.adam(0.01), groups)
    reference = torch.optim.AdamW(theirs, weight_decay=0.0)
    run(reference, whole, range(2))
    run(bridge, params, range(2))
    reference.param_groups.pop(0)
    popped = bridge.param_groups.pop(0)
    run(reference, whole, range(2, 4))
    run(bridge, params, range(2, 4))
    assert len(bridge.metrics()) == 2 and len(bridge.state) == 2
    assert len(bridge.state_dict()["param_groups"]) == 2

    reference.state.pop(whole["w"])
    reference.param_groups.insert(
        1, {**reference.param_groups[0], "params": [whole["w"]], "lr": 0.5}
    )
    bridge.param_groups.insert(1, {"params": popped["params"], "lr": 0.5})
    state = bridge.state_dict()
    assert [g["lr"] for g in state["param_groups"]] == [0.2, 0.5, 0.3]
    run(reference, whole, range(4, 7))
    run(bridge, params, range(4, 7))
    for name, p in params.items():
        torch.testing.assert_close(p, whole[name], rtol=0, atol=bounds.of_adam(0.5, 7))
    assert int(bridge.state[params["w"]]["count"]) == 3
    assert "param group 2" in bridge.explain()


def test_dicts_that_were_made_again() -> None:
    whole, params = parameters(), parameters()
    reference, bridge = (make(chains.adam(0.01), p, True) for p in (whole, params))
    run(reference, whole, range(2))
    run(bridge, params, range(2))
    new = {**params, "b": nn.Parameter(params["b"].detach().clone())}
    bridge.param_groups = [{"params": list(new.values()), "param_names": list(new)}]
    run(reference, whole, range(2, 4))
    run(bridge, new, range(2, 4))
    assert_equal(new, whole)


# ---- what cannot be followed ---------------------------------------------------------------


def _replace_and_shorten(params: list[Any]) -> None:
    params[:] = [params[0], nn.Parameter(torch.zeros(3))]


def _reshape(params: list[Any]) -> None:
    params[1] = nn.Parameter(torch.zeros(4))


def _no_leaf(params: list[Any]) -> None:
    params[1] = params[1] * 2


def _twice(params: list[Any]) -> None:
    params[1] = params[0]


def _no_tensor(params: list[Any]) -> None:
    params[1] = 3


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (_replace_and_shorten, ValueError, "of its 3 parameters 1 are still there, with 1 others"),
        (_reshape, ValueError, r"parameter 1 was replaced by one of shape \(4,\).*\(3,\)"),
        (_no_leaf, ValueError, "can't optimize a non-leaf Tensor"),
        (_twice, ValueError, "appears twice in the parameter groups"),
        (_no_tensor, TypeError, "can only optimize Tensors"),
    ],
)
@pytest.mark.parametrize("call", ["step", "state_dict", "metrics", "explain", "jax_state"])
def test_what_cannot_be_followed_is_refused(
    change: Any, error: type[Exception], match: str, call: str
) -> None:
    params = parameters()
    bridge = make(chains.adam(0.01), params, False)
    run(bridge, params, range(2))
    before = copy.deepcopy((entries(bridge, params), list(params.values())))
    given = list(bridge.param_groups[0]["params"])
    change(bridge.param_groups[0]["params"])
    for _ in range(2):  # and again: nothing is half followed
        with pytest.raises(error, match=match):
            getattr(bridge, call)()
    torch.testing.assert_close(
        (entries(bridge, params), list(params.values())), before, rtol=0, atol=0
    )
    bridge.param_groups[0]["params"] = given
    run(bridge, params, range(2, 3))


def test_new_parameters_need_new_names() -> None:
    params = parameters()
    bridge = make(chains.adam(0.01), params, True)
    bridge.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="4 in all, but 3 names in `param_names`; change both"):
        bridge.step()


@pytest.mark.parametrize("name", ["flatten", "cosmic"])
def test_a_state_that_spans_its_parameters_lets_none_go_or_move(name: str) -> None:
    chain = optax.flatten(optax.adam(0.1)) if name == "flatten" else CHAINS["cosmic"]()
    params = {str(i): nn.Parameter(torch.ones(2)) for i in range(3)}
    bridge = make(chain, params, False)
    run(bridge, params, range(2))
    given = bridge.param_groups[0]["params"]
    for changed in (given[::-1], given[1:]):
        bridge.param_groups[0]["params"] = list(changed)
        with pytest.raises(ValueError, match=r"changed by hand: .* spans all parameters"):
            bridge.step()
    bridge.param_groups[0]["params"] = given
    run(bridge, params, range(2, 3))


@pytest.mark.parametrize("defaults", [{}, {"b1": 0.7}, {"betas": (0.7, 0.999)}])
def test_the_betas_of_one_group_are_not_another_groups_default(defaults: dict[str, Any]) -> None:
    """As in torch: a group that sets none has those of the optimizer."""
    first, second = list(parameters().values())[:2]
    groups = [{"params": [first], "betas": (0.8, 0.95)}, {"params": [second]}]
    bridge = TorchBridge(chains.adam(), groups, **defaults)
    expected = [(0.8, 0.95), (0.7 if defaults else 0.9, 0.999)]
    assert [group["betas"] for group in bridge.param_groups] == expected
    assert [(group["b1"], group["b2"]) for group in bridge.param_groups] == expected
