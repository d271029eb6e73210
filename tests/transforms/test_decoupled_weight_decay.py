"""`optax.add_decayed_weights` as an optional link, and the two links that end an optimizer."""

import jax
import jax.numpy as jnp
import optax
import pytest

from chainrule.transforms import decay_and_rate, decoupled_weight_decay
from harness import assert_close, assert_identical, random_tree
from registry import TREE

PARAMS, GRADS = random_tree(TREE, 0), random_tree(TREE, 1)
KERNELS = {"dense": {"bias": False, "kernel": True}, "scale": False}


@pytest.mark.parametrize(
    "mask", [None, KERNELS, lambda params: KERNELS], ids=["none", "tree", "function"]
)
def test_it_is_the_link_of_optax(mask):
    ours, theirs = decoupled_weight_decay(0.1, mask), optax.add_decayed_weights(0.1, mask)
    state = ours.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(theirs.init(PARAMS))
    assert_identical(
        ours.update(GRADS, state, PARAMS)[0], theirs.update(GRADS, theirs.init(PARAMS), PARAMS)[0]
    )


def test_none_is_no_link():
    tx = decoupled_weight_decay(None)
    assert_identical(tx.update(GRADS, tx.init(PARAMS)), (GRADS, optax.EmptyState()))


def test_missing_parameters_have_two_remedies():
    tx = decoupled_weight_decay(0.1)
    with pytest.raises(ValueError, match=r"update\(updates, state, params\).*weight_decay=None"):
        tx.update(GRADS, tx.init(PARAMS))


def test_updates_keep_their_dtype():
    tx = decoupled_weight_decay(0.1)
    half = jax.tree.map(lambda g: g.astype(jnp.bfloat16), GRADS)
    updates, _ = tx.update(half, tx.init(PARAMS), PARAMS)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_decay_and_rate_are_the_two_links():
    tx = decay_and_rate(0.5, weight_decay=0.1, mask=KERNELS)
    links = optax.chain(optax.add_decayed_weights(0.1, KERNELS), optax.scale_by_learning_rate(0.5))
    assert_close(
        tx.update(GRADS, tx.init(PARAMS), PARAMS)[0],
        links.update(GRADS, links.init(PARAMS), PARAMS)[0],
    )
