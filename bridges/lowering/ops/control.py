"""Control flow that torch runs from Python; `branch` and `while_loop` read a value on the host."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def branch(
    index: Tensor, branches: Sequence[Callable[..., tuple[Tensor, ...]]], operands: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Run one of ``branches``; reads ``index`` on the host."""
    chosen = min(max(int(index), 0), len(branches) - 1)
    return branches[chosen](*operands)


def while_loop(
    condition: Callable[..., tuple[Tensor, ...]],
    body: Callable[..., tuple[Tensor, ...]],
    condition_constants: Sequence[Tensor],
    body_constants: Sequence[Tensor],
    carry: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Iterate ``body`` while ``condition``; reads the predicate on the host each time."""
    carry = tuple(carry)
    while bool(condition(*condition_constants, *carry)[0]):
        carry = body(*body_constants, *carry)
    return carry


def scan(
    body: Callable[..., tuple[Tensor, ...]],
    constants: Sequence[Tensor],
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    length: int,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Iterate ``body`` over the leading axis of ``xs``; final carry, then stacked outputs."""
    carry = tuple(carry)
    stacked: list[tuple[Tensor, ...]] = []
    for i in reversed(range(length)) if reverse else range(length):
        out = body(*constants, *carry, *(x[i] for x in xs))
        carry = out[: len(carry)]
        stacked.append(out[len(carry) :])
    if reverse:
        stacked.reverse()
    return (*carry, *(torch.stack(y) for y in zip(*stacked, strict=True)))
