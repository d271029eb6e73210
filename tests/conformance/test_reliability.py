"""What `docs/reliability.md` says of gradients that are not finite, or huge, row by row."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import chainrule
from chainrule import chains, transforms
from harness import random_tree
from registry import in_tiers

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "reliability.md"
VALUES = {"NaN": np.nan, "infinite": np.inf, "1e20": 1e20}
STEPS = 60

SHAPES = {"all": (4, 3)}
MAKE = {
    "`adam`": (chains.adam, SHAPES),
    "`nadam`": (chains.nadam, SHAPES),
    "`casmo`": (lambda: chains.casmo(tau_init_steps=10), SHAPES),
    "`casmo_snr`": (chains.casmo_snr, SHAPES),
    "`stam`": (lambda: chains.stam(weight_decay=None), SHAPES),
    "`stam_lite`": (lambda: chains.stam_lite(weight_decay=None), SHAPES),
    # In the order of `registry.TIERS`.
    "`cosmic`": (
        lambda: in_tiers(chains.cosmic()),
        {"a: tier 2": (4, 3), "b: tier 1": (4, 3), "c: tier 0": (4, 3)},
    ),
    "`muon`": (chains.muon, {"matrices": (4, 3), "the rest": (5,)}),
    # Without the draws, which drop some of the updates.
    "`magma(adam)`": (lambda: chains.magma(chains.adam(), mask_prob=1.0), SHAPES),
    "`grokfast(adam)`": (lambda: chains.grokfast(chains.adam()), SHAPES),
    "`grokfast(sgd)`": (lambda: chains.grokfast(optax.sgd(0.1)), SHAPES),
    "`orthograd(adam)`": (lambda: chains.orthograd(chains.adam()), SHAPES),
    "`orthograd(sgd)`": (lambda: chains.orthograd(optax.sgd(0.1)), SHAPES),
    "`adam` behind `zero_nonfinite`": (
        lambda: chainrule.chain(transforms.zero_nonfinite(), chains.adam()),
        SHAPES,
    ),
}


def rows():
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("|")]
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["chain", "tensors", *VALUES]
    return body


@functools.cache
def compiled(name):
    tx = MAKE[name][0]()
    return tx.init, jax.jit(tx.update)


def updates_of(name, bad):
    """The updates from the step on whose gradients begin with `bad`; `None`: an ordinary one. The parameters stay."""
    (init, step), shapes = compiled(name), MAKE[name][1]
    params = random_tree(shapes, 0)
    state, seen = init(params), []
    for seed in range(1, STEPS + 1):
        grads = random_tree(shapes, seed)
        if seed == 2 and bad is not None:
            grads = jax.tree.map(lambda g: g.reshape(-1).at[0].set(bad).reshape(g.shape), grads)
        updates, state = step(grads, state, params)
        seen.append(jax.tree.map(lambda u: np.asarray(u, np.float64).reshape(-1), updates))
    return jax.tree.map(lambda *us: np.stack(us[1:]), *seen)


def described(found, usual):
    """The words of the table for the updates of a tensor, (steps, entries), given those without the bad entry."""
    finite = np.isfinite(found)
    if not finite.all():
        whole = not finite[0].any()
        scope = finite if whole else finite[:, 0]
        # The other entries of the tensor are all like this one, or all finite.
        assert (finite == finite[:, :1]).all() if whole else finite[:, 1:].all()
        assert not finite[0, 0] and (scope[1:].all() or not scope[1:].any())
        return f"{'tensor' if whole else 'entry'} NaN {'once' if scope[1:].all() else 'for good'}"
    size, expected = np.abs(found), np.abs(usual)
    if size[0].max() > 1e6 * expected[0].max():
        return f"{'tensor' if size[0, 1:].max() > 1e6 * expected[0].max() else 'entry'} leaps"
    if not size[1:, 0].any():
        assert size[1:, 1:].any(axis=0).all()
        return "entry stops"
    # Of the second half: the moments have then seen what they will see.
    share = size[STEPS // 2 :].sum(0) / expected[STEPS // 2 :].sum(0)
    slow = share < 0.1
    if slow[0] and not slow[1:].any():
        return "entry slow"
    return "tensor slow" if slow.any() else "moves on"


def test_every_chain_is_in_the_table():
    named = {re.match(r"`(\w+)", row[0])[1] for row in rows()}
    assert named == set(chains.__all__)
    assert {row[0] for row in rows()} == set(MAKE)


@pytest.mark.parametrize("name", MAKE)
def test_the_table_is_true(name):
    usual = updates_of(name, None)
    tensors = {row[1]: dict(zip(VALUES, row[2:], strict=True)) for row in rows() if row[0] == name}
    assert set(tensors) == {path.split(": ")[-1] for path in usual}
    for label, value in VALUES.items():
        found = updates_of(name, value)
        for path in found:
            words = described(found[path], usual[path])
            assert words == tensors[path.split(": ")[-1]][label], f"{path}, {label}"


def test_what_is_not_finite_stays_out_of_the_averages_of_grokfast():
    good = jnp.array([1.0, 2.0])
    for tx in (transforms.grokfast_ema(), transforms.grokfast_ma(3)):
        for value in (np.nan, np.inf):
            _, state = tx.update(good, tx.init(good))
            updates, state = tx.update(good.at[0].set(value), state)
            assert not np.isfinite(updates[0]) and np.isfinite(updates[1])
            assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("value", [1e20, 3e38])
@pytest.mark.parametrize("first", [True, False])
def test_a_finite_gradient_leaves_casmo_snr_finite(value, first):
    tx, good = chains.casmo_snr(), jnp.array([1.0, -2.0, 0.5])
    state = tx.init(good)
    for g in (*(() if first else (good,)), good.at[0].set(value), good, -good):
        updates, state = tx.update(g, state, good)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
