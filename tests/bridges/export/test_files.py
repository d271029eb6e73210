"""An exported file for itself: what it needs, what it refuses, and that tools take it."""

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import chainrule
from bounds import gamma
from chainrule import TorchBridge, chains
from chainrule.bridges.export import CannotExport, export
from chainrule.bridges.export.dtypes import dtypes_of
from chainrule.cli import main
from exported import (
    SHAPES,
    assert_same,
    check_style,
    exported,
    load,
    parameters,
    step,
    without_kernel,
)

BLOCKED = """
import sys
for name in ("jax", "jaxlib", "optax", "numpy", "chainrule"):
    sys.modules[name] = None
import importlib.util, torch
spec = importlib.util.spec_from_file_location("exported", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
optimizer = module.Stam(model.parameters(), lr=0.01)
x, y = torch.randn(32, 6), torch.randn(32, 3)
losses = []
for _ in range(30):
    optimizer.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.9 * losses[0], losses
"""


@pytest.fixture(scope="module")
def stam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(
        chains.stam(3e-4), [torch.float32], tmp_path_factory.mktemp("stam") / "stam.py", "Stam"
    )


def test_a_file_trains_where_neither_jax_nor_chainrule_can_be_imported(stam: Path) -> None:
    """Other chains, and compiled steps: `test_compiled.py`."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(stam)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow  # because it needs both
def test_ruff_and_pyright_find_nothing(stam: Path) -> None:
    check_style(stam)


def test_the_file_says_what_it_is(stam: Path) -> None:
    text, cls = stam.read_text(), load(stam).Stam
    assert text.startswith('"""Stam: STAM: Adam whose first-moment decay falls')
    assert f"chainrule {chainrule.__version__}" in text and "MIT" in text
    assert "mu = b1 mu + (1 - b1) g" in cls.__doc__
    assert cls([torch.nn.Parameter(torch.ones(2))]).param_groups[0]["lr"] == 3e-4


STAM, MUON = lambda: chains.stam(3e-4), lambda: chains.muon(3e-4)


@pytest.fixture(scope="module")
def muon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("muon") / "muon.py"
    with pytest.warns(UserWarning, match="by name"):
        return export(MUON(), "float32", path, "Muon")


@pytest.mark.parametrize(
    ("name", "make", "shapes"),
    [
        ("stam", STAM, SHAPES),
        pytest.param("muon", MUON, SHAPES, marks=pytest.mark.slow),
        pytest.param("muon", MUON, ((8, 4), (4, 6), (6, 6)), marks=pytest.mark.slow),
        pytest.param("muon", MUON, ((5,), (3,)), marks=pytest.mark.slow),
    ],
    ids=["stam", "muon", "muon of matrices", "muon of vectors"],
)
def test_states_go_to_the_bridge_and_back(
    name: str,
    make: Any,
    shapes: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_kernel(monkeypatch)
    cls = getattr(load(request.getfixturevalue(name)), name.capitalize())
    ours, bridge = cls(parameters(shapes)), TorchBridge(make(), parameters(shapes))
    for index in range(3):
        step(ours, index)
        step(bridge, index)
    to_bridge = TorchBridge(make(), copy.deepcopy(ours.param_groups[0]["params"]))
    to_bridge.load_state_dict(ours.state_dict())
    to_ours = cls(copy.deepcopy(bridge.param_groups[0]["params"]))
    to_ours.load_state_dict(bridge.state_dict())
    for optimizer in (ours, bridge, to_bridge, to_ours):
        optimizer.param_groups[0]["lr"] = 0.1
        step(optimizer, 3)
    for optimizer in (bridge, to_bridge, to_ours):
        assert_same(ours, optimizer)


def test_copies_and_pickles_go_on(stam: Path) -> None:
    ours = load(stam).Stam(parameters())
    step(ours, 0)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        other.load_state_dict(torch.load(file, weights_only=True))
        file.seek(0)
        step(other, 1)
        mirror = copy.deepcopy(ours)
        step(mirror, 1)
        assert_same(other, mirror)


def test_groups_schedulers_and_missing_gradients(
    stam: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernel(monkeypatch)
    cls = load(stam).Stam
    pairs = []
    for make in (cls, lambda groups: TorchBridge(chains.stam(3e-4), groups)):
        params = parameters()
        params[2].requires_grad_(False)
        groups = [{"params": params[:4], "lr": 0.1}, {"params": params[4:], "weight_decay": 0.5}]
        optimizer = make(groups)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for index in range(4):
            step(optimizer, index)
            if index == 1:
                params[2].requires_grad_(True)
            for p in params:
                p.grad = None if index == 2 and p is params[0] else p.grad
            optimizer.step()
            scheduler.step()
        pairs.append(optimizer)
    assert_same(*pairs)


def test_sums_over_parts_are_those_over_the_whole(stam: Path) -> None:
    module, n = load(stam), 1000
    mu, grad = (torch.randn(n, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    module._PART = 64
    found = module._total(
        module._measure_0_of_0(*own, own[0].shape) for own in module._parts(mu, grad)
    )
    difference = (mu.double() - grad.double()).numpy()
    for total, exact in zip(found, (abs(difference).sum(), (difference**2).sum()), strict=True):
        # Three roundings of each entry, and a sum of n in any order.
        assert abs(float(total) - exact) <= gamma(n + 2) * exact


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"b2": 1.5}, ValueError, r"`b2` must be in \[0, 1\), got 1.5"),
        ({"lr": "fast"}, TypeError, "`lr` must be a number"),
        ({"momentum": 0.9}, ValueError, "`momentum` is no hyperparameter"),
        ({"maximize": True}, ValueError, "`maximize` cannot be True"),
    ],
)
def test_a_wrong_key_is_refused(
    keys: dict[str, Any], error: type[Exception], message: str, stam: Path
) -> None:
    with pytest.raises(error, match=message):
        load(stam).Stam(parameters(), **keys)


def test_what_a_file_was_not_exported_for_is_refused(stam: Path) -> None:
    cls = load(stam).Stam
    with pytest.raises(ValueError, match=r"torch.float64 \(2,\) is none of those"):
        cls([torch.nn.Parameter(torch.ones(2, dtype=torch.float64))])
    with pytest.raises(TypeError, match="expected a real floating-point"):
        cls([torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))])


def test_a_wrong_state_dict_changes_nothing(stam: Path) -> None:
    cls = load(stam).Stam
    ours, other = cls(parameters()), cls(parameters())
    for index in range(2):
        step(ours, index)
        step(other, index)
    saved = copy.deepcopy(ours.state_dict())
    for spoil, message in (
        (lambda s: s["state"][1].pop("nu"), "state entry `nu` is NoneType"),
        (lambda s: s["state"][1].update(nu=torch.ones(3)), r"`nu` is \(3,\), expected \(8, 4\)"),
        (lambda s: s["state"][1].update(other=torch.ones(3)), "`other` is none of this chain's"),
        (lambda s: s["param_groups"][0].pop("b2"), "has no `b2`"),
        (lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
        (lambda s: s["param_groups"].append({}), "different number of parameter groups"),
    ):
        wrong = copy.deepcopy(saved)
        spoil(wrong)
        with pytest.raises(ValueError, match=message):
            ours.load_state_dict(wrong)
        assert_same(ours, other)


@pytest.mark.parametrize(
    ("chain", "message"),
    [
        (lambda: optax.lbfgs(), "evaluates the loss by itself"),
        (lambda: chains.cosmic(), "tiers"),
        pytest.param(
            lambda: optax.apply_if_finite(optax.sgd(0.1), 2),
            "apply_if_finite|branch",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_written(
    chain: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CannotExport, match=message):
        export(chain(), [torch.float32], tmp_path / "exported.py")
    assert not list(tmp_path.iterdir())


def test_a_chain_that_goes_by_names_says_that_its_file_does_not(tmp_path: Path) -> None:
    routed = optax.partition(
        {"sgd": optax.sgd(0.5), "none": optax.sgd(0.0)},
        lambda params: (
            {name: "none" if name == "embedding" else "sgd" for name in params}
            if isinstance(params, dict)
            else ["sgd"] * len(params)
        ),
    )
    with pytest.warns(UserWarning, match="by shape alone"):
        path = export(routed, [torch.float32], tmp_path / "routed.py")
    assert "by shape alone" in path.read_text()


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2).to(torch.bfloat16)


@pytest.mark.parametrize(
    ("params", "dtypes"),
    [
        ({"w": jnp.ones(2), "v": np.ones(2, np.float64)}, ["float32", "float64"]),
        ({"dense": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}}, ["bfloat16"]),
        ([torch.ones(2), torch.ones(2, dtype=torch.float16)], ["float16", "float32"]),
        (_Model(), ["bfloat16"]),
        (_Model().named_parameters(), ["bfloat16"]),
        (_Model().parameters(), ["bfloat16"]),
        (dict(_Model().named_parameters()), ["bfloat16"]),
        (torch.float32, ["float32"]),
        (jnp.float32, ["float32"]),
        ([np.dtype("float32"), "float16"], ["float16", "float32"]),
    ],
)
def test_the_dtypes_of_any_tree_of_parameters_are_found(params: Any, dtypes: list[str]) -> None:
    assert dtypes_of(params) == dtypes


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"a": {"w": np.ones(2, np.int32)}}, TypeError, r"`params`, 'a.w', is int32; expected"),
        ({"w": 1.0}, TypeError, r"`params`, 'w', is 1.0; expected arrays, tensors or dtypes"),
        ("flaot32", TypeError, "`params` is 'flaot32'; expected"),
        ([torch.ones(1, dtype=torch.complex64)], TypeError, "'0', is complex64; .* bfloat16,"),
        ([("w", torch.ones(1, dtype=torch.int64))], TypeError, "'w', is int64"),
        ({}, ValueError, "`params` is empty"),
        (iter(()), ValueError, "`params` is empty"),
    ],
)
def test_what_holds_no_parameters_is_refused(
    params: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export(optax.sgd(0.1), params, tmp_path / "exported.py")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "path", "error", "message"),
    [
        ("class", "exported.py", ValueError, "must be the name of a class, got 'class'"),
        ("1st", "exported.py", ValueError, "must be the name of a class, got '1st'"),
        ("Sgd", "missing/exported.py", FileNotFoundError, "`path` is in .*missing, which is no"),
    ],
)
def test_a_wrong_name_or_place_is_refused_before_any_work(
    name: str, path: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export(optax.sgd(0.1), "float32", tmp_path / path, name)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "sgd.py"
    assert main(["export", "optax.sgd(0.5)", "-o", str(path), "--name", "Sgd"]) == 0
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    weight.grad = torch.ones(2)
    load(path).Sgd([weight]).step()
    assert weight.tolist() == [0.5, -2.5]
    assert main(["export", "os.system('true')", "-o", str(path)]) == 2
    assert "none of chainrule, chains, optax, transforms" in capsys.readouterr().err


@pytest.mark.slow
def test_a_half_precision_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_kernel(monkeypatch)
    chain = chains.adam(0.01)
    cls = exported(chain, tmp_path, [torch.bfloat16, torch.float32])
    ours = cls(parameters(SHAPES, torch.bfloat16))
    bridge = TorchBridge(chain, parameters(SHAPES, torch.bfloat16))
    for index in range(3):
        step(ours, index)
        step(bridge, index)
        assert_same(ours, bridge)


def test_a_pair_of_betas_counts_in_the_constructor_too(tmp_path: Path) -> None:
    cls = exported(optax.inject_hyperparams(optax.adam)(1e-3, b1=0.9, b2=0.999), tmp_path)
    for given in ({"betas": (0.5, 0.75)}, {"b1": 0.5, "b2": 0.75}):
        (group,) = cls(parameters(), **given).param_groups
        assert (group["b1"], group["b2"], group["betas"]) == (0.5, 0.75, (0.5, 0.75))
