"""Scalars outside torch: the same values as in torch, in as few calls."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor

import bounds
from chainrule.bridges.lowering import Lowered, lower, ops
from chainrule.bridges.lowering.backends.scalar_program import scalar_calls
from chainrule.bridges.lowering.executor import Executor, Registers
from chainrule.bridges.lowering.passes.infer_values import infer_values
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native import _kernel

COUNT = 9
SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
SPECIAL = [0.0, -0.0, 1.0, -1.5, 3e-40, 2.5, -7.0, np.inf, -np.inf, np.nan]
INTEGERS = [0, 1, -1, 2, 7, -200, 2**31 - 1, -(2**31)]


def scalar_step(lowered: Lowered, targets: Sequence[int]) -> Executor:
    """The program with its scalars outside torch, whatever else it holds."""
    program = infer_values(StepProgram.of(lowered, targets))
    registers = Registers(program)
    return Executor(program, registers, scalar_calls(program, registers), ())


def arithmetic(xs: Any, y: Any) -> Any:
    return [jnp.where(x > y, x * y + 1, y / x - 0.1) for x in xs]


def counts(xs: Any, y: Any) -> Any:
    steps = [x.astype(jnp.int32) for x in xs]  # in torch: it saturates
    held = [jnp.where(n < 4, n + 1, n) for n in steps]
    return held, [(n == 3) & (x > y) for n, x in zip(held, xs, strict=True)], [n * y for n in held]


def a_vector_and_its_entries(xs: Any, y: Any) -> Any:
    sums = jnp.cumsum(jnp.stack([2 * x for x in xs]))
    return [jnp.sqrt(sums[k]) for k in range(COUNT)], sums * y


def between_two_sums(xs: Any, y: Any) -> Any:
    first = jnp.sum(jnp.arange(4.0) * (y + 1))
    second = jnp.max(jnp.arange(3.0) * (first - 2) ** 2)
    return [x + second for x in xs], first


def a_condition(xs: Any, y: Any) -> Any:
    found = jax.lax.cond(y > 0.5, lambda x: jnp.cumsum(x)[-1:], lambda x: x[:1], jnp.stack(xs))
    return [x / found[0] for x in xs], jax.lax.cond(xs[0] > y, lambda: xs[1], lambda: y)


def stacks(xs: Any, y: Any) -> Any:
    return jnp.stack([-x for x in xs]), jnp.stack([y, xs[0]]), jnp.full((), 3.0), 2 * y


def numbers(xs: Any, y: Any) -> Any:
    return [x * (-0.0 if k % 2 else 0.0) for k, x in enumerate(xs)], jnp.minimum(y, 1e-45), y == 7


FUNCTIONS = [
    *(arithmetic, counts, a_vector_and_its_entries, between_two_sums, a_condition, stacks),
    numbers,
]


def made(function: Callable[..., Any]) -> tuple[Any, Callable[..., Any], list[Tensor]]:
    """The lowered function, its scalar step, and memory for its results, which are its last inputs."""
    shapes = jax.eval_shape(function, [SCALAR] * COUNT, SCALAR)
    lowered = lower(lambda xs, y, _: function(xs, y), [SCALAR] * COUNT, SCALAR, shapes)
    targets = [COUNT + 1 + i for i in range(len(lowered.out_avals))]
    memory = [
        torch.zeros(aval.shape, dtype=getattr(torch, str(aval.dtype))) for aval in lowered.out_avals
    ]
    return lowered, scalar_step(lowered, targets), memory


@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_is_torch(function: Callable[..., Any]) -> None:
    lowered, step, memory = made(function)
    for y in (0.7, 0.2):  # the second step sees nothing of the first
        inputs = [*(torch.tensor(0.3 + float(i)) for i in range(COUNT)), torch.tensor(y)]
        expected = lowered(*inputs, *memory)
        step([*inputs, *memory])
        for got, want in zip(memory, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=bounds.gamma(16), atol=0)
            if want.is_floating_point():
                assert torch.equal(got.signbit(), want.signbit())


def test_scalars_change_places_without_a_loss() -> None:
    lowered = lower(lambda a, b, c: (b, a + b, a), SCALAR, SCALAR, SCALAR)
    values = [torch.tensor(x) for x in (1.0, 2.0, 4.0)]
    scalar_step(lowered, (0, 1, 2))(values)
    assert [x.item() for x in values] == [2.0, 3.0, 1.0]


def test_an_input_that_is_handed_on_is_read_before_it_is_renewed() -> None:
    vector = jax.ShapeDtypeStruct((3,), jnp.float32)
    lowered = lower(lambda a, _, s: (jnp.stack([s, 2 * s, 3 * s]), a, s), vector, vector, SCALAR)
    inputs = [torch.zeros(6)[::2], torch.ones(3), torch.tensor(5.0)]
    inputs[0].copy_(torch.tensor([1.0, 2.0, 3.0]))
    scalar_step(lowered, (0, 1, 2))(inputs)
    assert inputs[0].tolist() == [5.0, 10.0, 15.0]  # with gaps in memory
    assert inputs[1].tolist() == [1.0, 2.0, 3.0]


def test_a_vector_that_stays_may_be_asked_for_beside_its_entries() -> None:
    vector = jax.ShapeDtypeStruct((COUNT,), jnp.float32)
    lowered = lower(
        lambda v, w, *_: (w, v, *(2 * v[k] for k in range(COUNT))),
        vector,
        vector,
        *[SCALAR] * COUNT,
    )
    v, w = torch.arange(float(COUNT)), torch.ones(COUNT)
    entries = [torch.zeros(()) for _ in range(COUNT)]
    scalar_step(lowered, range(COUNT + 2))([v, w, *entries])
    assert v.eq(1).all() and w.equal(torch.arange(float(COUNT)))
    assert [x.item() for x in entries] == [2.0 * k for k in range(COUNT)]


def test_torch_is_called_for_nothing_else() -> None:
    _, step, memory = made(arithmetic)
    inputs = [*(torch.tensor(0.3 + float(i)) for i in range(COUNT)), torch.tensor(0.7)]
    with torch.profiler.profile() as profile:
        step([*inputs, *memory])
    called = {event.key for event in profile.key_averages()}
    assert not {name for name in called if name.startswith("aten::")}


@pytest.mark.parametrize(
    "wrong",
    [
        *(torch.zeros((), dtype=torch.float64), torch.zeros(0), torch.zeros(2)),
        torch.zeros((), device="meta"),
    ],
    ids=["dtype", "empty", "two", "device"],
)
def test_a_scalar_of_another_kind_is_an_error_before_anything_is_written(wrong: Tensor) -> None:
    _, step, memory = made(arithmetic)
    inputs = [torch.ones(()) for _ in range(COUNT + 1)]
    inputs[3] = wrong
    with pytest.raises(TypeError, match=r"must be torch.float32 of shape \(\) on the CPU, .* got "):
        step([*inputs, *memory])
    assert all(x.eq(0).all() for x in memory)


# ---- the operations ------------------------------------------------------------------------


def remainder(x: Tensor, y: Tensor) -> Tensor:
    """Of NumPy: torch's is NaN where the quotient is above the largest float32."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.fmod(x.numpy(), y.numpy()))


TORCH: dict[str, Callable[..., Any]] = {
    "fmod": remainder,
    "float_to_int": lambda x: ops.float_to_int(x, torch.int32, -(2**31), 2**31 - 1),
    "int_rem": ops.int_rem,
    "pow": torch.pow,
    "where": torch.where,
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "bitwise_and": operator.and_,
    "bitwise_or": operator.or_,
    "bitwise_xor": operator.xor,
}
VALUES = {"f": (np.float32, SPECIAL), "i": (np.int32, INTEGERS), "b": (np.bool_, [False, True])}
ONE = (
    *(
        "neg",
        "abs",
        "reciprocal",
        "sqrt",
        "rsqrt",
        "square",
        "exp",
        "expm1",
        "log",
        "log1p",
        "floor",
    ),
    *("isfinite", "bitwise_not", "float_to_int"),
)


def apply(name: str, words: np.ndarray) -> np.ndarray:
    """Of three rows of words, column by column."""
    memory = np.zeros(4, np.uint32)
    result = np.zeros(words.shape[1], np.uint32)
    program = _kernel.ScalarProgram([(name, 3, 0, 1, 2)], [], [], memory, 0)
    for k, column in enumerate(words.T):
        memory[:3] = column
        program.run([])
        result[k] = memory[3]
    return result


@pytest.mark.parametrize("name", _kernel.scalar_ops())
def test_an_operation_is_torch_s(name: str) -> None:
    operation, type_, *to = name.split(".")
    dtype, values = VALUES[type_]
    grid = np.array([[x, y] for x in values for y in values], dtype).T
    words = np.zeros((3, grid.shape[1]), np.uint32)
    x, y = (torch.from_numpy(np.ascontiguousarray(row)) for row in grid)
    if operation == "where":
        condition = torch.arange(grid.shape[1]) % 3 == 0
        words[0] = condition.numpy()
        words[1:] = as_words(grid)
        expected = torch.where(condition, x, y)
    else:
        words[:2] = as_words(grid)
        if operation == "to":
            expected = x.to({"f": torch.float32, "i": torch.int32, "b": torch.bool}[to[0]])
        else:
            function = TORCH.get(operation) or getattr(torch, operation)
            if name == "fmod.i":  # torch refuses to divide by zero
                function = ops.int_rem
            expected = function(x) if operation in ONE else function(x, y)
    found = apply(name, words)
    if expected.dtype == torch.float32:
        got = torch.from_numpy(found.view(np.float32))
        torch.testing.assert_close(got, expected, rtol=bounds.gamma(8), atol=2e-45, equal_nan=True)
    else:
        np.testing.assert_array_equal(found, as_words(expected.numpy()))


def as_words(values: np.ndarray) -> np.ndarray:
    return values.astype(np.uint32) if values.dtype == np.bool_ else values.view(np.uint32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"instructions": [("median.f", 0, 0, 0, 0)]},
            "instructions: must be of `scalar_ops`, got 'median.f'",
        ),
        (
            {"instructions": [("add.f", 0, 3, 0, 0)]},
            r"instructions: a word: must be in \[0, 2\], got 3",
        ),
        ({"loads": [(0, 1, 0, 4)]}, r"loads: a tensor: must be in \[0, 0\], got 1"),
        ({"stores": [(-1, 0, 0, 4)]}, r"stores: a word: must be in \[0, 2\], got -1"),
        ({"stores": [(0, 0, 0, 8)]}, "1 or 4 bytes, got 0 and 8"),
        ({"loads": [(0, 0, -1, 4)]}, "an offset of at least 0 and of 1 or 4 bytes, got -1 and 4"),
        ({"words": np.zeros((1, 3), np.uint32)}, "words: must be a uint32 vector"),
    ],
)
def test_a_wrong_program_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"instructions": [], "loads": [], "stores": [], "words": np.zeros(3, np.uint32)}
    with pytest.raises(ValueError, match=message):
        _kernel.ScalarProgram(**{**given, **change}, tensors=1)


def test_a_program_wants_all_its_memory() -> None:
    program = _kernel.ScalarProgram([], [(0, 0, 0, 4)], [], np.zeros(1, np.uint32), 1)
    with pytest.raises(ValueError, match="pointers: must be 1, one for each tensor, got 2"):
        program.run([8, 8])
    with pytest.raises(
        ValueError, match=r"pointers\[0\]: must be the address of a tensor, got null"
    ):
        program.run([0])
