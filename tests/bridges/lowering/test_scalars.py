"""Arithmetic on scalars that runs on vectors gives the same bits."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch

from chainrule.bridges.lowering import lower
from chainrule.bridges.lowering.pieces import fake_values
from chainrule.bridges.lowering.scalars import batched

COUNT = 9


def alike(xs: Any, y: Any) -> Any:
    return [jnp.where(x > y, x * y, x + 1) for x in xs]


def in_another_order(xs: Any, y: Any) -> Any:
    doubled = [2 * x for x in xs]
    return [y - x for x in doubled[::-1]], [jnp.exp(x) for x in doubled[3:8]]


def of_several_vectors(xs: Any, y: Any) -> Any:
    sums, products = [x + y for x in xs], [x * y for x in xs]
    mixed = [*sums[:2], y, *products[4:], xs[0]]
    return [jnp.sqrt(x) for x in mixed], jnp.stack([*products, y, sums[3]])


def again_and_again(xs: Any, y: Any) -> Any:
    return [jnp.log(x) * jnp.log(y) for x in (xs[0], y, xs[0], xs[1], y)]


def beside_numbers(xs: Any, y: Any) -> Any:
    parts = [x / (k + 3) for k, x in enumerate(xs)]
    return [x * (-0.0 if k % 2 else 0.0) for k, x in enumerate(parts)], parts, [y + 0.5 for _ in xs]


def counts(xs: Any, y: Any) -> Any:
    steps = [x.astype(jnp.int32) for x in xs]
    return [jnp.where(n < 2, n + 1, n) for n in steps], [n + k for k, n in enumerate(steps)], y


def out_of_a_vector(xs: Any, y: Any) -> Any:
    vector = jnp.cumsum(jnp.stack(xs)) * y
    return [jnp.exp(vector[k]) for k in range(COUNT)], vector[4]


def scaled(xs: Any, y: Any) -> Any:
    return jnp.arange(2.0)[1:] * y, [x * 3 for x in xs]  # a constant of the graph


@pytest.mark.parametrize(
    "function",
    [
        *(alike, in_another_order, of_several_vectors, again_and_again, beside_numbers, counts),
        *(out_of_a_vector, scaled),
    ],
)
def test_the_bits_are_the_same(function: Callable[..., Any]) -> None:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = lower(function, [scalar] * COUNT, scalar)
    module, constants = batched(lowered.graph, fake_values(lowered, torch.device("cpu")))
    module.graph.lint()
    inputs = [*(torch.tensor(0.3 + float(i)) for i in range(COUNT)), torch.tensor(0.7)]
    for got, want in zip(module(*inputs, *constants), lowered(*inputs), strict=True):
        assert got.dtype == want.dtype and got.equal(want)
        if want.is_floating_point():
            assert torch.equal(got.signbit(), want.signbit())


def test_one_call_is_made_for_all() -> None:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = lower(alike, [scalar] * COUNT, scalar)
    module, _ = batched(lowered.graph, fake_values(lowered, torch.device("cpu")))
    targets = [n.target for n in module.graph.nodes if n.op == "call_function"]
    calls = [target for target in targets if target is not operator.getitem]
    assert sorted(call.__name__ for call in calls) == sorted(
        ["stack", "gt", "mul", "add", "where", "unbind"]
    )


def test_a_result_is_not_the_memory_of_an_input() -> None:
    vector = jax.ShapeDtypeStruct((COUNT,), jnp.float32)
    lowered = lower(lambda v: [v[k] for k in range(COUNT)], vector)
    module, constants = batched(lowered.graph, fake_values(lowered, torch.device("cpu")))
    given = torch.arange(float(COUNT))
    results = module(given, *constants)
    given.zero_()
    assert [x.item() for x in results] == list(range(COUNT))
