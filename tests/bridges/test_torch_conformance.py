"""Ten steps of every chain through `TorchBridge` beside JAX: all of optax, and all of ours."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import bounds
import chainrule
from chainrule import TorchBridge
from chainrule.bridges.lowering import to_jax, to_torch
from chainrule.bridges.lowering.backends import parts
from chainrule.bridges.step.settled import NeedsLossFunction, StateChanges
from optax_cases import ALL, NAMED, OptaxCase
from registry import CASES, CHAINS, Case

STEPS = 10
SHAPES = {"bias": (5,), "conv": (3, 2, 2, 4), "scale": (), "tall": (8, 4), "wide": (4, 6)}
BFLOAT16 = ("bias", "tall")  # in the mixed tree

# |difference| <= factor x movement of the tensor (of the state: x its size) + EXACT_UNITS x eps x max |tensor|.
MOVEMENT, STATE, MIXED = bounds.MOVEMENT, bounds.STATE, bounds.MIXED
ULPS = bounds.EXACT_UNITS
XLA = {"xla_allow_excess_precision": False}

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # optax's own


def tree(rng: np.random.Generator, shapes: Any, mixed: bool = False) -> dict[str, jax.Array]:
    return {
        name: jnp.asarray(
            rng.normal(size=shape), "bfloat16" if mixed and name in BFLOAT16 else "float32"
        )
        for name, shape in shapes.items()
    }


def run_jax(tx: Any, params: Any, grads: list[Any], values: list[Any]) -> tuple[Any, Any]:
    tx = optax.with_extra_args_support(tx)
    kinds = {parameter.kind for parameter in inspect.signature(tx.update).parameters.values()}
    takes_extras = inspect.Parameter.VAR_KEYWORD in kinds  # optax.contrib.sam takes none

    def step(grad, state, params, value):
        extra = {"grad": grad, "value": value} if takes_extras else {}
        updates, state = tx.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, compiler_options=XLA)
    state = tx.init(params)
    for grad, value in zip(grads, values, strict=True):
        state = chainrule.retier(state, grad, params)  # the bridge does so by itself
        params, state = jitted(grad, state, params, value)
    return params, state


def run_torch(
    tx: Any, first: Any, grads: list[Any], values: list[Any], **options: Any
) -> TorchBridge:
    params = {name: torch.nn.Parameter(to_torch(value)) for name, value in first.items()}
    optimizer = TorchBridge(tx, params.items(), **options)
    for grad, value in zip(grads, values, strict=True):
        for name, p in params.items():
            p.grad = to_torch(grad[name])
        optimizer.step(lambda value=value: float(value))
    return optimizer


def assert_close(got: Any, want: Any, bound: float, where: str) -> None:
    """Equal dtypes, and no difference above `bound` and the rounding of the numbers themselves."""
    assert got.shape == want.shape and got.dtype == want.dtype, where
    if jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
        got, want = jax.random.key_data(got), jax.random.key_data(want)
    if not jnp.issubdtype(want.dtype, jnp.inexact):  # counts, keys and random bits
        assert np.array_equal(got, want), where
        return
    rounding = ULPS * float(jnp.finfo(want.dtype).eps) * size(want)
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=bound + rounding, err_msg=where)


def size(array: Any) -> float:
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return 0.0
    return float(np.max(np.abs(np.asarray(array, np.float64)), initial=0.0))


def check(
    tx: Any, first: Any, grads: list[Any], values: list[Any], mixed: bool = False, **options: Any
) -> None:
    want, want_state = run_jax(tx, first, grads, values)
    optimizer = run_torch(tx, first, grads, values, **options)
    group = optimizer.param_groups[0]
    for name, p in zip(group["param_names"], group["params"], strict=True):
        factor = (MIXED if mixed else MOVEMENT)[want[name].dtype.name]
        assert_close(to_jax(p), want[name], factor * size(want[name] - first[name]), name)
    got_state = optimizer.jax_state()
    assert jax.tree.structure(got_state) == jax.tree.structure(want_state)
    for (path, leaf), got in zip(
        jax.tree_util.tree_leaves_with_path(want_state), jax.tree.leaves(got_state), strict=True
    ):
        factor = (MIXED if mixed else STATE).get(str(leaf.dtype), 0.0)
        assert_close(got, leaf, factor * size(leaf), jax.tree_util.keystr(path))


def check_optax(case: OptaxCase, mixed: bool, **options: Any) -> None:
    rng = np.random.default_rng(0)
    scalars = case.scalars and case.name not in NO_SCALARS
    shapes = {name: shape for name, shape in SHAPES.items() if scalars or shape}
    first = tree(rng, shapes, mixed)
    grads = [tree(rng, shapes, mixed) for _ in range(STEPS)]
    values = [case.extra(i).get("value", jnp.float32(1.0)) for i in range(STEPS)]
    check(case.make(), first, grads, values, mixed, **options)


# Its update of a scalar has shape [1], which JAX broadcasts the parameter to.
NO_SCALARS = {"optax.scale_by_distance_over_gradients"}
# They add entries to their state at the first update.
GROWING = {"optax.monitor", "optax.measure_with_ema"}

RUN = [c for c in ALL if not c.loss and not c.batch and c.name not in GROWING]
RUN_NAMED = [c for c in RUN if c in NAMED]


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager steps take even these small tensors part by part."""
    monkeypatch.setattr(parts, "PART", 5)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
def test_optax_float32(case: OptaxCase) -> None:
    check_optax(case, mixed=False)


@pytest.mark.parametrize(
    "case", [c for c in RUN_NAMED if c.bfloat16 is None], ids=lambda case: case.name
)
def test_optax_mixed(case: OptaxCase) -> None:
    check_optax(case, mixed=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", RUN_NAMED, ids=lambda case: case.name)
def test_optax_xla_engine(case: OptaxCase) -> None:
    check_optax(case, mixed=False, engine="xla")


@pytest.mark.slow
@pytest.mark.parametrize("case", RUN_NAMED, ids=lambda case: case.name)
def test_optax_compiled(case: OptaxCase) -> None:
    check_optax(case, mixed=False, compile=True)


def test_how_many_of_the_named_optimizers_run() -> None:
    assert len(NAMED) == 50
    assert len(RUN_NAMED) == 47  # but lbfgs with a line search, sophia and dpsgd


@pytest.mark.parametrize("case", [c for c in ALL if c.name in GROWING], ids=lambda case: case.name)
def test_a_chain_whose_state_grows_is_refused(case: OptaxCase) -> None:
    with pytest.raises(StateChanges, match="changes the structure of its state"):
        TorchBridge(case.make(), [torch.nn.Parameter(torch.ones(3))])


@pytest.mark.parametrize("case", [c for c in ALL if c.loss], ids=lambda case: case.name)
def test_a_chain_that_traces_the_loss_is_refused_by_name(case: OptaxCase) -> None:
    params = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in SHAPES.items()]
    with pytest.raises(NeedsLossFunction, match=r"asks for `(value_fn|obj_fn|grad_fn)`"):
        TorchBridge(case.make(), params)


@pytest.mark.parametrize("case", [c for c in ALL if c.batch], ids=lambda case: case.name)
def test_a_chain_of_per_example_gradients_is_refused(case: OptaxCase) -> None:
    params = [(name, torch.nn.Parameter(torch.ones(shape))) for name, shape in SHAPES.items()]
    with pytest.raises(ValueError, match="batch dimension"):
        TorchBridge(case.make(), params)


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours(case: Case) -> None:
    check_ours(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
def test_ours_compiled(case: Case) -> None:
    check_ours(case, compile=True)


def check_ours(case: Case, **options: Any) -> None:
    rng = np.random.default_rng(0)
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="."): shape
        for path, shape in jax.tree_util.tree_leaves_with_path(
            case.shapes, is_leaf=lambda x: isinstance(x, tuple)
        )
    }
    first, grads = tree(rng, shapes), [tree(rng, shapes) for _ in range(STEPS)]
    check(case.make(), first, grads, [jnp.float32(1.0)] * STEPS, **options)
