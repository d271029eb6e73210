"""`metrics` collects what the links know, wherever they are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import chainrule
from chainrule import chains, metrics, transforms
from chainrule.transforms import state_bytes
from harness import random_tree, run
from registry import CASES, TREE

PARAMS = random_tree(TREE, 0)


class GaugeState(NamedTuple):
    level: jax.Array
    hidden: jax.Array

    metric_fields = ("level",)


def gauge(level):
    return optax.GradientTransformation(
        lambda params: GaugeState(jnp.asarray(level), jnp.zeros(3)), lambda u, s, p=None: (u, s)
    )


def test_a_state_without_metrics_has_its_bytes():
    assert metrics(optax.adam(1e-3).init(jnp.ones(10))) == {"state_bytes": 84}
    assert metrics(()) == {"state_bytes": 0}


def test_only_the_listed_fields_are_shown():
    assert set(metrics(gauge(1.0).init(PARAMS))) == {"level", "state_bytes"}


def test_links_are_found_in_chains_wrappers_and_dicts():
    tx = optax.named_chain(
        ("a", chains.grokfast(gauge(1.0))),
        ("b", optax.masked(gauge(2.0), lambda p: jax.tree.map(lambda _: True, p))),
        ("c", optax.partition({"all": gauge(3.0)}, lambda p: jax.tree.map(lambda _: "all", p))),
    )
    found = metrics(tx.init(PARAMS))
    assert {name: float(found[name]) for name in ("level", "level_2", "level_3")} == {
        "level": 1.0,
        "level_2": 2.0,
        "level_3": 3.0,
    }


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (chains.stam(), {"b1", "nonfinite"}),
        (chains.stam_lite(), {"b1", "nonfinite"}),
        (chains.adam(caution="mean"), {"kept_fraction"}),
        (chains.magma(optax.adam(1e-3)), {"alignment", "cosine", "mask_rate"}),
        (
            chains.casmo(tau_init_steps=3),
            {"agar", "confidence", "tau", "std", "c_min", "calibrated"},
        ),
        (chains.casmo_snr(), {"agar"}),
        (transforms.zero_nonfinite(), {"nonfinite", "nonfinite_total"}),
    ],
)
def test_what_each_chain_shows(tx, names):
    _, state = run(tx, PARAMS, [random_tree(TREE, 1)])
    assert names <= set(metrics(state))


def test_under_jit():
    tx = chains.stam()
    _, state = run(tx, PARAMS, [random_tree(TREE, 1)])
    compiled = jax.jit(lambda s: metrics(s)["b1"])(state)
    assert jnp.array_equal(compiled["scale"], metrics(state)["b1"]["scale"])


def test_every_listed_field_exists():
    for case in CASES:
        found = metrics(case.make().init(random_tree(case.shapes, 0)))
        assert found["state_bytes"] >= 0, case.name


def test_state_bytes_counts_every_array():
    state = {"a": jnp.zeros((3, 2)), "b": (jnp.zeros(5, jnp.int8), 1.0), "c": None}
    assert state_bytes(state) == 24 + 5 + 4
    assert chainrule.metrics(state)["state_bytes"] == 33
