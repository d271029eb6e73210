"""The primitive by which a state asks to lie as its parameter; how it then lies: `conformance/eight_devices.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

from chainrule import chains
from chainrule.bridges.flat_chain import FlatChain
from chainrule.transforms import grokfast_ma
from chainrule.transforms._sharding import alike

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
KEPT = {"adam": (chains.adam, 2), "stam": (chains.stam, 2), "grokfast_ma": (grokfast_ma, 1)}
"""Chains, and how many tensors of their state lie as each parameter."""


@pytest.mark.parametrize("name", KEPT)
def test_a_program_asks_for_the_layout_on_any_number_of_devices(name):
    make, count = KEPT[name]
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(make().init)(PARAMS).eqns]
    assert names.count("chainrule_alike") == count * len(PARAMS)


@pytest.mark.parametrize("make", [chains.adam, chains.stam, grokfast_ma])
def test_a_state_that_only_lies_as_its_parameters_can_be_made_before_they_have_values(make):
    """So a Keras model that is built when it first trains gets its state, on any number of devices."""
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in PARAMS.values()]
    assert not FlatChain(make(), list(PARAMS), structs).init_reads_values
    reads = optax.GradientTransformation(
        lambda p: jax.tree.map(jnp.sum, p), optax.identity().update
    )
    assert FlatChain(reads, list(PARAMS), structs).init_reads_values


def test_on_one_device_nothing_is_computed_for_it():
    text = jax.jit(lambda p: alike(p, jnp.zeros_like(p))).lower(jnp.ones(4)).as_text()
    assert "compare" not in text and "select" not in text and "barrier" not in text, text


def test_it_is_the_identity_in_every_transformation():
    like, x = jnp.arange(6.0).reshape(3, 2), jnp.arange(6.0, 12.0).reshape(3, 2)

    def equal(found, expected):
        np.testing.assert_array_equal(found, expected, strict=True)

    equal(jax.jit(alike)(like, x), x)
    for axes, expected in (((0, 0), x), ((1, 1), x.T), ((0, 1), x.T), ((1, 0), x)):
        rows = like if axes[0] == axes[1] else like.T
        equal(jax.vmap(alike, axes)(rows, x), expected)
    equal(jax.vmap(alike, (0, None))(like, x[0]), jnp.stack(3 * [x[0]]))
    equal(jax.vmap(alike, (None, 1))(like[:, 0], x), x.T)
    primal, tangent = jax.jvp(alike, (like, x), (jnp.ones_like(like), 2 * x))
    equal(primal, x)
    equal(tangent, 2 * x)
    gradients = jax.grad(lambda like, x: jnp.sum(jax.jit(alike)(like, x) ** 2), (0, 1))(like, x)
    equal(gradients[0], jnp.zeros_like(like))
    equal(gradients[1], 2 * x)
    (evaluated,) = core.jaxpr_as_fun(jax.make_jaxpr(alike)(like, x))(like, x)
    equal(evaluated, x)
