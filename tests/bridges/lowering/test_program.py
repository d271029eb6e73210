"""The lowered program: its interface, its dtypes, where its nodes come from, what it refuses."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import fx

import bounds
from chainrule.bridges.lowering import (
    Lowered,
    LoweringError,
    UnsupportedPrimitive,
    lower,
    ops,
    to_jax,
    to_torch,
    torch_dtype,
)
from chainrule.bridges.lowering import program as program_module
from chainrule.bridges.lowering.builder import Shared, Target, build
from chainrule.bridges.lowering.rules import TABLE
from chainrule.bridges.lowering.rules.elementwise import ELEMENTWISE


def struct(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def targets(lowered: Lowered) -> list[Any]:
    return [n.target for n in lowered.graph.nodes if n.op == "call_function"]


def adamw(n: int) -> tuple[Any, Any, Any]:
    params = {f"p{i}": struct(4, 3) if i % 2 else struct(3) for i in range(n)}
    tx = optax.adamw(1e-3)
    return tx, params, jax.eval_shape(tx.init, params)


def on_meta(*args: Any) -> list[torch.Tensor]:
    return [to_torch(a, "meta") for a in jax.tree.leaves(args)]


def synchronises(lowered: Lowered) -> bool:
    """Whether a run reads a value on the host: a heavy ``cond``, or a ``while``, somewhere."""
    nodes = [node for graph in lowered.graphs for node in graph.nodes]
    return any(node.target in (ops.branch, ops.while_loop) for node in nodes)


# ---- interface -----------------------------------------------------------------------------


def test_inputs_and_outputs_are_the_leaves() -> None:
    tx, params, state = adamw(2)
    lowered = lower(tx.update, params, state, params)
    assert isinstance(lowered.graph, fx.Graph)
    want = jax.eval_shape(tx.update, params, state, params)
    assert [(a.shape, a.dtype) for a in lowered.out_avals] == [
        (a.shape, a.dtype) for a in jax.tree.leaves(want)
    ]
    names = [n.name for n in lowered.graph.find_nodes(op="placeholder")]
    assert names[:2] == ["in_0_p0", "in_0_p1"]
    assert len(names) == len(jax.tree.leaves((params, state, params))) == 9


def test_literals_stay_python_scalars() -> None:
    tx, params, state = adamw(1)
    nodes = lower(tx.update, params, state, params).graph.nodes
    assert not any(n.target in (torch.full, torch.tensor) or n.op == "get_attr" for n in nodes)


def test_broadcast_constants_become_scalars() -> None:
    constants = lower(lambda x: (x + jnp.full((3,), 2.0)) * (0.5 * jnp.ones_like(x)), struct(3))
    assert targets(constants) == [torch.add, torch.mul]
    broadcast = lower(lambda x, s: x * jnp.broadcast_to(s, (3,)), struct(3), struct())
    assert targets(broadcast) == [torch.mul]


def test_scalars_with_the_axes_of_a_tensor_are_scalars() -> None:
    """Norms that keep their axes, as optax's trust ratios: what is computed of them is computed once."""

    def scaled(x: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(x * x, keepdims=True))
        return jnp.where(norm > 1, x / norm, x) * jnp.reshape(norm, ())

    lowered = lower(scaled, struct(3, 2))
    shapes = {tuple(n.meta["aval"].shape) for n in lowered.graph.nodes if "aval" in n.meta}
    assert shapes == {(), (3, 2)}
    x = np.array([[1, 2], [-2, 4], [0, 0]], np.float32)  # of norm 5: exact
    assert lowered(torch.tensor(x))[0].tolist() == x.tolist()
    outputs = lower(lambda x: (jnp.sum(x, keepdims=True) * 2, x), struct(3, 2))(torch.ones(3, 2))
    assert outputs[0].tolist() == [[12.0]]


def test_common_subexpressions_and_dead_code() -> None:
    lowered = lower(lambda x: (jnp.sin(x) + 1.0, jnp.sin(x) * jnp.float32(1.0) - 0.0), struct(3))
    assert targets(lowered).count(torch.sin) == 1
    assert torch.mul not in targets(lowered)
    assert torch.sub not in targets(lowered)
    kept = lower(lambda x: jnp.where(True, x, jnp.cos(x)) + 1, struct(3))
    assert targets(kept) == [torch.add]


def test_a_wide_product_that_is_rounded_is_one_product_in_half_precision() -> None:
    half = struct(8, 8, dtype=jnp.bfloat16)

    def product(x: Any, y: Any, rounded: bool) -> Any:
        wide = jnp.matmul(x.T, y, preferred_element_type=jnp.float32)
        return wide.astype(jnp.bfloat16) if rounded else wide

    once = lower(lambda x, y: product(x, y, True), half, half)
    kept = lower(lambda x, y: product(x, y, False), half, half)
    assert targets(once) == [torch.permute, torch.mm]
    x, y = (torch.randn(8, 8, dtype=torch.bfloat16) for _ in range(2))
    exact = x.double().T @ y.double()
    bound = torch.from_numpy(bounds.product(x.double().T, y.double()))
    assert torch.all((kept(x, y)[0] - exact).abs() <= bound)
    rounded = bound + bounds.unit("bfloat16") * (exact.abs() + bound)
    assert torch.all((once(x, y)[0] - exact).abs() <= rounded)


def test_the_square_of_a_magnitude_is_that_of_the_number_unless_it_is_complex() -> None:
    def f(x: Any) -> Any:
        return jnp.abs(x) * jnp.abs(x)

    assert targets(lower(f, struct(3))) == [torch.mul]
    assert torch.abs in targets(lower(f, struct(3, dtype=jnp.complex64)))
    x = torch.tensor([-2.0, 0.0, -torch.inf, torch.nan])
    (found,) = lower(f, struct(4))(x)
    torch.testing.assert_close(found, x.abs() ** 2, rtol=0, atol=0, equal_nan=True)


def test_passthrough_and_outputs_of_their_own() -> None:
    def fn(x: Any, y: Any) -> Any:
        z = x + y
        return y, x.reshape(6), z, z.T, jnp.broadcast_to(y[0, 0], (2, 2)), jnp.full((2,), 3.0)

    lowered = lower(fn, struct(2, 3), struct(2, 3))
    assert lowered.passthrough == {0: 1}
    x, y = torch.ones(2, 3), torch.ones(2, 3)
    outputs = lowered(x, y)
    assert outputs[0] is y
    storages = [t.untyped_storage().data_ptr() for t in (x, y, *outputs[1:])]
    assert len(set(storages)) == len(storages)
    outputs[4][0, 0] = 7.0
    assert outputs[4][1, 1] == 1.0


def test_condition_that_hands_an_operand_through() -> None:
    def fn(p: Any, x: Any) -> Any:
        return jax.lax.cond(p, lambda y: y, lambda y: jnp.linalg.cholesky(y), x)

    lowered = lower(fn, struct(dtype=jnp.bool_), struct(2, 2))
    x = torch.eye(2)
    assert synchronises(lowered)
    (out,) = lowered(torch.tensor(True), x)
    assert out is not x
    assert out.data_ptr() != x.data_ptr()


def test_cheap_conditions_do_not_synchronise() -> None:
    tx = optax.apply_if_finite(optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), 3)
    params = {"w": struct(3)}
    state = jax.eval_shape(tx.init, params)
    lowered = lower(tx.update, params, state, params, device="meta")
    lowered(*on_meta(params, state, params))  # a tensor on the meta device has no value to read
    assert not synchronises(lowered)


@pytest.mark.parametrize("name", ["adamw", "lion", "noisy_sgd", "adafactor", "novograd", "lamb"])
def test_nothing_assumes_the_cpu(name: str) -> None:
    keywords = {"key": jax.random.key(0)} if name == "noisy_sgd" else {}
    tx = getattr(optax, name)(0.1, **keywords)
    params = {"w": struct(4, 3), "b": struct(3)}
    state = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype),
        tx.init(jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), params)),
    )
    lowered = lower(tx.update, params, state, params, device="meta")
    outputs = lowered(*on_meta(params, state, params))
    assert {t.device.type for t in outputs} == {"meta"}
    assert [t.dtype for t in outputs] == [torch_dtype(a.dtype) for a in lowered.out_avals]


def test_default_dtype_does_not_matter() -> None:
    lowered = lower(
        lambda x, n: (jnp.where(x > 0, 1.0, 0.0), 0.9**n), struct(2), struct(dtype=jnp.int32)
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        outputs = lowered(
            torch.tensor([1.0, -1.0], dtype=torch.float32), torch.tensor(2, dtype=torch.int32)
        )
    finally:
        torch.set_default_dtype(before)
    assert [t.dtype for t in outputs] == [torch.float32, torch.float32]


def test_float64_leaves_turn_on_x64() -> None:
    tx = optax.adam(0.1)
    with jax.enable_x64(True):
        x = jnp.asarray([1.0, -2.0], jnp.float64)
        state = tx.init(x)
        want, _ = tx.update(x / 3, state)
        want = np.asarray(want)
        avals = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, state))
        tensors = [to_torch(a) for a in jax.tree.leaves((x / 3, state))]
    update = lower(tx.update, *avals)(*tensors)[0]
    assert update.dtype == torch.float64
    np.testing.assert_allclose(update.numpy(), want, rtol=bounds.gamma(24, "float64"))


@pytest.mark.parametrize(
    "tx",
    [optax.adam(0.1), optax.contrib.split_real_and_imaginary(optax.lion(0.1))],
    ids=["adam", "split"],
)
def test_complex_leaves(tx: Any) -> None:
    x = jnp.asarray([1 + 2j, -3j, 0.5], jnp.complex64)
    state = tx.init(x)
    want = jax.jit(tx.update)(x, state, x)
    got = lower(tx.update, x, state, x)(*map(to_torch, jax.tree.leaves((x, state, x))))
    for tensor, array in zip(got, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(to_jax(tensor), array, rtol=bounds.ELEMENTWISE)


@pytest.mark.parametrize("name", ["adamw", "lamb", "adafactor", "novograd", "adamax"])
def test_leaves_of_no_elements(name: str) -> None:
    tx = getattr(optax, name)(0.1)
    params = {"empty": jnp.zeros((0, 3)), "w": jnp.ones((2, 3))}
    state = tx.init(params)
    want = jax.jit(tx.update)(params, state, params)
    lowered = lower(tx.update, params, state, params)
    got = lowered(*map(to_torch, jax.tree.leaves((params, state, params))))
    for tensor, array in zip(got, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(to_jax(tensor), array, rtol=bounds.ELEMENTWISE)


def test_gradients_are_not_recorded() -> None:
    (out,) = lower(lambda x: x * 2, struct(2))(torch.ones(2, requires_grad=True))
    assert not out.requires_grad


def test_closed_over_arrays_are_constants() -> None:
    table, rate = jnp.arange(3.0), jnp.float32(0.5)
    lowered = lower(lambda x: x * table * rate, struct(3))
    assert list(lowered.attributes) == ["constant_0"]
    np.testing.assert_array_equal(lowered(torch.ones(3))[0], np.arange(3.0) * 0.5)


# ---- provenance ----------------------------------------------------------------------------


def test_nodes_name_their_link() -> None:
    tx = optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.1))
    params = {"w": struct(3)}
    lowered = lower(tx.update, params, jax.eval_shape(tx.init, params), params)
    nodes = [n for n in lowered.graph.nodes if n.op == "call_function"]
    assert {n.meta["link"] for n in nodes} == {"clip", "scale_by_adam", "add_decayed_weights"}
    assert all("optax/" in n.meta["source"] for n in nodes)
    jitted = lower(jax.jit(tx.update), params, jax.eval_shape(tx.init, params), params)
    links = {n.meta["link"] for n in jitted.graph.nodes if n.op == "call_function"}
    assert links == {"clip", "scale_by_adam", "add_decayed_weights"}


def test_unsupported_primitive_names_itself_its_link_and_the_remedy() -> None:
    def scale_by_bessel() -> optax.GradientTransformation:
        def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
            return jax.tree.map(jax.lax.bessel_i0e, updates), state

        return optax.GradientTransformation(lambda params: (), update_fn)

    tx = optax.chain(optax.scale(2.0), scale_by_bessel())
    with pytest.raises(UnsupportedPrimitive) as error:
        lower(tx.update, struct(2), ((), ()))
    message = str(error.value)
    assert "`bessel_i0e` in scale_by_bessel" in message
    assert "test_program.py:" in message
    assert 'engine="xla"' in message
    assert error.value.primitive == "bessel_i0e"
    assert error.value.link == "scale_by_bessel"


def test_callbacks_are_refused() -> None:
    with pytest.raises(UnsupportedPrimitive, match="callback"):
        lower(lambda x: jax.pure_callback(np.sin, struct(2), x), struct(2))


def test_a_generator_without_integer_torch_operations_is_refused() -> None:
    key = jax.random.key(0, impl="rbg")
    with pytest.raises(UnsupportedPrimitive, match="rng_bit_generator"):
        lower(lambda k: jax.random.bits(k, (2,)), key)


# ---- conversions ---------------------------------------------------------------------------

ARRAYS = [
    jnp.asarray([1.5, -0.0, np.nan, np.inf], dtype)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
] + [
    jnp.asarray([True, False]),
    jnp.asarray([-(2**31), 2**31 - 1], jnp.int32),
    jnp.asarray(np.array([0, 2**31, 2**32 - 1], np.uint32)),
    jnp.asarray([0, 65535], jnp.uint16),
    jnp.asarray([-128, 127], jnp.int8),
    jnp.asarray([0, 255], jnp.uint8),
    jnp.asarray([1 + 2j, -3j], jnp.complex64),
    jnp.asarray(3.0),
    jnp.zeros((0, 2)),
    jax.random.key(2**31 + 1),
    jax.random.split(jax.random.key(0), (2, 3)),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{list(a.shape)}")
def test_conversion_is_exact_both_ways(array: jax.Array) -> None:
    tensor = to_torch(array)
    back = to_jax(tensor, array)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array, back = jax.random.key_data(array), jax.random.key_data(back)
    assert np.asarray(array).tobytes() == np.asarray(back).tobytes()
    assert to_torch(jax.ShapeDtypeStruct(array.shape, array.dtype)).shape == tensor.shape


def test_conversion_without_a_struct() -> None:
    assert to_jax(torch.ones(2, dtype=torch.bfloat16)).dtype == jnp.bfloat16
    assert to_torch(2.5).dtype == torch.float32
    strided = torch.arange(6.0).reshape(2, 3).T
    np.testing.assert_array_equal(to_jax(strided), strided.numpy())


def test_conversion_refuses_what_it_would_round() -> None:
    with pytest.raises(LoweringError, match="64-bit"):
        to_jax(torch.ones(2, dtype=torch.float64))
    with pytest.raises(LoweringError, match="cannot stand for"):
        to_jax(torch.ones(2), struct(2, dtype=jnp.int32))
    with pytest.raises(LoweringError, match="float8"):
        torch_dtype(jnp.float8_e4m3fn)


# ---- time ----------------------------------------------------------------------------------


def test_lowering_time_is_linear_in_the_leaves() -> None:
    def seconds(n: int) -> float:
        tx, params, state = adamw(n)
        jaxpr = jax.make_jaxpr(tx.update)(params, state, params)
        times = []
        for _ in range(3):
            start = time.process_time()
            with program_module.collector_paused():
                device, target = torch.device("cpu"), Target("cpu", False)
                build(jaxpr, Shared(TABLE, frozenset(ELEMENTWISE), device, target, {}, {}, {}))
            times.append(time.process_time() - start)
        return min(times)

    few, many = seconds(50), seconds(500)
    assert many < 20 * few  # ten times the leaves; twice that is the noise of a shared machine
