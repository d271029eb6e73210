"""Parameters of torch among a chain's arguments, as in the original Magma's `exclude=set(embedding.parameters())`."""

import copy
import functools
import io
import pickle

import optax
import pytest
import torch
from torch import nn

from chainrule import TorchBridge, chains
from chainrule.transforms import Routing


class Net(nn.Module):
    """An embedding, a hidden layer and an output layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.last = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5)


def magma(net, excluded):
    """Every update that is not excluded is dropped."""
    return chains.magma(optax.sgd(0.1), mask_prob=0.0, moment="own", exclude=excluded)


def step(bridge, params):
    for p in params:
        p.grad = torch.ones_like(p)
    bridge.step()


def moved(bridge, net):
    """The names of the parameters that a step changes."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    step(bridge, net.parameters())
    return {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}


EMBED, LAST = {"embed.weight"}, {"last.weight", "last.bias"}


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("kind", [set, list, frozenset])
def test_a_set_of_parameters_means_these(named, kind):
    net = Net()
    params = net.named_parameters() if named else net.parameters()
    bridge = TorchBridge(magma(net, kind(net.embed.parameters())), params)
    assert moved(bridge, net) == EMBED


def test_xla_knows_them_too():
    net = Net()
    bridge = TorchBridge(magma(net, set(net.last.parameters())), net.parameters(), engine="xla")
    assert moved(bridge, net) == LAST


def test_a_set_of_names_means_these():
    net = Net()
    bridge = TorchBridge(magma(net, {"last.weight", "last.bias"}), net.named_parameters())
    assert moved(bridge, net) == LAST


def test_routing_takes_parameters():
    net = Net()
    routing = Routing(exclude={net.hidden.weight})
    bridge = TorchBridge(chains.muon(routing=routing), net.parameters())
    assert "nu" in bridge.state[net.hidden.weight]  # Adam's
    routing = Routing(words=())
    bridge = TorchBridge(chains.muon(routing=routing), net.parameters())
    assert "nu" not in bridge.state[net.hidden.weight]


@pytest.mark.parametrize(
    "excluded", [lambda net: set(net.embed.parameters()), lambda net: "^embed", lambda net: EMBED,
                 lambda net: lambda path, leaf: "embed" in path],
    ids=["parameters", "pattern", "name", "function"],
)  # fmt: skip
def test_one_group_may_lack_what_another_has(excluded):
    net = Net()
    rest = [(n, p) for n, p in net.named_parameters() if n not in EMBED]
    groups = [{"params": rest}, {"params": [("embed.weight", net.embed.weight)]}]
    bridge = TorchBridge(magma(net, excluded(net)), groups)
    assert moved(bridge, net) == EMBED


@pytest.mark.parametrize(
    ("excluded", "message"),
    [
        ("gain", r"pattern 'gain' matches none of the leaves 'embed.weight', 'hidden.bias'"),
        ({"embed"}, r"name 'embed' matches none of the leaves"),
        (lambda path, leaf: False, r"function <lambda> matches none"),
        (set(Net().embed.parameters()), r"parameter of shape \(5, 4\) matches none of the leaves"),
    ],
    ids=["pattern", "name", "function", "parameters"],
)
def test_what_no_group_has_is_an_error(excluded, message):
    net = Net()
    with pytest.raises(ValueError, match=message):
        TorchBridge(magma(net, excluded), net.named_parameters())


def test_frozen_ones_may_be_nowhere_and_are_known_when_they_join():
    net = Net()
    net.embed.weight.requires_grad_(False)
    excluded = set(net.embed.parameters())
    TorchBridge(magma(net, excluded), [p for p in net.parameters() if p.requires_grad])
    bridge = TorchBridge(magma(net, excluded), net.parameters())
    net.embed.weight.requires_grad_(True)
    assert moved(bridge, net) == EMBED


def test_a_copy_of_a_bridge_means_its_own_parameters():
    net = Net()
    bridge = TorchBridge(magma(net, set(net.embed.parameters())), net.parameters())
    for _ in range(2):  # and a copy of the copy
        net, bridge = copy.deepcopy((net, bridge))
        assert moved(bridge, net) == EMBED


def test_parameters_that_were_replaced_are_still_meant():
    net = Net()
    bridge = TorchBridge(magma(net, set(net.embed.parameters())), net.parameters())
    for _ in range(2):
        net = copy.deepcopy(net)
        net.half()  # another dtype, so that the chain is traced again
        bridge.param_groups[0]["params"] = list(net.float().parameters())
        assert moved(bridge, net) == EMBED
    net, bridge = copy.deepcopy((net, bridge))
    assert moved(bridge, net) == EMBED


def make_magma(excluded):
    return chains.magma(optax.sgd(0.1), mask_prob=0.0, moment="own", exclude=excluded)


def test_a_pickled_bridge_means_its_own_parameters():
    net = Net()
    chain = functools.partial(make_magma, set(net.embed.parameters()))
    bridge = TorchBridge(chain, net.parameters())
    buffer = io.BytesIO()
    pickle.dump((net, bridge), buffer)
    buffer.seek(0)
    net, bridge = pickle.load(buffer)
    assert moved(bridge, net) == EMBED


def test_a_loaded_state_goes_on_excluding():
    net = Net()
    bridge = TorchBridge(magma(net, set(net.embed.parameters())), net.named_parameters())
    step(bridge, net.parameters())
    other = Net()
    fresh = TorchBridge(magma(other, set(other.embed.parameters())), other.parameters())
    fresh.load_state_dict(bridge.state_dict())  # in the tree it was made in: a dict by name
    assert moved(fresh, other) == EMBED
