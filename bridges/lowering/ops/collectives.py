"""What ranks tell each other in the middle of a step: several tensors in one call."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Spans = tuple[tuple[int, int], ...]
"""Along each axis the first and last + 1 of the entries that a rank has."""


def _group(name: str) -> dist.ProcessGroup:
    # torch's own functional collectives name groups in this way.
    return dist.distributed_c10d._resolve_process_group(name)  # pyright: ignore


def all_reduce(
    xs: Sequence[Tensor], kind: str, group: str, after: Tensor | None = None
) -> list[Tensor]:
    """The sum, maximum or minimum of every tensor over the ranks of a group; all of one dtype.

    `after` is a result of the collective that comes before it on every rank.
    """
    del after
    (dtype,) = {x.dtype for x in xs}
    flat = torch.cat([x.reshape(-1) for x in xs])
    flat = flat.to(torch.uint8) if dtype is torch.bool else flat
    op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[kind]
    dist.all_reduce(flat, op, group=_group(group))
    parts = flat.to(dtype).split([x.numel() for x in xs])
    return [part.reshape(x.shape) for part, x in zip(parts, xs, strict=True)]


def all_gather(
    xs: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    spans: Sequence[Sequence[Spans]],
    group: str,
    after: Tensor | None = None,
) -> list[Tensor]:
    """Whole tensors from the parts that the ranks of a group have.

    Args:
      xs: this rank's parts.
      shapes: of the whole tensors.
      spans: for every tensor and rank what the rank has of it; several may have the same.
      group: name of the process group.
      after: a result of the collective that comes before it on every rank.
    """
    del after
    raw = [x.contiguous().reshape(-1).view(torch.uint8) for x in xs]
    sizes = [
        [
            math.prod(b - a for a, b in span) * x.element_size()
            for x, span in zip(xs, own, strict=True)
        ]
        for own in zip(*spans, strict=True)
    ]
    longest = max(map(sum, sizes))
    mine = torch.cat([*raw, raw[0].new_zeros(longest - sum(map(len, raw)))])
    everyone = mine.new_empty(len(sizes) * longest)
    # torch 2.13 renamed it.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    getattr(dist, name)(everyone, mine, group=_group(group))
    found = [x.new_empty(shape) for x, shape in zip(xs, shapes, strict=True)]
    for rank, parts in enumerate(sizes):
        start = rank * longest
        for k, size in enumerate(parts):
            # A copy, because a view in another dtype wants an aligned start.
            part = everyone[start : start + size].clone().view(xs[k].dtype)
            where = tuple(slice(a, b) for a, b in spans[k][rank])
            found[k][where] = part.reshape([b - a for a, b in spans[k][rank]])
            start += size
    return found
