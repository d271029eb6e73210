"""All of optax, lowered to torch and run beside JAX.

One step is ``(gradients, state, params) -> (apply_updates(params, updates), state)``: jitted by
XLA on one side, ``lower`` of the same function on the other, each fed its own results, for ten
steps on a tree of a scalar, a vector, matrices and a convolution kernel.
"""

import functools
import inspect
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend import core

import bounds
from chainrule.bridges.lowering import Lowered, lower_jaxpr, to_jax, to_torch, torch_dtype
from chainrule.bridges.lowering.arrays import physical_shape
from chainrule.bridges.lowering.rules import TABLE
from optax_cases import ALL, NAMED, PAIRED, SCHEDULES, OptaxCase

STEPS = 10
SHAPES = {"scale": (), "bias": (5,), "tall": (8, 4), "wide": (4, 6), "conv": (3, 2, 2, 4)}

# XLA rounds after each operation, as torch does, instead of keeping float32 within a fusion.
XLA = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}

# |difference| <= MOVEMENT x movement of the parameter + ULPS x eps x max |parameter|: the second
# term is the rounding of the parameter itself. A state entry has STATE x its largest value instead
# of movement: what estimates curvature is a difference of nearly equal things. Most bfloat16 cases
# are equal bit for bit; a reciprocal square root may round the other way.
MOVEMENT, STATE = bounds.MOVEMENT, bounds.STATE
ULPS = {"float32": bounds.EXACT_UNITS, "bfloat16": 1}

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # optax's own


def _tree(rng: np.random.Generator, dtype: Any, batch: int = 0) -> Any:
    lead = (batch,) if batch else ()
    return {
        name: jnp.asarray(rng.normal(size=(*lead, *shape)), dtype) for name, shape in SHAPES.items()
    }


def _loss(params: Any) -> jax.Array:
    """Bowls of many curvatures, so that ten steps do not reach the bottom."""
    x = jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(params)])
    return jnp.sum(jnp.geomspace(0.01, 1.0, x.size) * (x - 0.3) ** 2) + 0.001 * jnp.sum(x) ** 2


def _step(case: OptaxCase) -> Any:
    tx = optax.with_extra_args_support(case.make())

    def step(grads: Any, state: Any, params: Any, extra: Any) -> Any:
        if case.descends or case.loss:
            value, grads = jax.value_and_grad(_loss)(params)
            given = {"value": value, "grad": grads, "value_fn": _loss, "obj_fn": _loss}
            extra = {name: given[name] for name in case.loss}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return tx, step


def _structs(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _in_jax(step: Any, grads: list[Any], state: Any, params: Any, extras: list[Any]) -> Any:
    jitted = jax.jit(step, compiler_options=XLA)
    for grad, extra in zip(grads, extras, strict=True):
        params, state = jitted(grad, state, params, extra)
    return params, state


def _in_torch(step: Any, grads: list[Any], state: Any, params: Any, extras: list[Any]) -> Any:
    programs: dict[Any, tuple[Lowered, Any]] = {}
    avals = _structs((state, params))
    tensors = [to_torch(x) for x in jax.tree.leaves((state, params))]
    tree = jax.tree.structure((state, params))
    for grad, extra in zip(grads, extras, strict=True):
        # some states change their structure or a dtype on the first update, as under jit
        key = (tree, tuple(jax.tree.leaves(avals)))
        if key not in programs:
            jaxpr, result = jax.make_jaxpr(step, return_shape=True)(grad, *avals, extra)
            programs[key] = lower_jaxpr(jaxpr), jax.tree.structure(result)
        program, structure = programs[key]
        around = [[to_torch(x) for x in jax.tree.leaves(t)] for t in (grad, extra)]
        out = program(*around[0], *tensors, *around[1])
        for tensor, aval in zip(out, program.out_avals, strict=True):
            assert tensor.dtype == torch_dtype(aval.dtype)
            assert tuple(tensor.shape) == physical_shape(aval)
        params, state = jax.tree.unflatten(structure, out)
        tensors, tree = jax.tree.flatten((state, params))
        new = jax.tree.unflatten(structure, program.out_avals)
        avals = (new[1], new[0])
    return jax.tree.map(to_jax, (params, state), (avals[1], avals[0]))


def _close(got: Any, want: Any, allowed: float, rounding: float) -> bool:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return False
    finite = np.isfinite(want)
    size = np.max(np.abs(want[finite]), initial=0.0)
    difference = np.max(np.abs(got - want)[finite], initial=0.0)
    return bool(difference <= allowed + rounding * size)


def check(case: OptaxCase, dtype: str) -> None:
    """Ten steps of ``case`` in JAX and in torch end at the same parameters and state."""
    rng = np.random.default_rng(0)
    tx, step = _step(case)
    first = _tree(rng, dtype)
    if not case.scalars:
        del first["scale"]
    grads = [_tree(rng, dtype, case.batch) for _ in range(STEPS)]
    grads = [{name: grad[name] for name in first} for grad in grads]
    extras = [case.extra(i) for i in range(STEPS)]
    start = case.parameters(first)
    state = tx.init(start)
    want_params, want_state = _in_jax(step, grads, state, start, extras)
    got_params, got_state = _in_torch(step, grads, state, start, extras)

    rounding = ULPS[dtype] * float(jnp.finfo(dtype).eps)
    leaves = zip(*(jax.tree.leaves(t) for t in (start, want_params, got_params)), strict=True)
    for old, want, got in leaves:
        assert got.dtype == want.dtype
        movement = np.max(np.abs(np.asarray(want, np.float64) - np.asarray(old, np.float64)))
        assert _close(got, want, MOVEMENT[dtype] * movement, rounding), f"{got} is not {want}"
    assert jax.tree.structure(got_state) == jax.tree.structure(want_state)
    for (path, want), got in zip(
        jax.tree_util.tree_leaves_with_path(want_state), jax.tree.leaves(got_state), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert got.dtype == want.dtype, where
        if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        if not jnp.issubdtype(want.dtype, jnp.inexact):  # counts, keys and random bits: equal
            assert np.array_equal(got, want), where
        else:
            size = float(np.max(np.abs(np.asarray(want, np.float64)), initial=0.0))
            assert _close(got, want, STATE[dtype] * size, rounding), f"{where}: {got} is not {want}"


def _ids(case: OptaxCase) -> str:
    return case.name


LOWERED = (*ALL, *PAIRED)


@pytest.mark.parametrize("case", LOWERED, ids=_ids)
def test_float32(case: OptaxCase) -> None:
    check(case, "float32")


@pytest.mark.parametrize(
    "case", [c for c in LOWERED if c.bfloat16 is None and c not in SCHEDULES], ids=_ids
)
def test_bfloat16(case: OptaxCase) -> None:
    check(case, "bfloat16")


def test_named_optimizers_without_a_jax_loss() -> None:
    """What a torch optimizer can run: all but those that trace the loss in JAX."""
    assert len(NAMED) == 50
    assert {c.public_name for c in NAMED if c.loss} == {"optax.lbfgs", "optax.contrib.sophia"}


def _public(module: Any) -> dict[str, Any]:
    return {n: f for n, f in vars(module).items() if not n.startswith("_") and callable(f)}


def test_every_public_transformation_is_a_case() -> None:
    covered = {case.public_name.rpartition(".")[2] for case in LOWERED}
    missing = set()
    for module in (optax, optax.contrib, optax.transforms, optax.schedules):
        for name, factory in _public(module).items():
            if not isinstance(factory, types.FunctionType | functools.partial):
                continue
            made = str(inspect.signature(factory).return_annotation)
            if re.search(r"GradientTransformation|Schedule\b", made) and name not in covered:
                missing.add(name)
    assert missing == NOT_CASES


# Adapters of a transformation's signature, not transformations.
NOT_CASES = {"with_extra_args_support"}


def _primitives(jaxpr: Any) -> set[str]:
    found = {eqn.primitive.name for eqn in jaxpr.eqns}
    for eqn in jaxpr.eqns:
        for inner in core.jaxprs_in_params(eqn.params):
            found |= _primitives(inner)
    return found


def test_the_table_holds_every_primitive_of_optax() -> None:
    used: set[str] = set()
    for case in LOWERED:
        tx, step = _step(case)
        params = _tree(np.random.default_rng(0), "float32")
        if not case.scalars:
            del params["scale"]
        grads = jax.tree.map(lambda p, b=case.batch: jnp.stack([p] * b) if b else p, params)
        start = case.parameters(params)
        jaxpr = jax.make_jaxpr(step)(grads, tx.init(start), start, case.extra(0))
        used |= _primitives(jaxpr.jaxpr)
    assert len(used) >= 53
    assert used <= set(TABLE), f"without a lowering: {sorted(used - set(TABLE))}"
