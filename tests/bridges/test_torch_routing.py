"""Muon's routing of torch models, by their modules."""

import pytest
import torch
from torch import nn

import chainrule
from chainrule import TorchBridge, chains


class Model(nn.Module):
    """What a name does not tell is told by the modules."""

    def __init__(self, tied=False, extra=0):
        super().__init__()
        self.lookup = nn.Embedding(50, 8)
        self.body = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.fan = nn.ModuleList([nn.Linear(8, 50) for _ in range(1 + extra)])
        if tied:
            self.fan[0].weight = self.lookup.weight


class WithGetters(nn.Module):
    """The interface of transformers, or of timm."""

    def __init__(self, getter):
        super().__init__()
        self.body, self.last = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 3))
        setattr(self, getter, lambda: self.last)


def to_muon(model):
    plan = chainrule.torch_routing(model).plan(dict(model.named_parameters()))
    assert len(plan.routes) == len(list(model.parameters()))
    return {route.path for route in plan.routes if route.label == "muon"}


BODY = {"body.0.weight", "body.1.weight"}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Model(), BODY),
        (Model(tied=True), BODY),
        (Model(extra=1), BODY | {"fan.0.weight", "fan.1.weight"}),  # which is the output?
        (WithGetters("get_output_embeddings"), {"body.weight"}),
        (WithGetters("get_classifier"), {"body.weight"}),
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(1)), {"0.weight"}),
        (nn.Sequential(nn.EmbeddingBag(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)), {"1.weight"}),
        (nn.Linear(3, 3), {"weight"}),
        (nn.ModuleDict({"wte": nn.Linear(2, 2), "mlp": nn.Linear(2, 2)}), {"mlp.weight"}),
    ],
    ids=["untied", "tied", "two outputs", "transformers", "timm", "mlp", "bag", "linear", "named"],
)
def test_what_goes_to_muon(model, expected):
    assert to_muon(model) == expected


def test_a_table_of_a_subclass_is_an_embedding():
    class ParallelEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(7, 3))

    model = nn.ModuleDict({"table": ParallelEmbedding(), "mlp": nn.Linear(2, 2)})
    assert to_muon(model) == {"mlp.weight"}


def adam_of(bridge, model):
    return {name for name, p in model.named_parameters() if "nu" in bridge.state[p]}


@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_a_bridge_routes_by_it(named):
    model = Model()
    params = model.named_parameters() if named else model.parameters()
    bridge = TorchBridge(chains.muon(routing=chainrule.torch_routing(model)), params)
    assert adam_of(bridge, model) == {n for n, _ in model.named_parameters()} - BODY


def test_groups_of_weights_and_vectors():
    model = Model()
    params = list(model.parameters())
    groups = [{"params": [p for p in params if (p.ndim > 1) == matrix]} for matrix in (True, False)]
    bridge = TorchBridge(chains.muon(routing=chainrule.torch_routing(model)), groups)
    assert adam_of(bridge, model) == {n for n, _ in model.named_parameters()} - BODY


@pytest.mark.parametrize(
    "name", ["embed.weight", "embed_tokens.weight", "wte.weight", "lm_head.weight"]
)
def test_embeddings_and_heads_of_named_models_are_not_orthogonalised(name):
    params = {name: nn.Parameter(torch.ones(6, 4)), "h.0.weight": nn.Parameter(torch.ones(4, 4))}
    bridge = TorchBridge(chains.muon(), params.items())
    assert "nu" in bridge.state[params[name]]
    assert "nu" not in bridge.state[params["h.0.weight"]]
