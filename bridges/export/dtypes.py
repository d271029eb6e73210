"""Which dtypes of parameters a file is for, from whatever holds the parameters."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch

FLOATS = ("bfloat16", "float16", "float32", "float64")


def dtypes_of(params: Any) -> list[str]:
    """The names of the dtypes of parameters, each once.

    Args:
      params: a tree whose leaves are arrays, tensors, `jax.ShapeDtypeStruct`s or dtypes; a module; what its
        `parameters()` or `named_parameters()` gives.

    Raises:
      TypeError: a leaf that is none of these, or of another dtype than `FLOATS`.
      ValueError: there is no leaf.

    >>> dtypes_of({"dense": {"kernel": np.zeros((2, 3), np.float32)}, "scale": "bfloat16"})
    ['bfloat16', 'float32']
    """
    if hasattr(params, "named_parameters"):
        params = params.named_parameters()
    if isinstance(params, Iterator):
        params = list(params)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_named)
    if not leaves:
        raise ValueError("export: `params` is empty; give the parameters, or their dtypes")
    return sorted({_dtype(path, leaf) for path, leaf in leaves})


def _is_named(node: Any) -> bool:
    """Whether it is one of `named_parameters()`."""
    is_pair = isinstance(node, tuple) and len(node) == 2  # pyright: ignore[reportUnknownArgumentType]
    return is_pair and isinstance(node[0], str) and isinstance(node[1], torch.Tensor)


def _dtype(path: Any, leaf: Any) -> str:
    where = jax.tree_util.keystr(path, simple=True, separator=".")
    if _is_named(leaf):
        where, leaf = leaf
    is_dtype = isinstance(leaf, (str, type, np.dtype, torch.dtype))
    found = leaf if is_dtype else getattr(leaf, "dtype", None)
    if isinstance(found, type):
        found = np.dtype(found)
    name = getattr(found, "name", None) or str(found).removeprefix("torch.")
    if name in FLOATS:
        return name
    own = repr(leaf) if is_dtype or found is None else name
    raise TypeError(
        f"export: `params`{f', {where!r},' if where else ''} is {own}; expected arrays, tensors or dtypes, of "
        f"{', '.join(FLOATS)}"
    )
