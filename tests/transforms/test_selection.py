"""What arguments such as `exclude` may be, and what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from chainrule.transforms import Routing
from chainrule.transforms._selection import select

TREE = {"dense": {"bias": jnp.ones(3), "kernel": jnp.ones((4, 3))}, "scale": jnp.ones(())}


def chosen(selection, tree=TREE):
    """The paths that are selected."""
    flags = select("atom", "exclude", selection, tree)
    assert jax.tree.structure(flags) == jax.tree.structure(tree)
    names = ["dense/bias", "dense/kernel", "scale"] if tree is TREE else sorted(tree)
    return {name for name, flag in zip(names, jax.tree.leaves(flags), strict=True) if flag is True}


def is_vector(path, leaf):
    return leaf.ndim == 1


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (None, set()),
        ((), set()),
        (set(), set()),
        ("dense", {"dense/bias", "dense/kernel"}),
        (["bias$", "^scale"], {"dense/bias", "scale"}),
        ({"dense/bias", "scale"}, {"dense/bias", "scale"}),
        (frozenset({"scale"}), {"scale"}),
        (is_vector, {"dense/bias"}),
        ({"dense": True, "scale": False}, {"dense/bias", "dense/kernel"}),
        ({"dense": {"bias": np.bool_(1), "kernel": jnp.bool_(0)}, "scale": True}, {"dense/bias", "scale"}),
    ],
)  # fmt: skip
def test_what_is_selected(selection, expected):
    assert chosen(selection) == expected


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        ({"bias"}, ValueError, r"atom: `exclude` name 'bias' matches none of the leaves 'dense/b"),
        ({"scale", "gain"}, ValueError, r"name 'gain' matches none"),
        (lambda path, leaf: False, ValueError, r"function <lambda> matches none of the leaves"),
        (["scale", "gain"], ValueError, r"pattern 'gain' matches none of the leaves"),
        (3, TypeError, r"`exclude` must be a path pattern or several, .* got int$"),
        ({1, 2}, TypeError, r"is a set of names or of torch parameters, got int in it"),
        (["scale", 1], TypeError, r"got list with str in it"),
        ({"dense": 1.0, "scale": 0.0}, TypeError, r"got dict with float in it"),
        ([TREE["scale"]], TypeError, r"got list with ArrayImpl in it"),
        ({"scale": 1}.keys(), TypeError, r"got dict_keys$"),
        ((x for x in "ab"), TypeError, r"got generator$"),
        (torch.nn.Linear(1, 1), TypeError, r"`set\(module.parameters\(\)\)`.* got Linear$"),
        (torch.ones(2), TypeError, r"got Tensor$"),
        ({torch.ones(2, 3)}, TypeError, r"parameter of shape \(2, 3\).*outside a `TorchBridge`"),
    ],
)
def test_what_is_refused(selection, error, message):
    with pytest.raises(error, match=message):
        chosen(selection)


def test_of_an_array_the_path_is_asked_for():
    array = np.ones(2).view(type("Array", (np.ndarray,), {"__hash__": lambda self: 1}))
    with pytest.raises(TypeError, match=r"an array of JAX is another one after each update"):
        chosen(frozenset([array]))


def test_parameters_are_themselves_where_they_are_the_leaves():
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    tree = dict(net.named_parameters())
    assert chosen(set(net[1].parameters()), tree) == {"1.bias", "1.weight"}
    assert chosen([net[0].weight], tree) == {"0.weight"}


def test_a_tree_without_leaves_misses_nothing():
    for selection in ("gain", {"gain"}, lambda path, leaf: False):
        assert select("atom", "exclude", selection, {"a": None}) == {"a": None}


def test_routing_takes_sets():
    tree = {"hidden": jnp.ones((2, 2)), "last": jnp.ones((2, 2))}
    assert Routing(exclude={"last"})(tree) == {"hidden": "muon", "last": "adam"}
    with pytest.raises(ValueError, match=r"Routing: `exclude` name 'lost' matches none"):
        Routing(exclude={"lost"})(tree)
