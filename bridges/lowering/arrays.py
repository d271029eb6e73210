"""Arrays between JAX and torch, bit for bit.

Every JAX dtype has one torch representation, which the lowered program uses throughout:

====================================  ==========================================================
JAX                                   torch
====================================  ==========================================================
bool, int8-64, uint8, float16-64,     the dtype of the same name
bfloat16, complex64, complex128
uint16                                int32 holding 0 .. 2^16 - 1
uint32                                int64 holding 0 .. 2^32 - 1
typed PRNG key (``key<fry>[...]``)    its uint32 key data, so int64 with a trailing axis of words
====================================  ==========================================================

torch's own uint16 and uint32 lack most arithmetic; a wider signed integer that is masked after
each wrapping operation has all of it, on every device and under Inductor. uint64, 4-bit and
8-bit float dtypes have no representation and raise ``LoweringError``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from chainrule.bridges.lowering.errors import LoweringError
from chainrule.native.dtypes import is_key

_DTYPES: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "uint8": torch.uint8,
    "uint16": torch.int32,
    "uint32": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
# Unsigned integers held in a wider signed one: what to mask with after a wrapping operation.
MASKS = {"uint16": 0xFFFF, "uint32": 0xFFFF_FFFF}


def physical_shape(aval: Any) -> tuple[int, ...]:
    """The shape of the torch tensor for ``aval``: a key array has a trailing axis of words."""
    if is_key(aval.dtype):
        return (*aval.shape, *aval.dtype._impl.key_shape)
    return tuple(aval.shape)


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype that represents the JAX ``dtype`` (the table above).

    Raises:
        LoweringError: `dtype` has no representation in torch.
    """
    if is_key(dtype):
        return torch.int64
    name = np.dtype(dtype).name
    if name not in _DTYPES:
        raise LoweringError(
            f"lowering: dtype {name} has no representation in torch; "
            'run the chain with engine="xla", or use another dtype'
        )
    return _DTYPES[name]


def to_torch(value: Any, device: torch.device | str | None = None) -> torch.Tensor:
    """A torch tensor with the value of a JAX or NumPy array, or an empty one for a struct.

    Args:
      value: an array, a number, a typed key array, or a ``jax.ShapeDtypeStruct``.
      device: where the tensor goes; torch's default when None.

    Returns:
      A tensor that shares no memory with ``value``.

    >>> to_torch(np.asarray([1, 4_000_000_000], np.uint32))
    tensor([         1, 4000000000])
    """
    if isinstance(value, jax.ShapeDtypeStruct):
        shape = physical_shape(value)
        return torch.empty(shape, dtype=torch_dtype(value.dtype), device=device)
    if hasattr(value, "dtype") and is_key(value.dtype):
        value = jax.random.key_data(value)
    if not hasattr(value, "dtype"):
        value = jnp.asarray(value)  # a Python number gets JAX's default dtype
    dtype = torch_dtype(value.dtype)
    array = np.array(value)
    if array.dtype.name == "bfloat16":
        tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    elif array.dtype.name in MASKS:
        tensor = torch.from_numpy(array.astype(np.int64)).to(dtype)
    else:
        tensor = torch.from_numpy(array)
    return tensor.to(device) if device is not None else tensor


def to_jax(tensor: torch.Tensor, aval: Any = None) -> jax.Array:
    """The JAX array with the value of ``tensor``, the inverse of ``to_torch``.

    Args:
      tensor: any dense tensor, on any device; copied.
      aval: what to return, an array or struct: tells uint32 and typed keys from int64. Without
        it the dtype is the tensor's own.

    Raises:
        LoweringError: the dtype needs ``jax.enable_x64``, or disagrees with ``aval``.

    >>> to_jax(torch.tensor([1, 4_000_000_000]), jax.ShapeDtypeStruct((2,), jnp.uint32))
    Array([         1, 4000000000], dtype=uint32)
    """
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if aval is not None and tensor.dtype != torch_dtype(aval.dtype):
        raise LoweringError(
            f"to_jax: a tensor of {tensor.dtype} cannot stand for {aval.dtype}, which is held as "
            f"{torch_dtype(aval.dtype)}; convert the tensor first"
        )
    if tensor.dtype == torch.bfloat16:
        array = tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    else:
        array = tensor.numpy()
    if aval is not None and is_key(aval.dtype):
        data = jnp.array(array.astype(np.uint32))
        return jax.random.wrap_key_data(data, impl=aval.dtype._impl.name)
    if aval is not None:
        array = array.astype(np.dtype(aval.dtype))
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise LoweringError(
            f"to_jax: {array.dtype} needs 64-bit JAX; call it under jax.enable_x64(True)"
        )
    return jnp.array(array)
