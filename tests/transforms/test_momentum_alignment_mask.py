"""Magma's factor and draws: exact at the ends, reproducible, and what they read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from chainrule.transforms import chain, metrics, momentum_alignment_mask, scale_by_adam
from harness import random_tree

SHAPES = {"dense": {"bias": (3,), "kernel": (4, 3)}, "scale": ()}
PARAMS, GRADS = random_tree(SHAPES, 0), random_tree(SHAPES, 1)
COSINE = bounds.stepped(5) + 2 * bounds.summed(
    12
)  # two averages of five steps, three sums of twelve


def after_adam(**settings):
    return chain(optax.scale_by_adam(), momentum_alignment_mask(**settings))


def steps(tx, number, grads=GRADS, **extra):
    update, state, seen = jax.jit(tx.update), tx.init(PARAMS), []
    for _ in range(number):
        updates, state = update(grads, state, PARAMS, **extra)
        seen.append(updates)
    return seen, state


def any_nonzero(tree):
    return np.array([bool(jnp.any(leaf != 0)) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(("mask_prob", "kept"), [(0, False), (0.0, False), (1, True), (1.0, True)])
def test_the_ends_of_the_probability_are_exact(mask_prob, kept):
    seen, state = steps(after_adam(mask_prob=mask_prob), 30)
    assert all(np.all(any_nonzero(updates) == kept) for updates in seen)
    assert metrics(state)["mask_rate"] == float(kept)


def test_the_rate_of_kept_updates_is_the_probability():
    seen, _ = steps(after_adam(mask_prob=0.3), 400)
    rates = np.mean([any_nonzero(updates) for updates in seen], axis=0)
    assert np.all(np.abs(rates - 0.3) < 4 * (0.3 * 0.7 / 400) ** 0.5), rates


def test_parameters_are_drawn_apart():
    seen, _ = steps(after_adam(), 200)
    draws = np.stack([any_nonzero(updates) for updates in seen])
    correlation = np.corrcoef(draws.T) - np.eye(3)
    assert np.max(np.abs(correlation)) < 0.3


def test_draws_are_the_same_with_float64_enabled():
    seen, _ = steps(after_adam(), 30)
    with jax.enable_x64(True):
        wide, _ = steps(after_adam(), 30)
    np.testing.assert_array_equal(list(map(any_nonzero, wide)), list(map(any_nonzero, seen)))


def test_draws_depend_on_the_seed_alone():
    first, again, other = (
        np.stack([any_nonzero(u) for u in steps(after_adam(seed=seed), 30)[0]])
        for seed in (1, jax.random.key(1, impl="threefry2x32"), 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_alignment_follows_the_cosine():
    """A constant gradient is parallel to its average: s_t = e s_{t-1} + (1 - e) sigmoid(1 / tau)."""
    settings = {"mask_prob": 1.0, "tau": 0.5, "alignment_ema": 0.6, "init_alignment": 0.5}
    seen, state = steps(after_adam(**settings), 5)
    expected = 0.5 * 0.6**5 + (1 - 0.6**5) / (1 + np.exp(-2.0))
    for leaf in jax.tree.leaves(metrics(state)["alignment"]):
        np.testing.assert_allclose(leaf, expected, rtol=bounds.stepped(5))
    alone, _ = steps(optax.scale_by_adam(), 5)
    scaled = jax.tree.map(lambda u: u * expected, alone[-1])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=bounds.stepped(5)), seen[-1], scaled
    )


def test_a_zero_gradient_has_the_cosine_zero():
    zeros = jax.tree.map(jnp.zeros_like, GRADS)
    _, state = steps(after_adam(mask_prob=1.0, alignment_ema=0.0), 2, zeros)
    assert jax.tree.leaves(metrics(state)["cosine"]) == [0.0] * 3
    assert jax.tree.leaves(metrics(state)["alignment"]) == [0.5] * 3


@pytest.mark.parametrize("moment", ["mu", "own"])
def test_one_bad_gradient_does_not_stay(moment):
    tx = momentum_alignment_mask(mask_prob=1.0, moment=moment)
    state = tx.init(jnp.ones(3))
    for bad in (jnp.nan, jnp.inf, 1.0):
        g = jnp.array([1.0, bad, -1.0])
        _, state = tx.update(g, state, grad=g, mu=g)
    assert all(
        bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((state.alignment, state.own))
    )


def test_its_own_moment_is_adams_first():
    settings = {"mask_prob": 1.0, "moment": "own", "momentum_beta": 0.8}
    inner, own = optax.scale_by_adam(b1=0.8), momentum_alignment_mask(**settings)
    varied = [random_tree(SHAPES, seed) for seed in range(5)]
    cosines = []
    for mask in (own, momentum_alignment_mask(mask_prob=1.0)):
        tx = chain(inner, mask)
        state = tx.init(PARAMS)
        for g in varied:
            _, state = tx.update(g, state, PARAMS)
        cosines.append(metrics(state)["cosine"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=COSINE), *cosines)


@pytest.mark.parametrize(
    ("owner", "moment"),
    [(optax.scale_by_adam(), "nu"), (optax.trace(0.9), "trace"), (scale_by_adam(), "mu")],
)
def test_it_reads_the_moment_that_is_named(owner, moment):
    tx = chain(owner, momentum_alignment_mask(moment=moment))
    _, state = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    remembered = getattr(state[0], moment)

    def cosine(a, b):
        a, b = np.ravel(a), np.ravel(b)
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    expected = jax.tree.map(cosine, remembered, GRADS)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=COSINE),
        state[1].cosine.tree(),
        expected,
    )


def test_given_draws_replace_its_own():
    mask = {"dense": {"bias": 1.0, "kernel": 0.0}, "scale": 1.0}
    seen, state = steps(after_adam(mask_prob=0.0), 2, mask=mask)
    assert any_nonzero(seen[-1]).tolist() == [True, False, True]
    np.testing.assert_allclose(metrics(state)["mask_rate"], 2 / 3, rtol=bounds.ELEMENTWISE)


@pytest.mark.parametrize(
    "exclude",
    [
        "^dense/",
        ["bias$", "kernel$"],
        lambda path, leaf: path.startswith("dense") and leaf.ndim > 0,
        {"dense": True, "scale": False},
        {"dense": {"bias": True, "kernel": True}, "scale": False},
    ],
    ids=["pattern", "patterns", "predicate", "prefix of booleans", "booleans"],
)
def test_excluded_parameters_pass_and_have_no_state(exclude):
    tx = after_adam(mask_prob=0.0, exclude=exclude)
    seen, state = steps(tx, 2)
    alone, _ = steps(optax.scale_by_adam(), 2)
    np.testing.assert_array_equal(seen[-1]["dense"]["kernel"], alone[-1]["dense"]["kernel"])
    assert seen[-1]["scale"] == 0
    assert len(jax.tree.leaves(metrics(state)["alignment"])) == 1


def test_a_pattern_that_matches_nothing_is_an_error():
    match = (
        r"`exclude` pattern 'gain' matches none of the leaves 'dense/bias', 'dense/kernel', 'scale'"
    )
    with pytest.raises(ValueError, match=match):
        after_adam(exclude=["bias", "gain"]).init(PARAMS)


def test_everything_excluded_is_the_identity():
    seen, _ = steps(after_adam(exclude=""), 1)
    alone, _ = steps(optax.scale_by_adam(), 1)
    jax.tree.map(np.testing.assert_array_equal, seen, alone)


def test_no_moment_upstream_is_an_error_that_names_the_remedies():
    tx = chain(optax.scale(1.0), momentum_alignment_mask())
    with pytest.raises(
        ValueError, match=r'needs `mu`, which no earlier link.*`moment`, or moment="own"'
    ):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)


def test_a_moment_that_is_masked_is_an_error_that_names_the_remedies():
    labels = {"dense": "adam", "scale": "sgd"}
    inner = optax.partition({"adam": optax.adam(1e-3), "sgd": optax.sgd(1e-3)}, labels)
    tx = chain(inner, momentum_alignment_mask())
    with pytest.raises(ValueError, match=r"no earlier link keeps `mu` of .scale.; leave it out"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
    tx = chain(inner, momentum_alignment_mask(exclude="scale"))
    assert tx.update(GRADS, tx.init(PARAMS), PARAMS)[0]["scale"] != 0


def test_only_its_own_moment_has_the_size_of_the_parameters():
    sizes = {
        moment: sum(
            leaf.size
            for leaf in jax.tree.leaves(momentum_alignment_mask(moment=moment).init(PARAMS))
        )
        for moment in ("mu", "own")
    }
    assert sizes["own"] - sizes["mu"] == 16
    assert sizes["mu"] == 1 + 2 + 3 + 3 + 1
