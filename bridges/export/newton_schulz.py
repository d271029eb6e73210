"""Steps of Newton-Schulz, as exported files have them: for matrices of any sides."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from chainrule.bridges.lowering.op_info import add_info
from chainrule.bridges.lowering.ops.numeric import dot_general
from chainrule.transforms._gram_iteration import PANELS, TILE, WHOLE, segments


def newton_schulz_steps(
    x: Tensor, triples: Sequence[tuple[float, float, float]], gram: bool | str
) -> Tensor:
    """A step for each triple on real matrices (..., rows, columns): `iterate` of `transforms/_gram_iteration.py`."""
    if x.numel() == 0:
        return x
    small, large = sorted(x.shape[-2:])
    done = 0
    for length in segments(small, large, list(triples), torch.finfo(x.dtype).eps, gram):
        x = _steps_of_one_gram_matrix(x, triples[done : done + length])
        done += length
    return x


def _steps_of_one_gram_matrix(x: Tensor, triples: Sequence[tuple[float, float, float]]) -> Tensor:
    tall, small = x.shape[-2] > x.shape[-1], min(x.shape[-2:])
    height = -(-small // (TILE * PANELS)) * TILE if small > WHOLE else small
    panels = list(x.split(height, -1 if tall else -2))
    a = _symmetric(panels, panels, -2 if tall else -1)
    q: list[Tensor] = []
    for step, (c0, c1, c2) in enumerate(triples):
        squares = _symmetric(a, a)
        p = [_with(row * c1, c2, square) for row, square in zip(a, squares, strict=True)]
        if len(triples) > 1:
            ones = torch.eye(small, dtype=x.dtype, device=x.device).split(height)
            p = [_with(row, c0, one) for row, one in zip(p, ones, strict=True)]
            q = _symmetric(p, q) if q else p
            if step < len(triples) - 1:
                a = _symmetric(_symmetric(a, p), p)
            continue
        return _with(_applied(p, x, tall), c0, x)
    return _applied(q, x, tall)


def _with(x: Tensor, factor: float, y: Tensor) -> Tensor:
    """x + factor y, as `fuse` has it: in float32 at once."""
    return torch.add(x, y, alpha=factor) if x.dtype == torch.float32 else x + y * factor


def _applied(panels: Sequence[Tensor], x: Tensor, tall: bool) -> Tensor:
    whole = torch.cat(tuple(panels), -2) if len(panels) > 1 else panels[0]
    return _matrix(x, whole, -1, -2) if tall else _matrix(whole, x, -1, -2)


def _symmetric(a: Sequence[Tensor], b: Sequence[Tensor], axis: int = -1) -> list[Tensor]:
    """The product of panels of rows, which is known to be symmetric, in panels of rows."""
    pairs = itertools.combinations_with_replacement(range(len(a)), 2)
    upper = {(i, j): _matrix(a[i], b[j], axis, axis) for i, j in pairs}
    if len(a) == 1:
        return [upper[0, 0]]
    rows = (
        [*(upper[j, i].mT for j in range(i)), *(upper[i, j] for j in range(i, len(a)))]
        for i in range(len(a))
    )
    return [torch.cat(row, -1) for row in rows]


def _matrix(x: Tensor, y: Tensor, x_axis: int, y_axis: int) -> Tensor:
    """The product over an axis of each; in half precision it is added up in float32, and rounded."""
    if x.ndim == 2:
        return torch.mm(x.t() if x_axis == -2 else x, y.t() if y_axis == -1 else y)
    batch, axes = tuple(range(x.ndim - 2)), ((x.ndim + x_axis,), (y.ndim + y_axis,))
    wide = torch.promote_types(x.dtype, torch.float32)
    return dot_general(x, y, axes, (batch, batch), wide).to(x.dtype)


add_info(newton_schulz_steps, heavy=True)
