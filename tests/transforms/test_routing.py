"""Which leaf goes where, why, and the plan that says so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from chainrule.transforms import HIDDEN_MATRICES, Routing

TREE = {
    "blocks": [{"Bias_table": jnp.ones((3, 3)), "kernel": jnp.ones((3, 4)), "scale": jnp.ones(3)}],
    "embedding": {"table": jnp.ones((9, 4))},
    "head": {"kernel": jnp.ones((4, 9))},
    "stack": jnp.ones((2, 3, 4)),
}


def labels(routing, tree=TREE):
    return {r.path: r.label for r in routing.plan(tree).routes}


def reasons(routing, tree=TREE):
    return {r.path: r.reason for r in routing.plan(tree).routes}


def test_the_default():
    assert labels(HIDDEN_MATRICES) == {
        "blocks/0/Bias_table": "adam",
        "blocks/0/kernel": "muon",
        "blocks/0/scale": "adam",
        "embedding/table": "adam",
        "head/kernel": "muon",
        "stack": "muon",
    }
    assert reasons(HIDDEN_MATRICES)["blocks/0/Bias_table"] == "'bias' in the path"
    assert reasons(HIDDEN_MATRICES)["blocks/0/scale"] == "fewer than two axes"


def test_a_tree_of_labels_for_partition():
    assert jax.tree.structure(HIDDEN_MATRICES(TREE)) == jax.tree.structure(TREE)
    assert HIDDEN_MATRICES(TREE)["stack"] == "muon"


def test_patterns_are_searched_in_the_path_and_mind_the_case():
    routing = Routing(exclude=["^head", r"0/kernel$"])
    assert labels(routing)["head/kernel"] == "adam"
    assert reasons(routing)["blocks/0/kernel"] == "excluded"
    assert labels(routing)["stack"] == "muon"
    with pytest.raises(ValueError, match=r"pattern 'Head' matches none of the leaves .*'stack'"):
        labels(Routing(exclude="Head"))


def test_exclude_may_be_a_function_or_a_tree():
    assert labels(Routing(exclude=lambda path, leaf: leaf.ndim > 2))["stack"] == "adam"
    chosen = {"blocks": False, "embedding": False, "head": True, "stack": False}
    assert labels(Routing(exclude=chosen))["head/kernel"] == "adam"


def test_words_may_occur_nowhere():
    assert labels(Routing(words=("bias",)))["embedding/table"] == "muon"
    assert labels(Routing(words=("gamma",)))["blocks/0/Bias_table"] == "muon"


def test_labels_come_first_and_none_leaves_it_to_the_rules():
    given = {"blocks": None, "embedding": "muon", "head": "adam", "stack": None}
    for routing in (Routing(labels=given), Routing(labels=lambda tree: given)):
        assert labels(routing)["embedding/table"] == "muon"
        assert reasons(routing)["head/kernel"] == "labelled"
        assert labels(routing)["blocks/0/kernel"] == "muon"
        assert labels(routing)["blocks/0/scale"] == "adam"
    with pytest.raises(ValueError, match=r"`labels` must be 'muon', 'adam' or None, got 'sgd'"):
        labels(Routing(labels={**given, "stack": "sgd"}))


def test_holes_masked_leaves_and_tuples():
    tree = ({"a": None, "b": optax.MaskedNode(), "c": jnp.ones((2, 2))}, (jnp.ones(2),))
    assert labels(HIDDEN_MATRICES, tree) == {"0/c": "muon", "1/0": "adam"}
    assert labels(Routing(labels=("adam", None)), tree) == {"0/c": "adam", "1/0": "adam"}
    assert jax.tree.structure(HIDDEN_MATRICES(tree)) == jax.tree.structure(tree)


def test_the_plan_prints_every_leaf_with_its_route_and_reason():
    lines = str(Routing(exclude="^head").plan(TREE)).splitlines()
    assert lines[0].split() == ["leaf", "shape", "route", "reason"]
    assert len(lines) == 1 + len(jax.tree.leaves(TREE))
    assert "head/kernel          (4, 9)     adam   excluded" in lines
    assert "(the tree)" in str(HIDDEN_MATRICES.plan(np.ones((2, 2))))
