"""`chain` is a drop-in for `optax.chain` whose links also see the gradient and what earlier links remember."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import chainrule
from chainrule.transforms import chain, named_chain, posted
from harness import assert_close, assert_identical, random_tree, run
from registry import TREE

PARAMS = random_tree(TREE, 0)
GRADS = [random_tree(TREE, seed) for seed in (1, 2, 3)]


def recorder(seen: list[dict[str, Any]]):
    """A link that passes the updates and appends the extra arguments that it gets."""

    def update(updates, state, params=None, **extra):
        del params
        seen.append(extra)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def last_seen(*links, grads=GRADS, **extra) -> tuple[dict[str, Any], Any]:
    """What a link at the end of the chain gets at the last step, and the chain's last state."""
    seen: list[dict[str, Any]] = []
    _, state = run(chain(*links, recorder(seen)), PARAMS, grads, **extra)
    return seen[-1], state


@pytest.mark.parametrize(
    "links",
    [
        (optax.scale(2.0),),
        (optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale(-0.1)),
        (optax.clip_by_global_norm(1.0), optax.chain(optax.trace(0.9), optax.scale(-1.0))),
        (optax.masked(optax.trace(0.9), {"dense": True, "scale": False}), optax.scale(-1.0)),
    ],
)
def test_is_optax_chain_for_links_that_read_nothing(links):
    ours, theirs = run(chain(*links), PARAMS, GRADS), run(optax.chain(*links), PARAMS, GRADS)
    assert_identical(ours, theirs)


def test_named_chain_is_optax_named_chain():
    links = (("adam", optax.scale_by_adam()), ("rate", optax.scale(-0.1)))
    assert_identical(
        run(named_chain(*links), PARAMS, GRADS), run(optax.named_chain(*links), PARAMS, GRADS)
    )


def test_named_chain_posts_too():
    seen = []
    tx = named_chain(("momentum", optax.trace(0.9)), ("last", recorder(seen)))
    _, state = run(tx, PARAMS, GRADS)
    assert_identical(seen[-1]["trace"], state["momentum"].trace)


def test_names_must_be_unique():
    with pytest.raises(ValueError, match=r"names must be unique, got \['a', 'a'\]"):
        named_chain(("a", optax.identity()), ("a", optax.identity()))


def test_extra_arguments_of_the_caller_reach_every_link():
    seen: list[dict[str, Any]] = []
    tx = chain(recorder(seen), optax.chain(recorder(seen)), chain(recorder(seen)))
    tx.update(GRADS[0], tx.init(PARAMS), PARAMS, value=1.0, anything="else")
    assert len(seen) == 3
    assert all(extra["value"] == 1.0 and extra["anything"] == "else" for extra in seen)


def test_every_link_gets_the_raw_gradient():
    extra, _ = last_seen(optax.scale(2.0), optax.scale_by_adam())
    assert_identical(extra["grad"], GRADS[-1])


def test_a_nested_chain_gets_the_gradient_of_the_outermost_one():
    extra, _ = last_seen(optax.scale(2.0), chain(optax.scale(3.0)))
    assert_identical(extra["grad"], GRADS[-1])
    seen: list[dict[str, Any]] = []
    run(chain(optax.scale(2.0), chain(recorder(seen))), PARAMS, GRADS)
    assert_identical(seen[-1]["grad"], GRADS[-1])


def test_the_gradient_that_the_caller_gives_wins():
    given = jax.tree.map(jnp.zeros_like, PARAMS)
    extra, _ = last_seen(optax.scale(2.0), grad=given)
    assert_identical(extra["grad"], given)


def test_a_link_sees_what_an_earlier_one_remembers_after_this_step():
    extra, state = last_seen(optax.scale_by_adam())
    assert_identical(
        [extra[k] for k in ("mu", "nu", "count")], [state[0].mu, state[0].nu, state[0].count]
    )
    assert extra["count"] == len(GRADS)


def test_nothing_is_seen_before_its_owner():
    seen: list[dict[str, Any]] = []
    run(chain(recorder(seen), optax.scale_by_adam()), PARAMS, GRADS)
    assert set(seen[-1]) == {"grad"}


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (optax.scale_by_adam(), {"mu", "nu", "count"}),
        (optax.trace(0.9), {"trace"}),
        (optax.adamw(1e-3), {"mu", "nu", "count"}),
        (optax.inject_hyperparams(optax.adamw)(1e-3), {"mu", "nu", "count"}),
        (optax.scale_by_lion(), {"mu", "count"}),
        (optax.scale_by_rms(), {"nu"}),
        (optax.MultiSteps(optax.adam(1e-3), 1).gradient_transformation(), {"mu", "nu", "count"}),
        (optax.masked(optax.trace(0.9), {"dense": True, "scale": False}), {"trace"}),
        (chainrule.chains.adam(), {"mu", "nu", "count"}),
        (chainrule.chains.stam(), {"mu", "nu", "count", "b1"}),
        (chainrule.transforms.scale_by_adam(), {"mu", "nu", "count"}),
        (optax.sgd(0.1), set()),
    ],
)
def test_owners(owner, names):
    extra, state = last_seen(owner)
    assert set(extra) == {"grad"} | names
    assert set(posted(state)) == names


def test_the_links_of_a_partition_are_merged_leaf_by_leaf():
    labels = {"dense": "adam", "scale": "sgd"}
    owner = optax.partition({"adam": optax.scale_by_adam(), "sgd": optax.trace(0.9)}, labels)
    extra, _ = last_seen(owner)
    assert isinstance(extra["mu"]["scale"], optax.MaskedNode)
    assert isinstance(extra["trace"]["dense"], optax.MaskedNode)
    halves = {"a": optax.scale_by_adam(), "b": optax.scale_by_adam(b1=0.5)}
    merged = last_seen(optax.partition(halves, {"dense": "a", "scale": "b"}))[0]["mu"]
    assert jax.tree.structure(merged) == jax.tree.structure(PARAMS)
    assert_identical(merged["dense"], last_seen(halves["a"])[0]["mu"]["dense"])
    assert_identical(merged["scale"], last_seen(halves["b"])[0]["mu"]["scale"])


def test_of_two_owners_the_later_one_counts():
    extra, state = last_seen(optax.scale_by_adam(b1=0.5), optax.scale_by_adam(b1=0.9))
    assert_identical(extra["mu"], state[1].mu)


def test_parameters_that_look_like_a_state_are_none():
    class Weights(NamedTuple):
        mu: jax.Array
        nu: jax.Array

    params = Weights(jnp.ones(2), jnp.ones(2))
    tx = chain(optax.trace(0.9), recorder(seen := []))
    run(tx, params, [params])
    assert set(seen[-1]) == {"grad", "trace"}


def test_a_consumer_without_owner_names_its_remedies():
    tx = optax.chain(optax.scale_by_adam(), chainrule.transforms.cautious())
    with pytest.raises(ValueError, match=r"cautious: needs `grad`.*chainrule\.chain.*grad="):
        tx.update(GRADS[0], tx.init(PARAMS), PARAMS)


def test_a_consumer_in_a_stock_chain_takes_the_gradient_from_the_caller():
    links = (optax.scale_by_adam(), chainrule.transforms.cautious())
    stock, ours = optax.chain(*links), chain(*links)
    expected = ours.update(GRADS[0], ours.init(PARAMS), PARAMS)
    actual = stock.update(GRADS[0], stock.init(PARAMS), PARAMS, grad=GRADS[0])
    assert_identical(actual, expected)


def test_jit_scan_and_vmap():
    tx = chain(optax.scale_by_adam(), chainrule.transforms.cautious(), optax.scale(-0.1))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *GRADS)

    def body(state, g):
        updates, state = tx.update(g, state, PARAMS)
        return state, updates

    _, updates = jax.lax.scan(body, tx.init(PARAMS), stacked)
    state, loop = tx.init(PARAMS), []
    for g in GRADS:
        u, state = tx.update(g, state, PARAMS)
        loop.append(u)
    assert_close(updates, jax.tree.map(lambda *leaves: jnp.stack(leaves), *loop))


def test_an_update_leaves_no_trace_in_the_transformation():
    """Two interleaved runs of one chain do not see each other's moments."""
    tx = chain(optax.scale_by_adam(), chainrule.transforms.cautious())
    alone = run(tx, PARAMS, GRADS)
    states = [tx.init(PARAMS), tx.init(PARAMS)]
    params = PARAMS
    for g, expected in zip(GRADS, alone[0], strict=True):
        other = jax.tree.map(lambda x: -x, g)
        updates, states[0] = tx.update(g, states[0], params)
        _, states[1] = tx.update(other, states[1], params)
        np.testing.assert_array_equal(updates["scale"], expected["scale"])
        params = optax.apply_updates(params, updates)
    assert_identical(states[0], alone[1])
