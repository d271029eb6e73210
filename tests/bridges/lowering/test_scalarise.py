"""Vectors that are filled and taken apart again become arithmetic on their entries, and mean the same."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torch
from torch import fx

from chainrule.bridges.lowering import lower, ops
from chainrule.bridges.lowering.passes.infer_values import infer_values
from chainrule.bridges.lowering.passes.scalarise import scalarise
from chainrule.bridges.lowering.step_program import StepProgram

COUNT = 9
SIZES = jnp.arange(1.0, COUNT + 1)


def entries(vector: jax.Array) -> list[jax.Array]:
    return [vector[i] for i in range(COUNT)]


def arithmetic(xs: Any, y: Any) -> Any:
    vector = jnp.stack(xs) / SIZES
    return entries(jnp.where(vector > y, vector, 2 * y)), entries(vector)


def constant_first(xs: Any, y: Any) -> Any:
    vector = jnp.stack(xs)
    return entries(SIZES * vector), entries(jnp.where(vector > y, SIZES, 2 * SIZES))


def power(xs: Any, y: Any) -> Any:
    return entries(jnp.stack(xs) ** y)


def total(xs: Any, y: Any) -> Any:
    vector = jnp.stack(xs)
    return entries(y * vector), jnp.sum(vector)


def beside_another(xs: Any, y: Any) -> Any:
    other = jnp.cumsum(SIZES * y)  # stays a vector
    return entries(jnp.stack(xs) + other)


@pytest.mark.parametrize(
    ("function", "stacks", "unbinds"),
    [
        (arithmetic, 0, 0),
        (constant_first, 0, 1),
        (power, 1, 1),
        (total, 1, 1),
        (beside_another, 0, 1),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_split(function: Callable[..., Any], stacks: int, unbinds: int) -> None:
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    lowered = lower(function, [scalar] * COUNT, scalar)
    xs = [torch.tensor(float(i)) / 4 for i in range(COUNT)]
    inputs = [*xs, torch.tensor(0.375)]
    expected = [x.clone() for x in lowered(*inputs)]
    program = scalarise(infer_values(StepProgram.of(lowered, ())))
    program.graph.lint()
    module = fx.GraphModule(program.attributes, program.graph)
    targets = [node.target for node in program.graph.nodes]
    assert (targets.count(torch.stack), targets.count(ops.unbind)) == (stacks, unbinds)
    for got, want in zip(module(*inputs), expected, strict=True):
        assert got.equal(want)
