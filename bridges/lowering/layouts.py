"""How tensors lie on a mesh of devices: what a rank has of each axis, and which ranks have the same.

Nothing here imports torch's distributed package: a mesh is its shape, and a rank its coordinate in it.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias


class Mesh(NamedTuple):
    """The devices, as this rank sees them."""

    shape: tuple[int, ...]
    coordinate: tuple[int, ...]
    """Of this rank."""
    order: tuple[tuple[int, ...], ...]
    """The coordinate of every rank, as they are numbered in the group of all."""
    groups: tuple[str, ...]
    """Names of the process groups: of this rank's line along each dimension, then of the whole mesh."""

    @property
    def everyone(self) -> str:
        return self.groups[-1]

    @property
    def rank(self) -> int:
        """Of this device in the group of all."""
        return self.order.index(self.coordinate)


class Cut(NamedTuple):
    """An axis that is spread over dimensions of the mesh, in contiguous parts, the first ones not smaller."""

    size: int
    """Rows of the whole axis."""
    splits: tuple[tuple[int, int], ...]
    """(dimension of the mesh, parts), in the order in which the rows are split."""
    inner: int = 1
    """Entries of each row, where a reshape merged axes behind this one into it."""

    @property
    def dims(self) -> frozenset[int]:
        """Dimensions of the mesh that it takes."""
        return frozenset(dim for dim, _ in self.splits)

    def entries(self, coordinate: Sequence[int]) -> tuple[int, int]:
        """First and last + 1 of the entries that a rank has.

        >>> [Cut(5, ((0, 4),)).entries([i]) for i in range(4)]
        [(0, 2), (2, 4), (4, 5), (5, 5)]
        """
        start, stop = 0, self.size
        for dim, parts in self.splits:
            part = -(-(stop - start) // parts)
            start = min(start + coordinate[dim] * part, stop)
            stop = min(start + part, stop)
        return start * self.inner, stop * self.inner


Axes: TypeAlias = tuple[Cut | None, ...]
"""For every axis of a tensor how it is cut; None: every rank has all of it."""


def whole(ndim: int) -> Axes:
    """The axes of a tensor that every rank has."""
    return (None,) * ndim


def is_cut(axes: Axes) -> bool:
    return any(axes)


def dims_of(axes: Axes) -> frozenset[int]:
    """The dimensions of the mesh over which a tensor is spread; along the others every rank has the same."""
    return frozenset[int]().union(*(cut.dims for cut in axes if cut))


def local_shape(shape: Sequence[int], axes: Axes, mesh: Mesh) -> tuple[int, ...]:
    """The shape of what this rank has of a tensor of a shape."""
    return tuple(
        n if cut is None else stop - start
        for n, cut, (start, stop) in zip(
            shape, axes, spans(shape, axes, mesh.coordinate), strict=True
        )
    )


def spans(
    shape: Sequence[int], axes: Axes, coordinate: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Along each axis the first and last + 1 of the entries that a rank has."""
    return tuple(
        (0, n) if cut is None else cut.entries(coordinate)
        for n, cut in zip(shape, axes, strict=True)
    )


class Parcel(NamedTuple):
    """Entries that one rank sends to another; both by their number in the group of all."""

    source: int
    target: int
    entries: tuple[tuple[int, int], ...]
    """Along each axis of the whole tensor the first and last + 1."""

    @property
    def size(self) -> int:
        return math.prod(stop - start for start, stop in self.entries)

    def within(self, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        """Its entries as they are numbered in a part of the tensor."""
        pairs = zip(self.entries, spans, strict=True)
        return tuple((start - first, stop - first) for (start, stop), (first, _) in pairs)


def to_owner(shape: Sequence[int], axes: Axes, mesh: Mesh, owner: int) -> list[Parcel]:
    """All parts of a tensor to one rank, each from the rank that lies in its line."""
    taken, at = dims_of(axes), mesh.order[owner]
    return [
        Parcel(rank, owner, spans(shape, axes, place))
        for rank, place in enumerate(mesh.order)
        if all(place[dim] == at[dim] for dim in range(len(at)) if dim not in taken)
    ]


def from_owner(shape: Sequence[int], axes: Axes, mesh: Mesh, owner: int) -> list[Parcel]:
    """From the rank that has all of a tensor to every rank what it is to have."""
    places = enumerate(mesh.order)
    return [Parcel(owner, rank, spans(shape, axes, place)) for rank, place in places]


def is_first_holder(axes: Axes, mesh: Mesh) -> bool:
    """Whether this rank is the first of those that have the same part of a tensor."""
    taken = dims_of(axes)
    return all(c == 0 for dim, c in enumerate(mesh.coordinate) if dim not in taken)


def is_repeated(axes: Axes, mesh: Mesh) -> bool:
    """Whether several ranks have the same part of a tensor."""
    return any(n > 1 for dim, n in enumerate(mesh.shape) if dim not in dims_of(axes))


def permuted(axes: Axes, order: Sequence[int]) -> Axes:
    return tuple(axes[i] for i in order)


def broadcast(axes: Axes, shape: Sequence[int], to: Sequence[int]) -> Axes:
    """The axes of a tensor of one shape once it is broadcast to another.

    >>> broadcast((Cut(4, ((0, 2),)),), (4,), (3, 4))[1] == Cut(4, ((0, 2),))
    True
    """
    lead = len(to) - len(shape)
    return (
        *whole(lead),
        *(cut if n == m else None for cut, n, m in zip(axes, shape, to[lead:], strict=True)),
    )


def behind(axes: Axes, shape: Sequence[int], of: Sequence[int]) -> Axes:
    """The axes that a tensor needs which is broadcast to one that is cut as `axes` say.

    Args:
      axes: of the result.
      shape: of the result.
      of: shape of the operand.
    """
    lead = len(shape) - len(of)
    return tuple(axes[lead + i] if n == shape[lead + i] else None for i, n in enumerate(of))


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The least groups of axes that a reshape turns into each other."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right, a, b = [], [], 1, 1
        while True:
            if (a <= b or j == len(new)) and i < len(old) and (a != b or not left):
                a, i = a * old[i], i + 1
                left.append(i - 1)
            elif j < len(new) and (a != b or not right):
                b, j = b * new[j], j + 1
                right.append(j - 1)
            else:
                break
        yield left, right


def reshaped(axes: Axes, old: Sequence[int], new: Sequence[int]) -> Axes | None:
    """The axes after a reshape; None if no rank would have a block of the result.

    >>> cut = Cut(4, ((0, 2),))
    >>> reshaped((cut, None), (4, 3), (4, 1, 3)) == (cut, None, None)
    True
    >>> reshaped((cut, None), (4, 3), (12,)), reshaped((None, cut), (3, 4), (12,))
    ((Cut(size=4, splits=((0, 2),), inner=3),), None)
    """
    if not is_cut(axes):
        return whole(len(new))
    if 0 in old:
        return None
    found: list[Cut | None] = [None] * len(new)
    for left, right in _groups(old, new):
        cut = [i for i in left if axes[i]]
        if not cut:
            continue
        before = [i for i in left if old[i] > 1 or axes[i]]
        after = [j for j in right if new[j] > 1] or right[:1]
        own = axes[before[0]]
        if cut != before[:1] or own is None or not after:
            return None
        rows, rest = own.size, math.prod(new[j] for j in after[1:])
        if new[after[0]] == rows and own.inner in (1, rest):
            found[after[0]] = own._replace(inner=1)
        elif len(after) == 1:
            inner = own.inner * math.prod(old[i] for i in before[1:])
            found[after[0]] = own._replace(inner=inner)
        else:
            return None
    return tuple(found)


def merged(operands: Sequence[Axes]) -> Axes:
    """The axes of a result, entry by entry, of operands of its rank: cut as any of them is, the first one first."""
    result: list[Cut | None] = []
    taken: set[int] = set()
    for cuts in itertools.zip_longest(*operands):
        cut = next((c for c in cuts if c and taken.isdisjoint(c.dims)), None)
        taken |= cut.dims if cut else set()
        result.append(cut)
    return tuple(result)
