"""Live hyperparameters: float32 in the state, by name, scheduled or set, never a recompile."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
import chainrule
from chainrule import chains, hyperparams, set_hyperparams
from chainrule.transforms import chain, live
from harness import assert_identical, compiled_once, random_tree, run, signature_of
from registry import TREE

PARAMS = random_tree(TREE, 0)
GRADS = [random_tree(TREE, seed) for seed in (1, 2, 3)]


@live(static=("power", "predicate"))
def sgd(
    learning_rate=0.1, decay=0.9, power=2, nesterov=False, predicate=None, mode="plain", mask=None
):
    """A chain with one argument of every kind."""
    assert isinstance(power, int) and (predicate is None or predicate(1))
    assert mode == "plain" and mask is None and isinstance(nesterov, bool)
    return optax.chain(optax.trace(decay, nesterov), optax.scale_by_learning_rate(learning_rate))


def test_numbers_are_live_and_the_rest_is_structure():
    state = sgd(power=3, nesterov=True, predicate=lambda x: x == 1).init(PARAMS)
    assert set(hyperparams(state)) == {"learning_rate", "decay"}
    assert all(value.shape == () for value in hyperparams(state).values())


def test_arrays_and_numpy_scalars_are_numbers():
    state = sgd(jnp.float32(0.5), np.float64(0.25)).init(PARAMS)
    assert {k: v.item() for k, v in hyperparams(state).items()} == {
        "learning_rate": 0.5,
        "decay": 0.25,
    }


def test_b2_of_bfloat16_parameters_is_not_one():
    """optax.inject_hyperparams rounds it to 1.0, and the first step to NaN."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    updates, state = run(chains.adam(b2=0.999), half, [half])
    assert state.hyperparams["b2"].dtype == jnp.float32
    assert state.hyperparams["b2"] == np.float32(0.999)
    assert all(np.all(np.isfinite(np.asarray(u, np.float32))) for u in jax.tree.leaves(updates))


def test_a_live_number_is_that_number():
    expected = run(
        optax.chain(optax.trace(0.5), optax.scale_by_learning_rate(0.25)), PARAMS, GRADS
    )[0]
    assert_identical(run(sgd(0.25, 0.5), PARAMS, GRADS)[0], expected)
    state = set_hyperparams(sgd().init(PARAMS), learning_rate=0.25, decay=0.5)
    assert_identical(run(sgd(), PARAMS, GRADS, state)[0], expected)


def test_a_schedule_is_that_of_optax():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 5)
    expected = run(
        optax.chain(optax.trace(0.9), optax.scale_by_learning_rate(schedule)), PARAMS, GRADS
    )
    updates, state = run(sgd(schedule), PARAMS, GRADS)
    for actual, e in zip(jax.tree.leaves(updates), jax.tree.leaves(expected[0]), strict=True):
        np.testing.assert_allclose(actual, e, rtol=bounds.ELEMENTWISE)
    assert state.hyperparams["learning_rate"] == np.float32(schedule(len(GRADS) - 1))


def test_any_number_may_be_scheduled():
    tx = sgd(0.1, decay=lambda count: jnp.where(count == 0, 0.9, 0.0))
    updates, _ = run(tx, PARAMS, GRADS)
    np.testing.assert_allclose(
        updates[1]["scale"], -0.1 * GRADS[1]["scale"], rtol=bounds.ELEMENTWISE
    )


def test_updates_leave_in_the_dtype_of_the_gradients():
    grads = jax.tree.map(lambda g: g.astype(jnp.float16), GRADS[0])
    updates, _ = chains.adam().update(grads, chains.adam().init(PARAMS), PARAMS)
    assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float16)}


def test_an_inner_optax_chain_that_widens_its_state_is_held():
    """bfloat16 parameters with float32 gradients: optax.adamw's moments become float32 at the first update."""
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    raw = optax.adamw(1e-2)
    assert signature_of(raw.update(PARAMS, raw.init(half), half)[1]) != signature_of(raw.init(half))
    tx = chains.grokfast(raw)
    assert signature_of(run(tx, half, GRADS[:1])[1]) == signature_of(tx.init(half))


def test_keys_in_the_inner_state_pass():
    tx = chains.grokfast(optax.noisy_sgd(0.1, key=jax.random.key(0)))
    _, state = run(tx, PARAMS, GRADS)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(PARAMS))


def test_setting_changes_nothing_else():
    _, state = run(chains.stam(), PARAMS, GRADS)
    changed = set_hyperparams(state, b2=0.5)
    assert changed.hyperparams["b2"] == 0.5 and state.hyperparams["b2"] != 0.5
    assert_identical(changed._replace(hyperparams=state.hyperparams), state)
    assert signature_of(changed) == signature_of(state)


def test_a_set_schedule_is_overwritten_at_the_next_update():
    tx = sgd(lambda count: 0.1)
    state = set_hyperparams(tx.init(PARAMS), learning_rate=5.0)
    _, state = tx.update(GRADS[0], state, PARAMS)
    assert hyperparams(state)["learning_rate"] == np.float32(0.1)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (
            {"b3": 0.1},
            KeyError,
            r"no hyperparameter 'b3' in this state; it has \['b1', 'b2', 'eps'",
        ),
        ({"b2": 1.0}, ValueError, r"set_hyperparams: `b2` must be in \[0, 1\), got 1.0"),
        ({"b2": float("nan")}, ValueError, r"`b2` must be in \[0, 1\), got nan"),
        ({"b2": np.ones(2)}, ValueError, r"`b2` has shape \(\), got \(2,\)"),
    ],
)
def test_bad_settings_are_named(values, error, message):
    with pytest.raises(error, match=message):
        set_hyperparams(chains.adam().init(PARAMS), **values)


def rate_of(tx, state):
    """The learning rate of one update of `sgd(decay=0)`."""
    updates, state = tx.update(GRADS[0], state, PARAMS)
    return -(updates["scale"] / GRADS[0]["scale"]).item(), state


def test_a_hyperparameter_given_as_an_array_is_set_like_a_number():
    tx = sgd(jnp.float32(0.5), decay=0.0)
    rate, state = rate_of(tx, tx.init(PARAMS))
    assert rate == bounds.near(0.5)
    state = set_hyperparams(state, learning_rate=0.25)
    for _ in range(2):  # it stays
        rate, state = rate_of(tx, state)
        assert rate == bounds.near(0.25)
        assert hyperparams(state)["learning_rate"] == 0.25
    rate, state = rate_of(tx, set_hyperparams(state, learning_rate=0.5))
    assert rate == bounds.near(0.5)


def test_of_an_array_and_a_set_value_the_later_one_counts():
    def make(rate):
        return optax.with_extra_args_support(sgd(jnp.float32(rate), decay=0.0))

    state = set_hyperparams(make(0.5).init(PARAMS), learning_rate=0.25)
    for given, expected in ((0.5, 0.25), (0.125, 0.125), (0.125, 0.125), (0.5, 0.5)):
        rate, state = rate_of(make(given), state)
        assert rate == bounds.near(expected)


def test_an_array_is_set_under_jit_without_another_compilation():
    tx = sgd(jnp.float32(0.5), decay=0.0)
    step, state = compiled_once(tx.update), tx.init(PARAMS)
    for rate in (0.5, 0.25, 0.0):
        updates, state = step(GRADS[0], set_hyperparams(state, learning_rate=rate), PARAMS)
        np.testing.assert_allclose(
            updates["scale"], -rate * GRADS[0]["scale"], rtol=bounds.ELEMENTWISE
        )


def test_a_state_with_arrays_may_be_donated():
    rate = jnp.float32(0.5)
    for tx in (sgd(rate), optax.inject_hyperparams(sgd, static_args=("power",))(0.5)):
        step, state = jax.jit(tx.update, donate_argnums=1), tx.init(PARAMS)
        for _ in range(2):
            _, state = step(GRADS[0], state, PARAMS)
    assert rate == 0.5  # it is the caller's, not part of the state


def test_a_gradient_with_respect_to_an_array_passes():
    """The update is -rate g with a fresh state, so its derivative is -g, of the array of init or a later one."""
    state = sgd(jnp.float32(0.5), decay=0.0).init(PARAMS)

    def later(rate):
        return sgd(rate, decay=0.0).update(GRADS[0], state, PARAMS)[0]["scale"]

    def from_the_start(rate):
        tx = sgd(rate, decay=0.0)
        return tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0]["scale"]

    for f in (later, from_the_start):
        for rate in (0.5, 0.25):
            assert jax.grad(f)(jnp.float32(rate)) == bounds.near(-GRADS[0]["scale"].item())


def test_a_decay_of_zero_needs_no_parameters():
    for make in (chains.adam, chains.nadam, chains.muon, chains.casmo, chains.stam, chains.cosmic):
        tx = make(weight_decay=0.0)
        updates, state = tx.update(GRADS[0], tx.init(PARAMS))
        assert_identical(updates, tx.update(GRADS[0], tx.init(PARAMS), PARAMS)[0])
        assert signature_of(state) == signature_of(tx.init(PARAMS))
        with pytest.raises(ValueError, match=r"the parameters"):
            make(weight_decay=0.1).update(GRADS[0], make(weight_decay=0.1).init(PARAMS))


def test_a_decay_of_zero_that_is_set_needs_them():
    tx = chains.adam(mask=lambda params: jax.tree.map(lambda p: p.ndim > 0, params))
    state = set_hyperparams(tx.init(PARAMS), weight_decay=0.5)
    with pytest.raises(ValueError, match=r"adam: `weight_decay` was set to 0.5 and needs the par"):
        tx.update(GRADS[0], state)
    tx.update(GRADS[0], state, PARAMS)
    tx.update(GRADS[0], set_hyperparams(state, weight_decay=0.0))
    jax.jit(tx.update)(GRADS[0], state)  # what the docstring of `live` says of jit


def test_a_tracer_may_be_set():
    tx = chains.adam(weight_decay=None)

    @compiled_once
    def step(rate, state):
        return tx.update(GRADS[0], set_hyperparams(state, learning_rate=rate))[0]

    assert not jnp.any(step(0.0, tx.init(PARAMS))["scale"])
    assert jnp.any(step(1.0, tx.init(PARAMS))["scale"])


def test_nested_chains_keep_their_names_apart():
    tx = chain(chains.adam(learning_rate=0.25), chains.grokfast(chains.adam(learning_rate=0.5)))
    state = tx.init(PARAMS)
    names = set(hyperparams(state))
    assert {"0.learning_rate", "1.inner_state.1.learning_rate", "alpha"} <= names
    state = set_hyperparams(state, **{"1.inner_state.1.learning_rate": 0.0})
    assert state[0].hyperparams["learning_rate"] == 0.25
    assert not jnp.any(tx.update(GRADS[0], state, PARAMS)[0]["scale"])


def test_of_two_chains_the_outer_one_has_the_plain_name():
    tx = chains.magma(chains.adam(learning_rate=0.5), learning_rate=0.25)
    values = hyperparams(tx.init(PARAMS))
    assert values["learning_rate"] == 0.25
    assert values["inner_state.0.learning_rate"] == 0.5


def test_named_chains_partitions_and_injected_ones_are_searched():
    inner = optax.inject_hyperparams(optax.sgd)(0.5)
    tx = chainrule.named_chain(
        (
            "first",
            optax.partition({"all": chains.adam()}, lambda p: jax.tree.map(lambda _: "all", p)),
        ),
        ("last", inner),
    )
    state = tx.init(PARAMS)
    values = hyperparams(state)
    assert values["last.learning_rate"] == 0.5
    name = next(
        name for name in values if name.startswith("first") and name.endswith("learning_rate")
    )
    state = set_hyperparams(state, **{name: 0.0})
    assert not jnp.any(tx.update(GRADS[0], state, PARAMS)[0]["scale"])


INJECTED = {
    "adam": (chains.adam, {}, ()),
    "casmo": (chains.casmo, {"tau_init_steps": 3}, ("tau_init_steps",)),
    "casmo_snr": (chains.casmo_snr, {}, ()),
    "cosmic": (chains.cosmic, {}, ("gate_tier_max", "block")),
    "muon": (chains.muon, {}, ("ns_steps", "routing")),
    "stam": (chains.stam, {}, ()),
    "stam_lite": (chains.stam_lite, {}, ()),
}


@pytest.mark.parametrize(("make", "settings", "static"), INJECTED.values(), ids=INJECTED.keys())
def test_inject_hyperparams_rules_a_live_chain(make, settings, static):
    tx = optax.inject_hyperparams(make, static_args=static)(learning_rate=0.5, **settings)
    step, state = compiled_once(tx.update), tx.init(PARAMS)
    moves = []
    for rate, g in zip((0.5, 0.0, 0.25), GRADS, strict=True):
        state.hyperparams["learning_rate"] = jnp.float32(rate)
        updates, state = step(g, state, PARAMS)
        moves.append(any(jnp.any(u != 0) for u in jax.tree.leaves(updates)))
    assert moves == [True, False, True]


@pytest.mark.parametrize(("make", "settings", "static"), INJECTED.values(), ids=INJECTED.keys())
def test_the_tools_of_optax_find_an_injected_number_once(make, settings, static):
    tx = optax.inject_hyperparams(make, static_args=static)(learning_rate=0.5, **settings)
    _, state = run(tx, PARAMS, GRADS[:1])
    assert optax.tree.get(state, "learning_rate") == 0.5
    assert state.inner_state.hyperparams == {}
    state = optax.tree.set(state, learning_rate=jnp.float32(0.0))
    assert hyperparams(state)["learning_rate"] == 0
    assert not any(jnp.any(u) for u in jax.tree.leaves(tx.update(GRADS[1], state, PARAMS)[0]))


def test_an_injected_number_that_is_structure_is_an_error():
    tx = optax.inject_hyperparams(chains.muon)(learning_rate=0.5, ns_steps=5)
    message = r"muon: `ns_steps` is structure.*`chainrule\.set_hyperparams`.*static_args=\(.*'ns_steps'.*'routing'"
    with pytest.raises(TypeError, match=message):
        tx.init(PARAMS)


def test_an_injected_schedule_is_that_of_the_chain():
    def schedule(count):
        return 0.5 / (1 + count)

    outside = run(optax.inject_hyperparams(chains.adam)(schedule), PARAMS, GRADS)[0]
    assert_identical(outside, run(chains.adam(schedule), PARAMS, GRADS)[0])


def test_injected_hyperparameters_are_set_by_name():
    state = optax.inject_hyperparams(chains.adam)(0.5).init(PARAMS)
    changed = set_hyperparams(state, learning_rate=0.25, b1=0.5)
    assert signature_of(changed) == signature_of(state)
    actual, _ = run(optax.inject_hyperparams(chains.adam)(0.5), PARAMS, GRADS, changed)
    assert_identical(actual, run(chains.adam(0.25, 0.5), PARAMS, GRADS)[0])


def test_a_live_chain_of_live_chains_rules_its_links():
    @live()
    def half(learning_rate=0.5, b1=0.9):
        return chain(chains.adam(learning_rate, b1), optax.scale(0.5))

    tx = half()
    state = set_hyperparams(tx.init(PARAMS), learning_rate=0.25, b1=0.5)
    expected, _ = run(chain(chains.adam(0.25, 0.5), optax.scale(0.5)), PARAMS, GRADS)
    assert_identical(run(tx, PARAMS, GRADS, state)[0], expected)


def test_the_state_is_one_to_the_tools_of_optax():
    state = chains.adam(learning_rate=0.25).init(PARAMS)
    assert optax.tree.get(state, "learning_rate") == 0.25
    state = optax.tree.set(state, learning_rate=jnp.float32(0.5))
    assert hyperparams(state)["learning_rate"] == 0.5
    assert optax.tree.get(state, "mu")["scale"] == 0.0


def test_one_chain_may_be_used_by_several_runs():
    tx = chains.adam()
    first, second = tx.init(PARAMS), set_hyperparams(tx.init(PARAMS), learning_rate=0.0)
    assert jnp.any(tx.update(GRADS[0], first, PARAMS)[0]["scale"])
    assert not jnp.any(tx.update(GRADS[0], second, PARAMS)[0]["scale"])


def test_the_bounds_of_a_live_argument_hold_at_construction():
    with pytest.raises(ValueError, match=r"adam: `b1` must be in \[0, 1\), got 1"):
        chains.adam(b1=1.0)
    with pytest.raises(ValueError, match=r"`learning_rate` must be in \[0, inf\), got -0.1"):
        chains.adam(-0.1)


def test_an_unknown_static_name_is_a_mistake_of_the_author():
    with pytest.raises(AssertionError, match=r"no arguments \{'b3'\}"):
        live(static=("b3",))(lambda b1: optax.identity())
