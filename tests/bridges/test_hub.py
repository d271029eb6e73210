"""`convert_state`: ten steps in one library, converted, ten in the other, beside twenty in the other alone.

Epsilons are so small that it does not matter where they stand; everything else about a state is converted exactly, so
what remains are roundings of two ways to compute the same update. Keras' own files are in tests/bridges/keras.
"""

import copy
import re
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import bounds
from chainrule import chains, convert_state
from chainrule.bridges.hub.layouts import permutation
from chainrule.cli import main
from hub_torch import RunInTorch

RATE = 0.01
EPS = 1e-30
STEPS = 10


def shapes(form: str) -> dict[str, tuple[int, ...]]:
    if form.endswith("muon"):
        return {"a.weight": (4, 3), "b.weight": (3, 5)}
    if form.endswith("adafactor"):  # optax factors from 128 on
        return {"a.weight": (130, 129), "a.bias": (130,), "b.weight": (128, 131), "c.weight": (1,)}
    return {"b.weight": (4, 3), "b.bias": (4,), "a.weight": (2, 4)}  # not in the order of JAX


def start(form: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {k: random.normal(size=s).astype(np.float32) for k, s in shapes(form).items()}


def gradient(form: str, step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(step + 1)
    return {k: random.normal(size=s).astype(np.float32) for k, s in shapes(form).items()}


class Lion(torch.optim.Optimizer):
    """That of lion-pytorch, from the paper: sign(b1 mu + (1 - b1) g); its state is `exp_avg` alone."""

    def __init__(self, params: Any):
        super().__init__(params, {"lr": RATE, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        (group,) = self.param_groups
        b1, b2 = group["betas"]
        for p in group["params"]:
            mu = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.sub_(group["lr"] * torch.sign(b1 * mu + (1 - b1) * p.grad))
            mu.copy_(b2 * mu + (1 - b2) * p.grad)


class InTorch(RunInTorch):
    MAKE: ClassVar[dict[str, Any]] = {
        "torch.adam": lambda p: torch.optim.Adam(p, RATE, eps=EPS),
        "torch.adamw": lambda p: torch.optim.AdamW(p, RATE, eps=EPS, weight_decay=0.1),
        "torch.radam": lambda p: torch.optim.RAdam(p, RATE, eps=EPS),
        "torch.nadam": lambda p: torch.optim.NAdam(p, RATE, eps=EPS),
        "torch.adamax": lambda p: torch.optim.Adamax(p, RATE, eps=EPS),
        "lion_pytorch.lion": Lion,
        "torch.sgd": lambda p: torch.optim.SGD(p, RATE, momentum=0.9),
        "torch.rmsprop": lambda p: torch.optim.RMSprop(p, RATE, alpha=0.9, eps=EPS, momentum=0.9),
        "torch.rmsprop, centered": lambda p: torch.optim.RMSprop(p, RATE, alpha=0.9, eps=1e-8, centered=True),
        "torch.adafactor": lambda p: torch.optim.Adafactor(p, RATE, eps=(EPS, 1e-3), weight_decay=0.0),
        "torch.muon": lambda p: torch.optim.Muon(p, RATE, weight_decay=0.0),
    }  # fmt: skip


class InOptax:
    MAKE: ClassVar[dict[str, Any]] = {
        "optax.adam": lambda: optax.adam(RATE, eps=EPS),
        "optax.adamw": lambda: optax.adamw(RATE, eps=EPS, weight_decay=0.1),
        "optax.radam": lambda: optax.radam(RATE, eps=EPS),
        "optax.adam of ours": lambda: chains.adam(RATE, eps=EPS),
        "optax.nadam": lambda: optax.nadam(RATE, eps=EPS),
        "optax.adamax": lambda: optax.adamax(RATE, eps=EPS),
        "optax.lion": lambda: optax.lion(RATE, weight_decay=0.0),
        "optax.sgd": lambda: optax.sgd(RATE, momentum=0.9),
        "optax.rmsprop": lambda: optax.rmsprop(RATE, 0.9, eps=EPS, eps_in_sqrt=False, momentum=0.9),
        "optax.rmsprop, centered": lambda: optax.rmsprop(RATE, 0.9, eps=1e-8, eps_in_sqrt=False, centered=True),
        "optax.adafactor": lambda: optax.adafactor(RATE, eps=EPS),
        "optax.muon": lambda: chains.muon(RATE, preset="torch", weight_decay=0.0),
    }  # fmt: skip

    def __init__(self, form: str, params: dict[str, np.ndarray]):
        self.params: Any = {k: jnp.asarray(p) for k, p in params.items()}
        self.tx = self.MAKE[form]()
        self.state = self.tx.init(self.params)

    def step(self, grads: dict[str, np.ndarray]) -> None:
        updates, self.state = self.tx.update(
            {k: jnp.asarray(g) for k, g in grads.items()}, self.state, self.params
        )
        self.params = optax.apply_updates(self.params, updates)

    def values(self) -> dict[str, np.ndarray]:
        return {k: np.asarray(p) for k, p in self.params.items()}

    @property
    def like(self) -> Any:
        return self.state


def made(form: str, params: dict[str, np.ndarray]) -> Any:
    return (InOptax if form.startswith("optax") else InTorch)(form, params)


def plain(form: str) -> str:
    return form.partition(",")[0].partition(" ")[0]


PAIRS = [
    ("torch.adam", "optax.adam"),
    ("torch.adam", "optax.adam of ours"),
    ("torch.adamw", "optax.adamw"),
    ("torch.radam", "optax.radam"),
    ("torch.nadam", "optax.nadam"),
    ("torch.adamax", "optax.adamax"),
    ("lion_pytorch.lion", "optax.lion"),
    ("torch.sgd", "optax.sgd"),
    ("torch.rmsprop", "optax.rmsprop"),
    ("torch.rmsprop, centered", "optax.rmsprop, centered"),
    ("torch.adafactor", "optax.adafactor"),
    ("torch.muon", "optax.muon"),
]
BOTH = [pair for one, other in PAIRS for pair in ((one, other), (other, one))]


@pytest.mark.parametrize(("one", "other"), BOTH)
def test_a_run_goes_on_in_the_other_library(one: str, other: str) -> None:
    first, alone = made(one, start(one)), made(other, start(one))
    for step in range(STEPS):
        first.step(gradient(one, step))
        alone.step(gradient(one, step))
    # The decays of torch's NAdam grow, those of optax' do not: the averages are the same, the ten steps are not.
    reached = (alone if "nadam" in one else first).values()
    second = made(other, reached)
    before = copy.deepcopy(first.state)
    second.state = convert_state(
        first.state,
        plain(one),
        plain(other),
        start(one),
        like=second.like,
        learning_rate=RATE,
        count=STEPS,
    )
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool(np.all(np.asarray(a) == np.asarray(b))), before, first.state)
    )
    for step in range(STEPS, 2 * STEPS):
        second.step(gradient(one, step))
        alone.step(gradient(one, step))
    moved = max(np.abs(p - start(one)[name]).max() for name, p in alone.values().items())
    bound = 0.0
    for name, p in alone.values().items():
        # Averages of several steps in float32 on both sides, and what optax's bias corrections are off by. A mean over
        # a row or a column of Adafactor has as many terms as that.
        size = np.abs(p).max() + moved
        terms = bounds.summed(131) if "adafactor" in one else 0.0
        bound = size * (bounds.stepped(2 * STEPS) + terms) + bounds.of_adam(RATE, 2 * STEPS)
        if "muon" in one:  # the iteration is in bfloat16
            bound = bounds.RECORDED_BF16 * moved
        np.testing.assert_allclose(second.values()[name], p, rtol=0, atol=bound, err_msg=name)
    # Without the state the same ten steps end elsewhere: the comparison can fail.
    fresh = made(other, reached)
    for step in range(STEPS, 2 * STEPS):
        fresh.step(gradient(one, step))
    apart = 2 if "muon" in one else 10
    assert any(
        np.abs(fresh.values()[n] - p).max() > apart * bound for n, p in alone.values().items()
    )


def test_muon_keeps_the_average_of_its_matrices() -> None:
    params = start("torch.muon")
    ours = InTorch("torch.muon", params)
    for step in range(3):
        ours.step(gradient("torch.muon", step))
    tx = optax.contrib.muon(RATE)
    tree = {name: jnp.asarray(p) for name, p in params.items()}
    state = convert_state(ours.state, "torch.muon", "optax.muon", tree, count=3, like=tx.init(tree))
    mu = state.inner_states["muon"].inner_state[0].mu
    for name, p in ours.params.items():
        np.testing.assert_array_equal(mu[name], ours.optimizer.state[p]["momentum_buffer"])
    back = convert_state(
        state, "optax.muon", "torch.muon", tree, like=ours.optimizer, source=params
    )
    for (key, entry), (same, expected) in zip(
        back["state"].items(), ours.state["state"].items(), strict=True
    ):
        assert key == same and torch.equal(entry["momentum_buffer"], expected["momentum_buffer"])


@pytest.mark.parametrize("target", ["dense.kernel", "conv.kernel"])
def test_kernels_are_transposed(target: str) -> None:
    shape = {"dense.kernel": (3, 4), "conv.kernel": (5, 6, 3, 4)}[target]
    module = target.replace("kernel", "weight")
    weight = nn.Parameter(torch.zeros((4, 3, *shape[:-2])))
    optimizer = torch.optim.Adam([(module, weight)])
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    params = {target.partition(".")[0]: {"kernel": jnp.zeros(shape)}}
    state = convert_state(
        optimizer.state_dict(),
        "torch.adam",
        "optax.adam",
        params,
        source={module: weight},
        names={target: module},
    )
    mu = next(iter(state[0].mu.values()))["kernel"]
    exp_avg = optimizer.state[weight]["exp_avg"]
    expected = exp_avg.T if weight.ndim == 2 else exp_avg.permute(2, 3, 1, 0)
    np.testing.assert_array_equal(mu, expected)
    axes = permutation(module, target, len(shape), {})
    assert np.transpose(np.asarray(mu), axes).shape == tuple(weight.shape)


def adam_state() -> tuple[Any, dict[str, nn.Parameter]]:
    params = {"w": nn.Parameter(torch.ones(2, 3)), "b": nn.Parameter(torch.ones(2))}
    optimizer = torch.optim.Adam(params.values())
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict()), params


def broken(what: str) -> Any:
    state, params = adam_state()
    shapes = {name: np.zeros(p.shape) for name, p in params.items()}
    form, to = "torch.adam", "optax.adam"
    if what == "shape":
        state["state"][0]["exp_avg"] = torch.ones(3, 3)
    elif what == "steps":
        state["state"][0]["step"] = torch.tensor(7.0)
    elif what == "missing entry":
        del state["state"][1]["exp_avg_sq"]
    elif what == "truncated":
        del state["state"]
    elif what == "amsgrad":
        state["state"][0]["max_exp_avg_sq"] = torch.ones(2, 3)
    elif what == "name":
        shapes["v"] = shapes.pop("w")
    elif what == "form":
        form = "torch.adm"
    elif what == "family":
        to = "optax.lion"
    elif what == "codes":
        to = "bitsandbytes.adam8bit"
    elif what == "rate":
        form, to, state = "optax.adam", "torch.adam", optax.adam(1.0).init(shapes)
    return convert_state(state, form, to, shapes, source=params)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shape", r"mu of 'w' has shape \(3, 3\), which does not fit 'w' of shape \(2, 3\)"),
        ("steps", r"different numbers of steps, \[1, 7\]"),
        ("missing entry", "no `exp_avg_sq` of parameter b"),
        ("truncated", "has no `state`"),
        ("amsgrad", r"`max_exp_avg_sq` of torch.adam \(parameter w\) has no equal"),
        ("name", "no parameter 'v' for 'v'; it has w, b"),
        ("form", "no form 'torch.adm'; there are torch.adam,"),
        ("family", "torch.adam is of the family adam, optax.lion of lion"),
        ("codes", "nothing is written as bitsandbytes.adam8bit"),
        ("rate", "holds hyperparameters, which this state does not say"),
    ],
)  # fmt: skip
def test_what_has_no_equal_is_refused_by_name(what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        broken(what)


def test_the_codes_of_bitsandbytes_are_read() -> None:
    """As bitsandbytes 0.50 saves them: in codes with a table and a scale for 256 numbers, small tensors as they are."""
    table = torch.linspace(-1, 1, 256)
    codes = torch.arange(512, dtype=torch.int64).remainder(256).to(torch.uint8).reshape(2, 256)
    kept = {f"{name}{i}": x for i in (1, 2) for name, x in (("state", codes), ("qmap", table))}
    kept |= {f"absmax{i}": torch.tensor([2.0, 3.0]) * i for i in (1, 2)}
    small = {"state1": torch.ones(3), "state2": torch.full((3,), 2.0)}
    state = {
        "state": {
            i: {"step": 4, "__bnb_optimizer_quant_state__": x} for i, x in enumerate((kept, small))
        },
        "param_groups": [{"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.99)}],
    }
    params = {"w": np.zeros((2, 256)), "b": np.zeros(3)}
    new = convert_state(state, "bitsandbytes.adam8bit", "torch.adam", params)
    expected = table * torch.tensor([[2.0], [3.0]])
    torch.testing.assert_close(new["state"][0]["exp_avg"], expected, rtol=0, atol=0)
    torch.testing.assert_close(new["state"][0]["exp_avg_sq"], 2 * expected, rtol=0, atol=0)
    torch.testing.assert_close(new["state"][1]["exp_avg_sq"], small["state2"], rtol=0, atol=0)
    assert (new["state"][0]["step"], new["param_groups"][0]["betas"]) == (4.0, (0.9, 0.99))


def test_the_averages_of_heavyball_are_read() -> None:
    """HeavyBall 3 keeps them corrected for their bias, and the number of steps with the first parameter alone."""
    mean, square = torch.tensor([1.0, -2.0]), torch.tensor([3.0, 4.0])
    entry = {
        "update_by_adam_exp_avg_0": mean,
        "update_by_adam_exp_avg_sq_0": square,
        "is_initialized": {0},
    }
    state = {
        "state": {0: {0: {"step": torch.tensor(2), **entry}}, 1: {0: entry}},
        "param_groups": [{"params": [0, 1], "lr": 0.1, "betas": (0.5, 0.75)}],
    }
    params = {"w": np.zeros(2), "b": np.zeros(2)}
    new = convert_state(state, "heavyball.adamw", "optax.adamw", params)
    for name in params:
        np.testing.assert_array_equal(new[0].mu[name], 0.75 * mean)
        np.testing.assert_array_equal(new[0].nu[name], (1 - 0.75**2) * square)
    assert new[0].count == 2


# ---- the command ---------------------------------------------------------------------------


def convert(*arguments: Any) -> int:
    return main(["convert", *map(str, arguments)])


def test_the_command_converts_there_and_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state, params = adam_state()
    torch.save({"optimizer": state}, tmp_path / "run.pt")
    torch.save({name: p.detach() for name, p in params.items()}, tmp_path / "model.pt")
    there = ["--from", "torch.adamw", "--to", "optax.adamw", "--params", tmp_path / "model.pt"]
    assert (
        convert(tmp_path / "run.pt", "--key", "optimizer", *there, "-o", tmp_path / "state.npz")
        == 0
    )
    back = ["--from", "optax.adamw", "--to", "torch.adamw", "--params", tmp_path / "model.pt"]
    back += ["--learning-rate", "0.001"]
    assert convert(tmp_path / "state.npz", *back, "-o", tmp_path / "back.pt") == 0
    found = torch.load(tmp_path / "back.pt", weights_only=True)
    torch.testing.assert_close(found["state"], state["state"], rtol=0, atol=0)
    assert "for 2 parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("truncated", "run.pt: truncated, or no file of torch.save"),
        ("key", r"no entry 'optimiser'; it has \['optimizer'\]"),
        ("shape", r"which does not fit 'w' of shape \(3, 3\)"),
        ("form", "no form 'torch.adamq'"),
        ("suffix", r"written to a \.pt file if it is torch's, else to \.npz"),
        ("absent", "model.pt: no such file"),
    ],
)
def test_the_command_writes_nothing_unless_all_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, message: str
) -> None:
    state, params = adam_state()
    run, model, out = (tmp_path / name for name in ("run.pt", "model.pt", "state.npz"))
    torch.save({"optimizer": state}, run)
    weights = {name: p.detach() for name, p in params.items()}
    torch.save(weights | ({"w": torch.ones(3, 3)} if what == "shape" else {}), model)
    if what == "truncated":
        run.write_bytes(run.read_bytes()[:-100])
    if what == "absent":
        model.unlink()
    key = "optimiser" if what == "key" else "optimizer"
    form = "torch.adamq" if what == "form" else "torch.adam"
    out = tmp_path / "state.pt" if what == "suffix" else out
    before = sorted(tmp_path.iterdir())
    assert (
        convert(
            run, "--key", key, "--from", form, "--to", "optax.adam", "--params", model, "-o", out
        )
        == 1
    )
    assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before
