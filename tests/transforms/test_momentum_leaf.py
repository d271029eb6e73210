"""What follows `adaptive_beta1` reads its moment, or the error says what does."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule.transforms import MomentumLeaf, adaptive_beta1, scale_by_adam, scale_by_tensor_rms
from harness import assert_close, flat, random_tree
from reference import stam
from reference.steps import as_float64

PARAMS = random_tree({"w": (2, 3), "b": (3,)}, 0)
REMEDY = r"adaptive_beta1.*chainrule\.transforms\.scale_by_adam.*chainrule\.transforms\.scale_by_tensor_rms"

CONSUMERS = {
    "scale_by_adam": optax.scale_by_adam(),
    "scale_by_amsgrad": optax.scale_by_amsgrad(),
    "scale_by_lion": optax.scale_by_lion(),
    "scale_by_rms": optax.scale_by_rms(),
    "scale_by_factored_rms": optax.scale_by_factored_rms(),
    "scale_by_yogi": optax.scale_by_yogi(),
    "scale_by_novograd": optax.scale_by_novograd(),
    "scale_by_sign": optax.scale_by_sign(),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio(),
    "scale_by_muon": optax.contrib.scale_by_muon(),
    "adamw": optax.adamw(1e-3),
    "trace": optax.trace(0.9),
    "ema": optax.ema(0.9),
    "scale": optax.scale(-1.0),
    "scale_by_learning_rate": optax.scale_by_learning_rate(0.1),
    "scale_by_schedule": optax.scale_by_schedule(lambda count: 0.1),
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "add_noise": optax.add_noise(0.1, 0.1, jax.random.key(0)),
    "clip": optax.clip(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "zero_nans": optax.zero_nans(),
    "centralize": optax.centralize(),
    "flatten": optax.flatten(optax.scale(1.0)),
    "masked": optax.masked(optax.scale(1.0), True),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "keep_params_nonnegative": optax.keep_params_nonnegative(),
    "stateless": optax.stateless(lambda updates, _: jax.tree.map(lambda u: u.T, updates)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("consumer", CONSUMERS.values(), ids=CONSUMERS.keys())
def test_another_consumer_is_told_what_reads_it(consumer, compiled):
    tx = optax.chain(adaptive_beta1(), consumer)
    update = jax.jit(tx.update) if compiled else tx.update
    with pytest.raises(TypeError, match=REMEDY):
        update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("last", [None, optax.identity()], ids=["nothing", "identity"])
def test_nobody_after_it_is_an_error_where_the_updates_are_used(last):
    tx = adaptive_beta1() if last is None else optax.chain(adaptive_beta1(), last)
    with pytest.raises(TypeError, match=REMEDY):
        jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match=REMEDY):
        optax.apply_updates(PARAMS, updates)


def test_wrapping_it_alone_is_an_error():
    tx = optax.MultiSteps(adaptive_beta1(), 2)
    with pytest.raises(TypeError, match=REMEDY):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    "use",
    [
        lambda leaf: leaf + 1,
        lambda leaf: 2.0 * leaf,
        lambda leaf: np.float32(2.0) * leaf,
        lambda leaf: jnp.ones(3) * leaf,
        lambda leaf: leaf @ leaf,
        lambda leaf: -leaf,
        lambda leaf: abs(leaf),
        lambda leaf: leaf > 0,
        lambda leaf: bool(leaf),
        lambda leaf: float(leaf),
        lambda leaf: np.asarray(leaf),
        lambda leaf: jnp.asarray(leaf),
        lambda leaf: jnp.sign(leaf),
        lambda leaf: jnp.sum(leaf),
        lambda leaf: jax.lax.neg(leaf),
        lambda leaf: leaf.shape,
        lambda leaf: leaf.astype(jnp.float32),
        lambda leaf: f"{leaf}",
        lambda leaf: jax.jit(lambda x: x)(leaf),
        lambda leaf: jax.vmap(lambda x: x)(leaf),
    ],
)
# The error is raised all the same: JAX's C++ asks for `__jax_array__` first, and Python 3.13 reports what it swallows.
@pytest.mark.filterwarnings(
    r"ignore:Exception ignored in PyObject_HasAttr\(\):pytest.PytestUnraisableExceptionWarning"
)
def test_every_use_of_the_leaf_is_the_same_error(use):
    leaf = MomentumLeaf(jnp.ones(3), jnp.ones(3), jnp.float32(1.0))
    with pytest.raises(TypeError, match="adaptive_beta1"):
        use(leaf)


def test_a_leaf_can_be_shown_copied_and_pickled():
    leaf = MomentumLeaf(jnp.ones(3), jnp.ones(3, jnp.bfloat16), jnp.float32(1.0))
    assert repr(leaf) == "MomentumLeaf(shape=(3,), dtype=bfloat16)"
    for twin in (copy.copy(leaf), copy.deepcopy(leaf), pickle.loads(pickle.dumps(leaf))):
        np.testing.assert_array_equal(twin.mu, leaf.mu)


@pytest.mark.parametrize(
    ("links", "oracle"),
    [
        ((adaptive_beta1(), scale_by_adam()), stam.adam_over({})),
        ((adaptive_beta1(), scale_by_adam(b1=None)), stam.adam_over({})),
        ((adaptive_beta1(), scale_by_adam(b1=0.1)), stam.adam_over({})),
        ((adaptive_beta1(signal="moments"), scale_by_tensor_rms()), stam.stam_lite_direction()),
    ],
    ids=["literal", "b1=None", "another b1", "lite"],
)
def test_the_literal_stock_chain_is_the_method(links, oracle):
    """`optax.chain(adaptive_beta1(), scale_by_adam())` with a plain update is STAM's direction, whatever that b1."""
    tx = optax.chain(*links)
    state = tx.init(PARAMS)
    for seed in range(1, 13):
        grads = random_tree({"w": (2, 3), "b": (3,)}, seed)
        updates, state = tx.update(grads, state, PARAMS)
        expected = oracle(as_float64(flat(grads)), as_float64(flat(PARAMS)))
        for path, u in flat(updates).items():
            assert_close(u, expected[path], bounds.stepped(seed))


def test_an_adam_without_moment_asks_for_one_upstream():
    tx = scale_by_adam(b1=None)
    with pytest.raises(
        TypeError, match=r"b1=None.*plain arrays; put `adaptive_beta1` directly before"
    ):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
