"""What tells parameters apart: sorts, lists of examples of them, and the function of a file that knows them."""

import inspect
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Shape = tuple[int, ...]
Sort = tuple[Any, ...]
Sorting = Callable[[str, Sequence[int]], Sort]
Parameters = list[tuple[str, Shape]]

COMMON = 5
"""Parts of a fine sort that decide where the others were not tried."""


def coarse_sort(dtype: str, shape: Sequence[int]) -> Sort:
    """Numbers, tensors without or with one element, vectors, tensors with axes of length 1, others; and large ones."""
    size = math.prod(shape)
    if not shape:
        return dtype, "number", size
    if size < 2:
        return dtype, "vector" if len(shape) == 1 else "tensor", size
    sort = "vector" if len(shape) == 1 else "thin tensor" if 1 in shape else "tensor"
    return dtype, sort, "large" if size >= 65536 else "small"


def fine_sort(dtype: str, shape: Sequence[int]) -> Sort:
    """All that may decide about the program of a parameter.

    >>> fine_sort("float32", (3, 8)) == fine_sort("float32", (5, 9))
    True
    """
    if len(shape) < 2:
        return dtype, len(shape), 1 in shape, 0 in shape, 0, 0, 0
    first, last = math.prod(shape[1:]), math.prod(shape[:-1])
    rows = (shape[-2] > shape[-1]) - (shape[-2] < shape[-1])
    whole = (shape[0] > first) - (shape[0] < first)
    columns = (last > shape[-1]) - (last < shape[-1])
    return dtype, len(shape), 1 in shape, 0 in shape, rows, whole, columns


# fmt: off
_FEW: tuple[tuple[Shape, ...], ...] = (
    (
        (3, 8), (), (1,), (70_001,), (0,), (9, 1), (7,), (2, 3, 5), (11, 4), (), (300, 401), (6, 6), (0, 3), (1, 5),
        (1, 1), (12,), (90_003,), (1, 80_001), (90, 7, 211), (70_009, 1), (1,), (1, 1, 1), (0,), (3, 0),
    ),
    (
        (13,), (1, 1), (), (0, 4), (9, 5), (2, 1, 3), (1,), (95_003,), (1, 6), (14,), (), (4, 3, 2), (2, 7), (0,),
        (3, 2, 2, 5), (4, 1), (5, 5), (1, 1, 1), (411, 307), (71_001,), (1, 81_001), (), (2, 0), (17,), (90, 7, 210),
        (70_019, 1), (65_537,), (200, 400), (1, 1, 75_000), (1,), (1, 1), (1,), (0,), (0,), (5, 0),
    ),
)
# fmt: on
"""Two lists of all sorts, the second with more of each, so that no number of parameters looks like a constant."""
_SIZES = (((3, 8, 13), (5, 11, 17)), ((2, 7, 19), (4, 9, 23), (6, 10, 14)))


def _many(a: int, b: int, c: int) -> list[Shape]:
    """Shapes of every fine sort, made of three sizes in ascending order."""
    return [
        *((), (a,), (a, b), (b, a), (a, a), (1, b), (b, 1), (1, 1), (1,), (0,)),
        *((a, b, c), (a, c, b), (a * b, 2, 3), (c, a, a)),
        *((2, 2, a, c), (2, 2, c, a), (c, a, 3, 3), (a, c, 3, 3), (a * 40, 3, 2, 2), (a, 2, 2, b)),
    ]


def lists_of(sorting: Sorting, dtypes: Sequence[str], given_up: Sequence[int]) -> list[Parameters]:
    """Lists with two parameters or more of each sort, in an order that mixes them."""
    shapes = [list(own) for own in _FEW]
    if sorting is fine_sort:
        columns = [zip(*(_many(*own) for own in sizes), strict=True) for sizes in _SIZES]
        mixed = [list(itertools.chain(*own)) for own in columns]
        shapes = [[*own[::3], *own[1::3], *own[2::3]] for own in mixed]
    lists = [
        [(d, s) for s in own for d in dtypes if not any(n in s for n in given_up)] for own in shapes
    ]
    counts = [Counter(sorting(*p) for p in own) for own in lists]
    return [[p for p in own if all(c[sorting(*p)] > 1 for c in counts)] for own in lists]


def kind_of(
    dtypes: Sequence[str], sorting: Sorting, kinds: Mapping[Sort, int], limit: int | None
) -> str:
    """The text of the function of a file that tells the kind of a parameter."""
    given = ", ".join(f"torch.{d}" for d in dtypes)
    lines = [
        "@functools.cache",
        "def _kind_of(dtype: torch.dtype, shape: torch.Size) -> int | None:",
        '    """The kind of a parameter, by dtype and shape; None: not one that this file was exported for."""',
        f"    if dtype not in ({given},):",
        "        return None",
    ]
    if limit is not None:
        lines += [
            f"    if any(n >= {limit} for n in shape):",
            "        return None",
        ]
    if len({*kinds.values()}) == 1 and sorting is coarse_sort:
        return "\n".join([*lines, "    return 0"])
    known = dict(kinds)
    if sorting is not coarse_sort:  # what was not tried, where all that are like it agree
        for short in dict.fromkeys(sort[:COMMON] for sort in known):
            agreed = {kind for sort, kind in kinds.items() if sort[:COMMON] == short}
            if len(agreed) == 1:
                known[short] = agreed.pop()
    entries = "".join(f"    {sort!r}: {kind},\n" for sort, kind in known.items())
    text = inspect.getsource(sorting).replace(sorting.__name__, "_sort")
    text = re.sub(r'"""(.*?)\n.*?"""', r'"""\1"""', text, count=1, flags=re.S)
    text = text.replace("-> Sort:", "-> tuple[Any, ...]:")
    lines += [
        '    sort = _sort(str(dtype).removeprefix("torch."), shape)',
        f"    return _KINDS.get(sort, _KINDS.get(sort[:{COMMON}]))",
    ]
    table = f"_KINDS: Mapping[Any, int] = {{\n{entries}}}"
    return "\n\n\n".join([table, text.rstrip(), "\n".join(lines)])
