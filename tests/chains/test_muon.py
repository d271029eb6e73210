"""Muon: what each leaf's share of the chain does, and that caution sees the masked gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
import chainrule
from chainrule import chains
from chainrule.transforms import (
    Routing,
    cautious,
    chain,
    ema_momentum,
    newton_schulz,
    scale_by_adam,
)
from harness import assert_close, compiled_once, random_tree, run
from reference.muon import COEFFICIENTS

SHAPES = {
    "conv": {"bias": (5,), "kernel": (3, 3, 2, 5)},
    "embedding": (7, 4),
    "head": (4, 7),
    "hidden": (4, 6),
}


# Of a Gaussian matrix of these shapes, whose least singular value is more than a twentieth of its norm.
ORTHOGONALISED = bounds.iterated(np.linspace(0.05, 1, 5), COEFFICIENTS["keller_jordan"])


def trees(steps=3):
    return random_tree(SHAPES, 0), [random_tree(SHAPES, seed) for seed in range(1, steps + 1)]


def test_each_leaf_is_updated_by_its_own_links_alone():
    params, grads = trees()
    tx = chains.muon(0.1, weight_decay=None, adam_lr_ratio=0.5, routing=Routing(exclude="head"))
    updates, _ = run(tx, params, grads)
    muon = chain(ema_momentum(), newton_schulz(), optax.scale(-0.1))
    adam = chain(scale_by_adam(0.9, 0.95, 1e-10), optax.scale(-0.05))
    for name, link in {"hidden": muon, "head": adam, "embedding": adam}.items():
        alone, _ = run(link, params[name], [g[name] for g in grads])
        for whole, part in zip(updates, alone, strict=True):
            assert_close(
                whole[name], part, ORTHOGONALISED if name == "hidden" else bounds.stepped(3)
            )


def test_caution_compares_each_group_with_its_own_gradient():
    params, grads = trees()
    tx = chains.muon(1.0, weight_decay=None, caution="mean", adam_lr_ratio=1.0)
    updates, state = run(tx, params, grads)
    for name, link in {
        "hidden": chain(ema_momentum(), newton_schulz(), cautious("mean")),
        "embedding": chain(scale_by_adam(0.9, 0.95, 1e-10), cautious("mean")),
    }.items():
        alone, _ = run(link, params[name], [g[name] for g in grads])
        bound = ORTHOGONALISED if name == "hidden" else bounds.stepped(3)
        assert_close(updates[-1][name], -alone[-1], bound)
        assert np.all(updates[-1][name] * grads[-1][name] <= 0)
    kept = {k: v for k, v in chainrule.metrics(state).items() if k.startswith("kept_fraction")}
    assert len(jax.tree.leaves(kept)) == len(jax.tree.leaves(params))


def test_decay_of_all_and_decay_of_the_rest():
    params, _ = trees()
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = chains.muon(0.1, weight_decay=0.2, adam_lr_ratio=0.5, adam_weight_decay=0.4)
    updates, _ = run(tx, params, [grads])
    np.testing.assert_allclose(
        updates[0]["hidden"], -0.02 * params["hidden"], rtol=bounds.ELEMENTWISE
    )
    np.testing.assert_allclose(
        updates[0]["embedding"], -0.04 * params["embedding"], rtol=bounds.ELEMENTWISE
    )


def test_mask_says_what_decays():
    params, _ = trees()
    grads = jax.tree.map(jnp.zeros_like, params)
    tx = chains.muon(
        0.1, weight_decay=0.2, mask=lambda tree: {**tree, **dict.fromkeys(tree, False)}
    )
    updates, _ = run(tx, params, [grads])
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_a_kernel_is_orthogonalised_as_its_dims_say():
    params, grads = trees(1)
    tx = chains.muon(1.0, weight_decay=None, dims="hwio", coefficients="classical", ns_steps=14)
    updates, _ = run(tx, params, grads)
    kernel = np.asarray(updates[0]["conv"]["kernel"]).reshape(18, 5)
    np.testing.assert_allclose(kernel.T @ kernel, np.eye(5), rtol=0, atol=2 * ORTHOGONALISED)


def test_one_moment_a_matrix_and_two_for_the_rest():
    params, _ = trees()
    state = chains.muon().init(params)
    muon = sum(x.size for x in (params["conv"]["kernel"], params["hidden"]))
    rest = sum(x.size for x in (params["conv"]["bias"], params["embedding"], params["head"]))
    scalars = 4 * (len(chainrule.hyperparams(state)) + 3)
    assert chainrule.transforms.state_bytes(state) == 4 * muon + 8 * rest + scalars


def test_a_pattern_is_checked_when_the_chain_meets_a_tree():
    params, grads = trees(1)
    tx = chains.muon(routing=Routing(exclude="hiden"))
    with pytest.raises(ValueError, match=r"'hiden' matches none of the leaves 'conv/bias'"):
        tx.init(params)
    state = chains.muon().init(params)
    with pytest.raises(ValueError, match=r"'hiden' matches none of the leaves 'conv/bias'"):
        tx.update(grads[0], state, params)


def test_any_function_to_labels_routes():
    params, grads = trees(1)
    every = chains.muon(routing=lambda tree: jax.tree.map(lambda _: "adam", tree))
    updates, _ = run(every, params, grads)
    labelled, _ = run(chains.muon(routing=Routing(labels="adam")), params, grads)
    assert_close(updates[0], labelled[0])


def test_every_number_is_live_without_another_compilation():
    params, grads = trees(1)
    tx = chains.muon(adam_weight_decay=0.1)
    step = compiled_once(tx.update)
    state = tx.init(params)
    before, _ = step(grads[0], state, params)
    for name in ("scale_factor", "adam_lr_ratio", "adam_weight_decay", "beta", "weight_decay"):
        value = 0.5 * float(chainrule.hyperparams(state)[name]) + 0.25
        after, _ = step(grads[0], chainrule.set_hyperparams(state, **{name: value}), params)
        assert any(
            np.any(a != b)
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
        ), name
