"""Chains as classes of torch: names, defaults and positions of torch, configurations, groups, pickles, Muon's plan."""

import ast
import copy
import importlib
import inspect
import io
import json
import logging
import pickle
import sys
import types
from typing import Any, NamedTuple

import optax
import pytest
import torch
from tests.bridges.stub import FILE, stub
from torch import nn

from chainrule import TorchBridge, TorchWrap, chains, torch_optimizers
from chainrule.bridges.torch_named import Named, NamedAround
from chainrule.transforms.routing import _log_once

CLASSES = [getattr(torch_optimizers, n) for n in torch_optimizers.__all__ if n[0].isupper()]
SGD = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))])
OF_CHAIN = {cls.chain_name: cls for cls in CLASSES}


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range = range(3)) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_same(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


def given(cls: type[Named], model: nn.Module) -> Any:
    return model if cls is torch_optimizers.Muon else model.named_parameters()


def test_every_chain_has_a_class() -> None:
    assert sorted(OF_CHAIN) == sorted(chains.__all__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_class_takes_the_chains_arguments(cls: type[Named]) -> None:
    parameters = inspect.signature(cls).parameters
    places = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert places == [n for n in ("params", "lr", "betas", "weight_decay") if n in parameters]
    assert {"params", "lr", "weight_decay", "compile", "engine", "rounding"} <= parameters.keys()
    paired = {"b1", "b2", "adam_b1", "adam_b2", "learning_rate", "beta", "b1_base", "rounding"}
    of_chain = inspect.signature(getattr(chains, cls.chain_name)).parameters
    left = of_chain.keys() - parameters.keys() - paired - {"inner", "routing", "decay_mask"}
    assert not left
    for name in parameters.keys() & of_chain.keys() - cls.defaults.keys() - {
        "weight_decay",
        "rounding",
    }:
        assert parameters[name].default == of_chain[name].default, name
    assert all(p.annotation is not p.empty for p in parameters.values())
    # What configuration tools read.
    assert list(inspect.signature(cls.__init__).parameters)[1:] == list(parameters)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_the_docstring_tells_every_argument(cls: type[Named]) -> None:
    text = inspect.getdoc(cls) or ""
    assert "| link | atom | equation |" in text and ">>>" in text
    for name in inspect.signature(cls).parameters:
        assert f"\n  {name}: " in text, name


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_class_steps_is_pickled_copied_and_resumed(cls: type[Named]) -> None:
    whole = net()
    train(whole, cls(given(cls, whole), lr=0.01), range(6))
    model = net()
    optimizer = cls(given(cls, model), lr=0.01)
    train(model, optimizer)
    pair, copied = pickle.loads(pickle.dumps((model, optimizer))), copy.deepcopy((model, optimizer))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    fresh = copy.deepcopy(model)
    resumed = cls(given(cls, fresh), lr=0.5)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for part, restored in (pair, copied, (fresh, resumed)):
        assert type(restored) is cls
        train(part, restored, range(3, 6))
        assert_same(part, whole)


@pytest.mark.parametrize(
    ("make", "chain"),
    [
        (lambda p: torch_optimizers.Stam(p, 0.01, (0.95, 0.99), 0.1, tau_decay=0.9),
         lambda: chains.stam(0.01, 0.95, 0.99, weight_decay=0.1, tau_decay=0.9)),
        (lambda p: torch_optimizers.Adam(p, lr=torch.tensor(0.25), mu_dtype=torch.bfloat16),
         lambda: chains.adam(0.25, mu_dtype="bfloat16")),
        (lambda p: torch_optimizers.Cosmic(p, preset="fast"), lambda: chains.cosmic(preset="fast")),
        (lambda p: torch_optimizers.Magma(p, 0.01, (0.8, 0.9), 0.1, mask_prob=0.7),
         lambda: chains.magma(chains.adam(0.01, 0.8, 0.9, weight_decay=0.1), mask_prob=0.7)),
        (lambda p: torch_optimizers.Grokfast(p, 0.01, base="stam_lite", base_arguments={"b1_base": 0.8}, lamb=3.0),
         lambda: chains.grokfast(chains.stam_lite(0.01, 0.8), lamb=3.0)),
        (lambda p: torch_optimizers.Orthograd(p, base="Grokfast", base_arguments={"base": "NAdam", "lr": 0.01}),
         lambda: chains.orthograd(chains.grokfast(chains.nadam(0.01)))),
        (lambda p: torch_optimizers.Grokfast(p, base={"factory": "optax:sgd", "arguments": {"learning_rate": 0.1}}),
         lambda: chains.grokfast(optax.sgd(0.1))),
        (lambda p: torch_optimizers.Magma(p, base=optax.adamw(0.1)), lambda: chains.magma(optax.adamw(0.1))),
    ],
)  # fmt: skip
def test_a_class_is_the_bridge_of_its_chain(make: Any, chain: Any) -> None:
    ours, theirs = net(), net()
    optimizer = make(ours.named_parameters())
    bridge = TorchBridge(chain(), theirs.named_parameters())
    keys = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    assert keys == {k: v for k, v in bridge.param_groups[0].items() if k != "params"}
    train(ours, optimizer)
    train(theirs, bridge)
    assert_same(ours, theirs)


@pytest.mark.parametrize("base", ["Stam", "Adam"])
def test_groups_may_have_torchs_names(base: str) -> None:
    first, second = ([p] for p in nn.Linear(2, 2).parameters())
    cls = getattr(torch_optimizers, base)
    optimizer = cls([{"params": first, "betas": (0.8, 0.95), "lr": 0.5}, {"params": second}])
    around = torch_optimizers.Grokfast([{"params": first, "betas": (0.8, 0.95)}], base=base)
    b1 = "b1_base" if base == "Stam" else "b1"
    for group in (optimizer.param_groups[0], around.param_groups[0]):
        assert (group[b1], group["b2"]) == (0.8, 0.95)
    assert (optimizer.param_groups[1][b1], optimizer.param_groups[1]["lr"]) == (0.9, 1e-3)
    muon = torch_optimizers.Muon(
        [{"params": first, "momentum": 0.5, "adam_betas": (0.7, 0.8)}], exclude=[]
    )
    assert [muon.param_groups[0][k] for k in ("beta", "adam_b1", "adam_b2")] == [0.5, 0.7, 0.8]


@pytest.mark.parametrize(
    ("name", "arguments", "error", "message"),
    [
        ("Stam", {"learning_rate": 0.1}, TypeError, "Stam: no argument `learning_rate`; did you mean `lr`"),
        ("Adam", {"b1": 0.9}, TypeError, "Adam: no argument `b1`; did you mean `betas`"),
        ("Muon", {"beta": 0.9}, TypeError, "did you mean `momentum`"),
        ("Magma", {"inner": 1}, TypeError, "Magma: no argument `inner`; did you mean `base`"),
        ("Adam", {"betas": 0.9}, ValueError, r"Adam: `betas` must be a pair"),
        ("Adam", {"betas": (0.9, 1.0)}, ValueError, r"`b2` must be in \[0, 1\)"),
        ("Adam", {"fused": True}, ValueError, "`fused` cannot be True"),
        ("Grokfast", {"base": SGD}, TypeError, "is the optimizer SGD; .*TorchWrap"),
        ("Grokfast", {"base": "Sgd"}, ValueError, "`base` must be one of Adam, .*got 'Sgd'"),
        ("Grokfast", {"lr": 0.1, "base": optax.sgd(0.1)}, TypeError, "`lr` cannot be given to a `base` that is"),
        ("Grokfast", {"lr": 0.1, "base_arguments": {"lr": 0.2}}, TypeError, "`lr` is given twice"),
        ("Grokfast", {"base_arguments": {"compile": True}}, TypeError, "give `compile` to Grokfast"),
        ("Grokfast", {"base_arguments": {"lrr": 0.2}}, TypeError, "Adam: no argument `lrr`; did you mean `lr`"),
        ("Muon", {}, ValueError, r"Muon: parameters without names .*`exclude=\[\]`"),
        ("Muon", {"model": nn.Linear(2, 2)}, ValueError, r"of shape \(2, 2\) is not in `model`"),
    ],
)  # fmt: skip
def test_bad_arguments(
    name: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(torch_optimizers, name)([nn.Parameter(torch.ones(2, 2))], **arguments)


def test_an_optimizer_is_no_list_of_parameters() -> None:
    with pytest.raises(TypeError, match=r"got the optimizer SGD; .*TorchWrap"):
        torch_optimizers.Grokfast(SGD)


# ---- Muon's plan ---------------------------------------------------------------------------


class Vision(nn.Module):
    """Names tell nothing of what is what."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Embedding(11, 4)
        self.b = nn.Conv2d(4, 6, 3)
        self.c = nn.Linear(6, 6)
        self.d = nn.Linear(6, 11, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.d


ADAM, MUON = "adam", "muon"
ROUTES = dict.fromkeys(("a.weight", "b.bias", "c.bias", "d.weight"), ADAM) | dict.fromkeys(
    ("b.weight", "c.weight"), MUON
)


@pytest.mark.parametrize("form", ["model", "parameters", "groups", "named groups"])
def test_muon_accounts_for_every_parameter(form: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Vision()
    halves = [
        [(n, p) for n, p in model.named_parameters() if (p.ndim > 1) is whole]
        for whole in (True, False)
    ]
    params: Any = {
        "model": lambda: model,
        "parameters": model.parameters,
        "groups": lambda: [{"params": [p for _, p in half], "lr": 0.1} for half in halves],
        "named groups": lambda: [{"params": half} for half in halves],
    }[form]()
    _log_once.cache_clear()
    with caplog.at_level(logging.INFO, "chainrule.routing"):
        optimizer = torch_optimizers.Muon(params, model=None if form == "model" else model)
    assert "go to Muon" in caplog.text
    plan = optimizer.plan()
    assert {route.path: route.label for route in plan.routes} == ROUTES
    assert str(plan) in optimizer.explain()
    train(model, optimizer)
    copied_model, copied = copy.deepcopy((model, optimizer))
    assert copied.plan() == pickle.loads(pickle.dumps(optimizer)).plan() == plan
    train(model, optimizer)
    train(copied_model, copied)
    assert_same(model, copied_model)


def test_muon_by_patterns_and_frozen_parameters() -> None:
    model = Vision()
    model.c.requires_grad_(False)
    optimizer = torch_optimizers.Muon(model, exclude=["^b"])
    routes = {route.path: route for route in optimizer.plan().routes}
    assert routes.keys() == ROUTES.keys()
    assert (routes["b.weight"].label, routes["c.weight"].label) == ("adam", "none")
    assert routes["c.weight"].reason.startswith("frozen")
    with pytest.raises(ValueError, match="pattern 'nothing' matches none"):
        torch_optimizers.Muon(model, exclude="nothing")


def test_muon_orthogonalises_a_convolution_as_one_matrix() -> None:
    """(out, in kh kw), scaled by sqrt(max(1, out / (in kh kw))): all singular values of the change become 1."""
    kernel = nn.Parameter(torch.zeros(6, 2, 2, 2))
    optimizer = torch_optimizers.Muon(
        [("conv", kernel)], lr=1.0, coefficients="classical", ns_steps=30
    )
    kernel.grad = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    values = torch.linalg.svdvals(kernel.detach().reshape(6, 8))
    # Newton-Schulz with these coefficients converges to 1 quadratically; the rest is float32's.
    torch.testing.assert_close(values, torch.ones(6), rtol=1e-5, atol=0)


# ---- configurations ------------------------------------------------------------------------


def instantiate(config: dict[str, Any], *args: Any) -> Any:
    """What torchtune's `config.instantiate` documents: the object at a dotted path, called with the other entries."""
    config = dict(config)
    module, _, name = config.pop("_component_").rpartition(".")
    return getattr(importlib.import_module(module), name)(*args, **config)


def test_a_component_of_a_json_file() -> None:
    text = """{"_component_": "chainrule.torch_optimizers.Grokfast", "lr": 0.01, "betas": [0.9, 0.95],
      "base": "casmo", "base_arguments": {"c_min": 0.2}, "compile": false}"""
    model = net()
    optimizer = instantiate(json.loads(text), model.parameters())
    assert type(optimizer) is torch_optimizers.Grokfast
    assert [optimizer.param_groups[0][k] for k in ("lr", "betas", "c_min")] == [
        0.01,
        (0.9, 0.95),
        0.2,
    ]
    train(model, optimizer)


class OptimInfo(NamedTuple):
    """As timm 1.0 documents it."""

    name: str
    opt_class: Any
    description: str = ""
    has_eps: bool = True
    has_momentum: bool = False
    has_betas: bool = False


class Registry:
    def __init__(self) -> None:
        self.known: dict[str, OptimInfo] = {}

    def register(self, info: OptimInfo) -> None:
        assert info.name not in self.known
        self.known[info.name] = info

    def list_optimizers(self) -> list[str]:
        return sorted(self.known)


def test_timms_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's documented contract; timm needs a torchvision of the same build as torch, so it is no requirement here."""
    registry = Registry()
    factory: Any = types.ModuleType("timm.optim._optim_factory")
    factory.OptimInfo, factory.default_registry = OptimInfo, registry
    optim: Any = types.ModuleType("timm.optim")
    optim._optim_factory = factory
    for name, module in {"timm": types.ModuleType("timm"), "timm.optim": optim}.items():
        monkeypatch.setitem(sys.modules, name, module)
    names = torch_optimizers.register_timm()
    assert names == torch_optimizers.register_timm()  # a second time is no error
    assert len(names) == len(CLASSES) and not any("_" in name for name in names)
    for name in names:
        info = registry.known[name]
        parameters = inspect.signature(info.opt_class).parameters
        assert (info.has_eps, info.has_betas) == ("eps" in parameters, "betas" in parameters)
        assert info.description and not info.has_momentum
    # What `create_optimizer_v2(model, opt=name, lr=..., weight_decay=...)` makes of it, with layer decay.
    for name, more in (("chainrule-stam", {}), ("chainrule-muon", {"exclude": []})):
        model = net()
        groups = [{"params": [p], "weight_decay": 0.1, "lr_scale": 0.5} for p in model.parameters()]
        optimizer = registry.known[name].opt_class(groups, weight_decay=0.0, lr=0.1, **more)
        assert [g["weight_decay"] for g in optimizer.param_groups] == 4 * [0.1] + [0.1]


def test_an_instance_belongs_around_a_chain_only() -> None:
    assert all(
        issubclass(cls, NamedAround) == ("base" in inspect.signature(cls).parameters)
        for cls in CLASSES
    )
    assert issubclass(torch_optimizers.Adam, TorchBridge) and not issubclass(TorchWrap, TorchBridge)


def test_the_types_are_those_of_the_signatures() -> None:
    message = "python -m tests.bridges.stub writes src/chainrule/torch_optimizers.pyi anew"
    assert ast.dump(ast.parse(FILE.read_text())) == ast.dump(ast.parse(stub())), message
