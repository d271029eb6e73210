"""Tensors cut into parts that fit into a cache."""

from collections.abc import Iterator, Sequence
from itertools import repeat

from torch import Tensor

PART = 1 << 18
"""Elements that run together on a CPU: the tensors of an expression then fit into a few megabytes."""


def split(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]] | None:
    """Parts of all tensors, scalars whole; None where tensors are of several sizes, which torch broadcasts, or do not
    lie alike in memory, without gaps.
    """
    columns = [flat(x) if x.ndim else x for x in tensors]
    arrays = [x for x in tensors if x.ndim]
    alike = len({x.stride() for x in arrays}) == 1 or all(x.is_contiguous() for x in arrays)
    one_size = len({x.numel() for x in arrays}) == 1
    if not (alike and one_size) or any(x is None for x in columns):
        return None
    cut = (x.split(PART) if x.ndim else repeat(x) for x in columns if x is not None)
    return zip(*cut, strict=False)


def flat(x: Tensor) -> Tensor | None:
    """A tensor as a vector in the order of its memory; None if it has gaps."""
    ordered = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
    return ordered.view(-1) if ordered.is_contiguous() else None


def split_whole(x: Tensor) -> Sequence[Tensor]:
    """Parts of a tensor that `split` would take."""
    vector = flat(x)
    assert vector is not None
    return vector.split(PART)
