"""State bytes against AdamW's on GPT-2 small's decoder (distilgpt2: 76 tensors, 82M); nothing is allocated."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

from chainrule import chains


def gpt_shapes():
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    shapes = [(50257, 768), (1024, 768), *block * 6, (768,), (768,)]
    return {f"{i:02d}": jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)}


def bytes_of(tx):
    state = jax.eval_shape(tx.init, gpt_shapes())
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


# What CASMO's calibration holds beside the moments: 500 samples and some scalars.
BUFFER = 4 * 500 + 64

LIMITS = [
    ("adam", chains.adam(), 1.001),
    ("nadam", chains.nadam(), 1.001),
    ("stam", chains.stam(), 1.001),
    ("stam_lite", chains.stam_lite(), 0.501),
    ("casmo", chains.casmo(), 1.001),
    ("casmo_snr", chains.casmo_snr(), 1.001),
    ("magma(adamw)", chains.magma(optax.adamw(1e-3)), 1.001),
    ("grokfast(stam_lite)", chains.grokfast(chains.stam_lite()), 1.001),
    ("orthograd(adamw)", chains.orthograd(optax.adamw(1e-3)), 1.001),
    ("muon", chains.muon(), 1.001),
    ("cosmic, all in the lowest tier", chains.cosmic(), 0.001),
]


def test_the_tree():
    shapes = jax.tree.leaves(gpt_shapes())
    assert len(shapes) == 76
    assert sum(math.prod(leaf.shape) for leaf in shapes) == 81_912_576


@pytest.mark.parametrize("tx", [pytest.param(tx, id=name) for name, tx, _ in LIMITS])
@pytest.mark.parametrize("leaves", [1, 3])
def test_more_entries_than_int32_can_count(tx, leaves):
    """In one tensor, and in all together."""
    side = 50_000 if leaves == 1 else 30_000
    assert leaves * side**2 > 2**31
    shapes = {str(i): jax.ShapeDtypeStruct((side, side), jnp.float32) for i in range(leaves)}
    state = jax.eval_shape(tx.init, shapes)
    updates, _ = jax.eval_shape(tx.update, shapes, state, shapes)
    assert jax.tree.leaves(updates)[0].shape == (side, side)


@pytest.mark.parametrize(("tx", "limit"), [pytest.param(*case[1:], id=case[0]) for case in LIMITS])
def test_state_bytes_against_adamw(tx, limit):
    assert bytes_of(tx) <= limit * bytes_of(optax.adamw(1e-3)) + BUFFER
