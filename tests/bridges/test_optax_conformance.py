"""All of optax, lowered to torch and run beside JAX.

One step is ``(gradients, state, params) -> (apply_updates(params, updates), state)``: jitted by
XLA on one side, ``lower`` of the same function on the other, each fed its own results, for ten
steps on a tree of a scalar, a vector, matrices and a convolution kernel.
"""

import inspect
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from optax_cases import ALL, NAMED, SCHEDULES, TRANSFORMS, VARIANTS, WRAPPERS, OptaxCase

from chainrule.bridges.lowering import Lowered, lower, to_jax, to_torch, torch_dtype
from chainrule.bridges.lowering.convert import physical_shape

STEPS = 10
SHAPES = {"scale": (), "bias": (5,), "tall": (8, 4), "wide": (4, 6), "conv": (3, 2, 2, 4)}

# XLA rounds after each operation, as torch does, instead of keeping float32 within a fusion.
XLA = {"xla_allow_excess_precision": False, "xla_backend_optimization_level": 0}

# |difference| <= MOVEMENT[dtype] x movement of the tensor + ULPS x eps x max |tensor|. The second
# term is the rounding of the parameter itself. In bfloat16, XLA keeps float32 between the
# operations it fuses and torch rounds after each, so the two agree to a few roundings of the
# update, 2^-8 each.
MOVEMENT = {"float32": 2e-5, "bfloat16": 0.06}
ULPS = 4

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # optax's own

matched: Counter[str] = Counter()


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
    programs: dict[Any, Lowered] = {}
    avals = _structs((state, params))
    tensors = [to_torch(x) for x in jax.tree.leaves((state, params))]
    tree = jax.tree.structure((state, params))
    for grad, extra in zip(grads, extras, strict=True):
        # some states change their structure or a dtype on the first update, as under jit
        key = (tree, tuple(jax.tree.leaves(avals)))
        if key not in programs:
            programs[key] = lower(step, grad, *avals, extra)
        program = programs[key]
        around = [[to_torch(x) for x in jax.tree.leaves(t)] for t in (grad, extra)]
        out = program(*around[0], *tensors, *around[1])
        for tensor, aval in zip(out, program.out_avals, strict=True):
            assert tensor.dtype == torch_dtype(aval.dtype)
            assert tuple(tensor.shape) == physical_shape(aval)
        params, state = jax.tree.unflatten(program.out_tree, out)
        tensors, tree = jax.tree.flatten((state, params))
        new = jax.tree.unflatten(program.out_tree, program.out_avals)
        avals = (new[1], new[0])
    return jax.tree.map(to_jax, (params, state), (avals[1], avals[0]))


def _close(got: Any, want: Any, scale: float, factor: float, eps: float) -> bool:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if not np.array_equal(np.isfinite(got), np.isfinite(want)):
        return False
    finite = np.isfinite(want)
    size = np.max(np.abs(want[finite]), initial=0.0)
    difference = np.max(np.abs(got - want)[finite], initial=0.0)
    return bool(difference <= factor * scale + ULPS * eps * size)


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
    state = tx.init(first)
    want_params, want_state = _in_jax(step, grads, state, first, extras)
    got_params, got_state = _in_torch(step, grads, state, first, extras)

    eps, factor = float(jnp.finfo(dtype).eps), MOVEMENT[dtype]
    for name, start in first.items():
        got, want = got_params[name], want_params[name]
        assert got.dtype == want.dtype
        movement = np.max(np.abs(np.asarray(want, np.float64) - np.asarray(start, np.float64)))
        assert _close(got, want, movement, factor, eps), f"{name}: {got} is not {want}"
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
            assert _close(got, want, size, factor, eps), f"{where}: {got} is not {want}"


def _ids(case: OptaxCase) -> str:
    return case.name


@pytest.mark.parametrize("case", ALL, ids=_ids)
def test_float32(case: OptaxCase) -> None:
    check(case, "float32")


@pytest.mark.parametrize("case", [c for c in ALL if c.bfloat16 is None], ids=_ids)
def test_bfloat16(case: OptaxCase) -> None:
    check(case, "bfloat16")
