"""What ranks tell each other in the middle of a step: several tensors in one call."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Spans = tuple[tuple[int, int], ...]
"""Along each axis the first and last + 1 of some entries."""
Parcels = tuple[tuple[int, Spans], ...]
"""Ranks of the group, each with the entries of this rank's tensor that go there, or come from there."""
Route = tuple[Parcels, Parcels, tuple[int, ...], torch.dtype]
"""What this rank sends of its tensor, what it gets, and shape and dtype of what it then has."""


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
    # Two calls for all scalars, of which there are hundreds; one each costs a small step more than the message.
    scalars, others = [x for x in xs if x.ndim == 0], [x for x in xs if x.ndim]
    parts = [torch.stack(scalars)] if scalars else []
    flat = torch.cat([*parts, *(x.reshape(-1) for x in others)])
    all_reduce_(flat, kind, group)
    first, *rest = flat.split([len(scalars), *(x.numel() for x in others)])
    summed, reshaped = iter(first.unbind()), map(Tensor.view_as, rest, others)
    return [next(reshaped if x.ndim else summed) for x in xs]


def all_reduce_(flat: Tensor, kind: str, group: str) -> None:
    """The sum, maximum or minimum of a tensor over the ranks of a group, in place; of NaN and others NaN."""
    if kind != "sum" and flat.is_floating_point():
        # Backends compare, so that a NaN is lost or kept as ranks come. Integers in the order of the numbers are not.
        keys = _keys(-flat if kind == "min" else flat)
        dist.all_reduce(keys, dist.ReduceOp.MAX, group=_group(group))
        found = _flipped(keys).view(_wide(flat))
        flat.copy_(-found if kind == "min" else found)
        return
    op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[kind]
    numbers = flat.view(torch.uint8) if flat.dtype is torch.bool else flat
    dist.all_reduce(numbers, op, group=_group(group))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _keys(x: Tensor) -> Tensor:
    """Integers that are ordered as numbers are, with NaN above all."""
    wide = x.to(_wide(x))
    wide = torch.where(wide.isnan(), torch.nan, wide)  # of positive sign
    return _flipped(wide.view(torch.int64 if wide.dtype is torch.float64 else torch.int32))


def _flipped(bits: Tensor) -> Tensor:
    """The bits of a number as an integer of its order, and back: of a negative one all but the sign are inverted."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


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
    raw = list(map(_bytes, xs))
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
            _within(found[k], spans[k][rank]).copy_(
                part.reshape([b - a for a, b in spans[k][rank]])
            )
            start += size
    return found


def exchange(
    xs: Sequence[Tensor | None],
    routes: Sequence[Route],
    device: torch.device,
    group: str,
    after: Tensor | None = None,
) -> list[Tensor]:
    """Other tensors from parts of those that the ranks of a group have.

    Args:
      xs: what this rank has; None where it sends nothing.
      routes: for every tensor.
      device: of all tensors.
      group: name of the process group.
      after: a result of the collective that comes before it on every rank.
    """
    del after
    of_all = _group(group)
    found = [torch.empty(shape, dtype=dtype, device=device) for *_, shape, dtype in routes]
    outward: list[list[Tensor]] = [[] for _ in range(of_all.size())]
    inward: list[list[Tensor]] = [[] for _ in range(of_all.size())]
    for x, result, (sent, received, *_) in zip(xs, found, routes, strict=True):
        for rank, spans in sent:
            outward[rank].append(_within(x, spans))  # pyright: ignore[reportArgumentType]
        for rank, spans in received:
            inward[rank].append(_within(result, spans))
    raw = [_bytes(part) for parts in outward for part in parts]
    mine = torch.cat(raw) if raw else torch.empty(0, dtype=torch.uint8, device=device)
    sizes = [[sum(part.nbytes for part in parts) for parts in way] for way in (inward, outward)]
    got = mine.new_empty(sum(sizes[0]))
    dist.all_to_all_single(got, mine, *sizes, group=of_all)
    start = 0
    for part in (part for parts in inward for part in parts):
        raw_part = got[start : start + part.nbytes]
        start += part.nbytes
        if raw_part.storage_offset() % part.element_size():  # no view in another dtype
            raw_part = raw_part.clone()
        part.copy_(raw_part.view(part.dtype).reshape(part.shape))
    return found


def _within(x: Tensor, spans: Spans) -> Tensor:
    return x[tuple(slice(a, b) for a, b in spans)]


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)
