"""What JAX's dtypes ask of whoever traces or holds them: keys of `jax.random`, and 64 bits."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WIDE = {"int64", "uint64", "float64", "complex128"}


def is_key(dtype: Any) -> bool:
    """Whether `dtype` is that of a typed key of `jax.random`.

    >>> is_key(jax.random.key(0).dtype), is_key(jnp.uint32)
    (True, False)
    """
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def x64_if_wide(structs: Any) -> AbstractContextManager[Any]:
    """A context in which JAX keeps 64-bit values if a leaf of `structs` has them, or if it does so anyway.

    >>> with x64_if_wide([np.zeros(2)]):
    ...     jnp.asarray(0.5).dtype
    dtype('float64')
    """
    leaves = jax.tree.leaves(structs)
    wide = any(not is_key(x.dtype) and np.dtype(x.dtype).name in _WIDE for x in leaves)
    return jax.enable_x64(wide or bool(jax.config.read("jax_enable_x64")))
