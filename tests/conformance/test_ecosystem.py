"""What other libraries do with a transformation and its state: optax's `map_params`, `init` on shapes alone, Flax NNX,
`flax.serialization`, Orbax, Equinox."""

import subprocess
import sys

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx, serialization

import chainrule
from chainrule import chains, transforms
from chainrule.transforms import Quantized, TieredState
from harness import assert_close, assert_identical, random_tree
from registry import every_case, every_chain, every_setting


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


def shapes_of(case):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        case.shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


# optax's `map_params`, its documented way to shard a state.

MOMENTS = ("mu", "nu", "mu_long", "ema", "own", "trace", "previous", "lost")
"""Fields of states that are like the parameters."""


@every_setting
def test_map_params_finds_what_is_in_the_shapes_of_the_parameters(case, setting):
    tx, params = case.make(setting), random_tree(case.shapes, 0)
    state = tx.init(params)

    def shape(leaf, param):
        if is_masked(leaf):
            return leaf
        assert leaf.shape == param.shape
        return np.zeros(leaf.shape, "S1")

    marked = optax.tree.map_params(
        tx, shape, state, params, transform_non_params=lambda x: x, is_leaf=is_masked
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)

    def apart(node):  # no trees in the shapes of the parameters
        return isinstance(node, (TieredState, Quantized))

    for path, leaf in jax.tree_util.tree_leaves_with_path(marked, is_leaf=apart):
        names = [getattr(entry, "name", "") for entry in path]
        expected = any(name in MOMENTS for name in names) and not apart(leaf)
        # A tensor in codes has the whole moment taken for no parameter.
        held = any(isinstance(x, Quantized) for x in jax.tree.leaves(state, is_leaf=apart))
        assert (getattr(leaf, "dtype", None) == "S1") == (expected and not held) or held, path


@every_case
def test_map_params_changes_nothing_of_its_own(case):
    tx, params = case.make(), random_tree(case.shapes, 0)
    state = tx.init(params)
    mapped = optax.tree.map_params(
        tx, lambda x: x, state, transform_non_params=lambda x: x, is_leaf=is_masked
    )
    assert_identical(mapped, state)


def test_map_params_of_codes_and_of_what_is_beside_them():
    tx = transforms.quantized_state(optax.scale_by_adam(), block=2, fields=("mu",))
    params = random_tree({"a": (4,), "b": (2, 2)}, 0)
    marked = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(params), {"a": "A", "b": "B"}, transform_non_params=type
    )
    assert marked.inner_state.nu == {"a": "A", "b": "B"}
    assert marked.inner_state.mu is dict


# `init` on shapes.


@every_setting
def test_init_takes_shapes(case, setting):
    tx = case.make(setting)
    params = random_tree(case.shapes, 0)
    assert_identical(tx.init(shapes_of(case)), tx.init(params))


def test_a_budget_in_shares_of_the_parameters_takes_shapes():
    policy = transforms.TierPolicy({1: 0.5}, budget_ratio=2.0)
    tx = transforms.tiered_state({1: optax.scale_by_adam(), 0: optax.scale_by_sign()}, policy)
    assert tx.init({"w": jax.ShapeDtypeStruct((30,), jnp.float32)}).count == 0


# Flax NNX.


class Model(nnx.Module):
    def __init__(self):
        self.dense = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        return self.dense(x) * self.scale


def nnx_step(kind, tx):
    """The parameters after two steps of an optimizer of NNX."""
    model = Model()
    optimizer = kind(model, tx, wrt=nnx.Param)
    for _ in range(2):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 2))) ** 2))(model)
        optimizer.update(*(() if kind is nnx.ModelAndOptimizer else (model,)), grads)
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def by_hand(tx):
    def loss(p):
        y = (jnp.ones((1, 2)) @ p["dense"]["kernel"] + p["dense"]["bias"]) * p["scale"]
        return jnp.sum(y**2)

    params = nnx.to_pure_dict(nnx.state(Model(), nnx.Param))
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params


@every_chain
def test_nnx_optimizer_is_the_transformation(case):
    assert_close(nnx_step(nnx.Optimizer, case.make()), by_hand(case.make()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: chains.magma(chains.adam(), mask_prob=0.5, exclude="bias$"),
        lambda: chains.muon(routing=transforms.Routing(exclude="^dense/kernel$")),
    ],
    ids=["magma", "muon"],
)
def test_nnx_leaves_have_one_name_in_their_boxes_and_out_of_them(make):
    assert_close(nnx_step(nnx.Optimizer, make()), by_hand(make()))


@pytest.mark.parametrize("make", [chains.stam_lite, lambda: chains.magma(chains.adam())])
def test_nnx_model_and_optimizer(make):
    assert_close(nnx_step(nnx.ModelAndOptimizer, make()), by_hand(make()))


# flax.serialization.


def filled(state):
    """`state` with numbers in it that tell its leaves apart."""
    leaves, structure = jax.tree.flatten(state)
    numbers = [
        jnp.asarray(np.arange(i, i + x.size).reshape(x.shape), x.dtype)
        for i, x in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, numbers)


@every_setting
def test_flax_serialization_gives_the_state_back(case, setting):
    if case.public is transforms.named_chain:
        pytest.skip("Flax has no entry for the OrderedDict that is the state of optax.named_chain")
    fresh = case.make(setting).init(random_tree(case.shapes, 0))
    state = filled(fresh)
    assert_identical(serialization.from_bytes(fresh, serialization.to_bytes(state)), state)
    assert_identical(
        serialization.from_state_dict(fresh, serialization.to_state_dict(state)), state
    )


ORDER = """
{imports}
import jax.numpy as jnp
state = chainrule.chains.stam_lite().init({{"w": jnp.ones(2)}})
import flax.serialization
assert flax.serialization.from_bytes(state, flax.serialization.to_bytes(state)) is not None
assert not any(type(finder).__module__.startswith("chainrule") for finder in __import__("sys").meta_path)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import flax.serialization, chainrule",
        "import chainrule",
        "import chainrule, importlib.util as u; assert u.find_spec('flax.serialization') is not None",
    ],
    ids=["flax first", "chainrule first", "looked for in between"],
)
def test_flax_and_chainrule_may_be_imported_in_either_order(imports):
    script = ORDER.format(imports=imports)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_flax_is_not_imported_by_this_package():
    script = "import chainrule, sys; assert 'flax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_state_of_other_parameters_is_refused():
    tx = transforms.scale_by_tensor_rms()
    saved = serialization.to_bytes(tx.init({"a": jnp.ones(2), "b": jnp.ones(3)}))
    with pytest.raises(
        ValueError, match=r"`values` was saved with shape \(2,\), the target has shape \(1,\)"
    ):
        serialization.from_bytes(tx.init({"a": jnp.ones(2)}), saved)


def test_a_state_of_other_tiers_names_the_way():
    tx, params = chains.cosmic(), random_tree({"a": (4,), "b": (3,)}, 0)
    state = chainrule.retier(tx.init(params), params, params)
    assert set(state.inner_state[0].assignment.tiers) != {0}
    saved = serialization.to_bytes(state)
    with pytest.raises(
        ValueError, match=r"saved with its tensors in tiers \((.*)\), the target"
    ) as e:
        serialization.from_bytes(tx.init(params), saved)
    tiers = eval(str(e.value).split("tx.init(params), ")[1].split(", params")[0])
    target = transforms.assign(tx.init(params), tiers, params)
    assert_identical(serialization.from_bytes(target, saved), state)


# Orbax.


@every_chain
def test_orbax_gives_the_state_back(case, tmp_path):
    tx, params = case.make(), random_tree(case.shapes, 0)
    state = filled(tx.init(params))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(tx.init, params))
    assert_identical(restored, state)


# Equinox: a model is a tree of which some leaves are functions.


def model_and_gradient():
    model = equinox.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    return model, equinox.filter_grad(lambda m: jnp.sum(m(jnp.ones(2))))(model)


EVERYWHERE = {
    "adam": lambda: chains.adam(weight_decay=0.1),
    "stam_lite": chains.stam_lite,
    "casmo_snr": lambda: chains.casmo_snr(weight_decay=0.1),
    "cosmic": lambda: chains.cosmic(weight_decay=0.1),
    "magma": lambda: chains.magma(optax.adamw(1e-3)),
    "orthograd": lambda: chains.orthograd(optax.adamw(1e-3)),
    "transforms.orthograd": transforms.orthograd,
    "tiers": lambda: transforms.tiered_state(
        {0: optax.add_decayed_weights(0.1)}, transforms.TierPolicy({})
    ),
}


@pytest.mark.parametrize("make", EVERYWHERE.values(), ids=EVERYWHERE.keys())
def test_the_whole_model_may_be_given_to_update(make):
    """As to optax.adamw: what has no gradient is not read."""
    model, grads = model_and_gradient()
    arrays = equinox.filter(model, equinox.is_inexact_array)
    tx = make()
    state = tx.init(arrays)
    whole, _ = tx.update(grads, state, model)
    filtered, _ = tx.update(grads, state, arrays)
    assert_identical(whole, filtered)
    optax.adamw(1e-3).update(grads, optax.adamw(1e-3).init(arrays), model)


def test_retier_takes_the_whole_model():
    model, grads = model_and_gradient()
    arrays = equinox.filter(model, equinox.is_inexact_array)
    state = chains.cosmic().init(arrays)
    assert_identical(chainrule.retier(state, grads, model), chainrule.retier(state, grads, arrays))


def test_init_takes_the_whole_model_where_nothing_is_kept_like_it():
    model, grads = model_and_gradient()
    for tx in (chains.orthograd(optax.sgd(0.1)), transforms.orthograd(), optax.sgd(0.1)):
        updates, _ = tx.update(grads, tx.init(model), model)
        assert jax.tree.structure(updates) == jax.tree.structure(grads)


@every_case
def test_init_of_the_whole_model_names_what_is_no_array(case):
    """optax.adam raises `TypeError` there too, of `zeros_like`."""
    model, _ = model_and_gradient()
    if case.stateless and case.name != "newton_schulz":
        case.make().init(model)
        return
    with pytest.raises(
        TypeError, match=r"\w+: parameter \.activation is no array, .*equinox\.filter"
    ):
        case.make().init(model)
