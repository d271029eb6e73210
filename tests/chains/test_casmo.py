"""casmo and casmo_snr: their links, their references, what is live, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
import chainrule
from chainrule import chains, set_hyperparams
from chainrule.transforms import (
    agar_confidence,
    chain,
    decoupled_weight_decay,
    scale_by_adam,
    scale_by_belief,
    snr_confidence,
)
from harness import assert_close, compiled_once, flat, random_tree, run
from reference import adam as adam_reference
from reference import casmo as casmo_reference
from reference.steps import as_float64, descent
from registry import TREE

PARAMS = random_tree(TREE, 0)
GRADS = [random_tree(TREE, seed) for seed in range(1, 7)]
BOTH = [(chains.casmo, {"tau_init_steps": 3}), (chains.casmo_snr, {})]
both = pytest.mark.parametrize(("make", "settings"), BOTH, ids=["casmo", "casmo_snr"])


def jitted(tx):
    return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


MASK = {"dense": {"bias": False, "kernel": True}, "scale": False}
COMPOSED = {
    "casmo": (
        chains.casmo(
            0.1,
            0.8,
            0.95,
            eps=1e-4,
            weight_decay=0.2,
            tau_init_steps=4,
            tau_clip_range=(0.2, 0.6),
            c_min=0.05,
            agar_clamp_factor=2.0,
        ),
        lambda: (
            scale_by_adam(0.8, 0.95, 1e-4),
            agar_confidence(
                4, c_min=0.05, b1=0.8, b2=0.95, tau_clip_range=(0.2, 0.6), clamp_factor=2.0
            ),
            decoupled_weight_decay(0.2),
        ),
    ),
    "casmo, the repository's": (
        chains.casmo(
            *(0.1, 0.9, 0.99),
            weight_decay=None,
            tau_init_steps=2,
            tau_clip_range=(0.01, 0.5),
            granularity="parameter",
            agar_clamp_factor=10.0,
            center="median",
            debias=False,
            agar_eps=1e-8,
            adapt_c_min=True,
            shared_calibration=True,
        ),
        lambda: (
            scale_by_adam(0.9, 0.99),
            agar_confidence(
                2,
                b1=0.9,
                b2=0.99,
                granularity="parameter",
                center="median",
                tau_clip_range=(0.01, 0.5),
                clamp_factor=10.0,
                debias=False,
                eps=1e-8,
                adapt_c_min=True,
                shared_calibration=True,
            ),
        ),
    ),
    "casmo_snr": (
        chains.casmo_snr(
            0.1,
            0.8,
            0.95,
            eps=1e-4,
            weight_decay=0.2,
            c_min=0.3,
            robustness=1.5,
            rel_floor=0.2,
            deviation="raw",
            mask=MASK,
        ),
        lambda: (
            scale_by_belief(0.8, 0.95, 1e-4, deviation="raw"),
            snr_confidence(
                robustness=1.5, c_min=0.3, rel_floor=0.2, eps=1e-4, b1=0.8, b2=0.95, deviation="raw"
            ),
            decoupled_weight_decay(0.2, MASK),
        ),
    ),
}


@pytest.mark.parametrize(("tx", "links"), COMPOSED.values(), ids=COMPOSED.keys())
def test_it_is_its_links(tx, links):
    """Every argument reaches the link that it is for."""
    by_hand = chain(*links(), optax.scale_by_learning_rate(0.1))
    expected, _ = run(jitted(by_hand), PARAMS, GRADS)
    assert_close(run(jitted(tx), PARAMS, GRADS)[0], expected)


REFERENCES = {
    "casmo": (
        chains.casmo(0.05, weight_decay=0.1, tau_init_steps=8, c_min=0.2),
        lambda: casmo_reference.agar_confidence(adam_reference.adam(), 8, 0.2),
    ),
    "casmo, a tensor at a time": (
        chains.casmo(0.05, weight_decay=0.1, tau_init_steps=8, granularity="parameter"),
        lambda: casmo_reference.agar_confidence(adam_reference.adam(), 8, granularity="parameter"),
    ),
    "casmo_snr": (
        chains.casmo_snr(0.05, weight_decay=0.1, robustness=0.7),
        lambda: casmo_reference.belief(confidence=(0.7, 0.1, 0.1, 1e-8)),
    ),
}


@pytest.mark.parametrize(("tx", "direction"), REFERENCES.values(), ids=REFERENCES.keys())
def test_a_trajectory_is_that_of_the_reference(tx, direction):
    """Parameters after forty steps down a noisy bowl, across the calibration; gradients are of the reference's own."""
    step, oracle = jax.jit(tx.update), descent(direction(), 0.05, 0.1)
    params, exact = PARAMS, as_float64(flat(PARAMS))
    state, rng = tx.init(params), np.random.default_rng(0)
    for _ in range(40):
        noise = {name: rng.normal(size=x.shape) for name, x in exact.items()}
        grads = jax.tree_util.tree_map_with_path(
            lambda path, p, noise=noise: p - 1 + noise[jax.tree_util.keystr(path)], params
        )
        updates, state = step(grads, state, params)
        own = {name: x - 1 + noise[name] for name, x in exact.items()}
        moves = oracle(own, exact)
        exact = {name: x + moves[name] for name, x in exact.items()}
        params = optax.apply_updates(params, updates)
    for name, x in flat(params).items():
        # Forty steps of at most twice the rate, each with its error.
        bound = 40 * 0.05 * 2 * bounds.stepped(40)
        np.testing.assert_allclose(x, exact[name], rtol=0, atol=bound, err_msg=name)


@both
def test_every_number_is_live(make, settings):
    """Set in the state, each comes to the same as given at the start, without a second compile."""
    given = {
        "learning_rate": 0.25,
        "b1": 0.5,
        "b2": 0.75,
        "eps": 0.125,
        "weight_decay": 0.5,
        "c_min": 0.25,
    }
    if make is chains.casmo_snr:
        given |= {"robustness": 1.0, "rel_floor": 0.5}
    tx = make(**settings)
    step = compiled_once(tx.update)
    start = set_hyperparams(tx.init(PARAMS), **given)
    assert set(given) == set(chainrule.hyperparams(start))
    expected, _ = run(jitted(make(**settings, **given)), PARAMS, GRADS)
    state, params = start, PARAMS
    for g, e in zip(GRADS, expected, strict=True):
        updates, state = step(g, state, params)
        assert_close(updates, e)
        params = optax.apply_updates(params, updates)
    step(GRADS[0], tx.init(PARAMS), PARAMS)


@both
def test_each_live_number_changes_the_update(make, settings):
    tx = jitted(make(**settings, learning_rate=0.1, weight_decay=0.1, eps=1e-2))
    _, state = run(tx, PARAMS, GRADS[:4])
    before, _ = tx.update(GRADS[4], state, PARAMS)
    for name in chainrule.hyperparams(state):
        changed, _ = tx.update(GRADS[4], set_hyperparams(state, **{name: 0.75}), PARAMS)
        pairs = zip(jax.tree.leaves(changed), jax.tree.leaves(before), strict=True)
        assert any(not np.allclose(c, b, rtol=1e-3) for c, b in pairs), name


@both
def test_optional_arguments_may_be_live_too(make, settings):
    if make is chains.casmo:
        settings = {**settings, "agar_clamp_factor": 10.0, "agar_eps": 1e-8}
    live = set(chainrule.hyperparams(make(**settings).init(PARAMS)))
    assert {"agar_clamp_factor", "agar_eps"} & set(settings) <= live
    assert "weight_decay" not in chainrule.hyperparams(make(weight_decay=None).init(PARAMS))


@both
def test_without_decay_parameters_are_not_needed(make, settings):
    tx = make(**settings, weight_decay=None)
    updates, _ = tx.update(GRADS[0], tx.init(PARAMS))
    assert_close(updates, tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0])
    tx = make(**settings, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"param"):
        tx.update(GRADS[0], tx.init(PARAMS))


def test_a_calibration_is_as_long_as_it_says():
    tx = jitted(chains.casmo(tau_init_steps=3, weight_decay=None))
    state = tx.init(PARAMS)
    calibrated = []
    for g in GRADS[:4]:
        _, state = tx.update(g, state)
        calibrated.append(bool(state.inner_state[1].calibration.calibrated))
    assert calibrated == [False, False, True, True]
    assert state.inner_state[1].calibration.samples.size == 3
    assert chains.casmo(b1=0.95).init(PARAMS).inner_state[1].calibration.samples.size == 1000


@both
def test_pure_noise_moves_less_than_signal(make, settings):
    """Of one learning rate, and casmo_snr's move by less than half as much as Adam's."""
    rng = np.random.default_rng(1)
    params = {"w": jnp.zeros(200)}
    noise = [{"w": jnp.asarray(x, jnp.float32)} for x in rng.normal(size=(12, 200))]
    signal = [{"w": jnp.ones(200) + 0.1 * g["w"]} for g in noise]
    tx = jitted(make(1.0, weight_decay=None, **settings))
    adam = jitted(chains.adam(1.0, weight_decay=None))

    def size(tx, grads):
        return float(jnp.mean(jnp.abs(run(tx, params, grads)[0][-1]["w"])))

    ratio = size(tx, noise) / size(tx, signal)
    if make is chains.casmo_snr:  # casmo's confidence is relative to its own calibration
        assert ratio < 0.5 * size(adam, noise) / size(adam, signal)
    assert ratio < 1


BAD = [
    ({"c_min": 1.5}, ValueError, r"`c_min` must be in \[0, 1\], got 1.5"),
    ({"b1": 1.0}, ValueError, r"`b1` must be in \[0, 1\), got 1.0"),
    ({"b2": -0.1}, ValueError, r"`b2` must be in \[0, 1\), got -0.1"),
    ({"eps": -1e-8}, ValueError, r"`eps` must be in \[0, inf\), got -1e-08"),
    ({"weight_decay": -0.1}, ValueError, r"`weight_decay` must be in \[0, inf\), got -0.1"),
    ({"learning_rate": float("nan")}, ValueError, r"`learning_rate` must be .*, got nan"),
]
BAD_CASMO = [
    ({"tau_init_steps": 0}, ValueError, r"`tau_init_steps` must be"),
    ({"tau_clip_range": (0.5, 0.1)}, ValueError, r"0 <= low <= high <= 1, got \(0.5, 0.1\)"),
    ({"granularity": "leaf"}, ValueError, r"`granularity` must be one of 'group', 'parameter'"),
    ({"center": "mode"}, ValueError, r"`center` must be one of 'mean', 'median'"),
    ({"agar_clamp_factor": 0.0}, ValueError, r"`(agar_)?clamp_factor` must be"),
]
BAD_SNR = [
    ({"robustness": -0.5}, ValueError, r"`robustness` must be in \[0, inf\), got -0.5"),
    ({"rel_floor": 2.0}, ValueError, r"`rel_floor` must be in \[0, 1\], got 2.0"),
    ({"deviation": "mean"}, ValueError, r"`deviation` must be one of 'unbiased', 'raw'"),
]


@pytest.mark.parametrize(
    ("make", "arguments", "error", "message"),
    [
        pytest.param(make, *row, id=f"{make.__name__}-{next(iter(row[0]))}")
        for make, rows in ((chains.casmo, BAD + BAD_CASMO), (chains.casmo_snr, BAD + BAD_SNR))
        for row in rows
    ],
)
def test_bad_arguments_are_named_at_construction(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


@both
def test_bad_trees_are_named(make, settings):
    tx = make(**settings)
    with pytest.raises(TypeError, match=r"int32.*floating-point"):
        tx.init({"steps": jnp.arange(3)})
    with pytest.raises(TypeError, match=r"real floating-point"):
        tx.init({"w": jnp.ones(3, jnp.complex64)})
    with pytest.raises(ValueError, match=r"structure of the parameters"):
        tx.update({"w": jnp.ones(3)}, tx.init(PARAMS), PARAMS)


@both
def test_a_gradient_that_is_not_finite_is_seen(make, settings):
    tx = make(**settings, weight_decay=None)
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), GRADS[0])
    _, state = tx.update(bad, tx.init(PARAMS))
    assert not np.all(np.isfinite(jax.tree.leaves(chainrule.metrics(state)["agar"])))
