"""Rules that change a dtype or the precision within one."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.arrays import MASKS, torch_dtype
from chainrule.bridges.lowering.builder import Builder, Equation, Value


def convert_element_type(b: Builder, eqn: Equation, x: fx.Node) -> Value:
    return _convert(b, x, eqn.invars[0].aval.dtype, eqn.params["new_dtype"])


def _convert(b: Builder, x: fx.Node, old: Any, new: Any) -> fx.Node:
    """``x`` from dtype ``old`` to ``new`` as XLA converts."""
    if old == new:
        return x
    dtype = torch_dtype(new)
    integer = jnp.issubdtype(new, np.integer)
    if jnp.issubdtype(old, np.complexfloating) and not jnp.issubdtype(new, np.complexfloating):
        x, old = b.emit(torch.real, x), np.finfo(old).dtype
    if new == np.bool_:
        return b.emit(torch.ne, x, 0)
    if integer and jnp.issubdtype(old, np.floating):
        info = np.iinfo(new)
        return b.emit(ops.float_to_int, x, dtype, int(info.min), int(info.max))
    node = x if torch_dtype(old) == dtype else b.emit(torch.Tensor.to, x, dtype)
    fits = old == np.bool_ or (
        integer
        and np.iinfo(old).min >= np.iinfo(new).min
        and np.iinfo(old).max <= np.iinfo(new).max
    )
    if np.dtype(new).name not in MASKS or fits:
        return node
    return b.emit(torch.bitwise_and, node, MASKS[np.dtype(new).name])


def reduce_precision(b: Builder, eqn: Equation, x: Value) -> Value:
    exponent, mantissa = eqn.params["exponent_bits"], eqn.params["mantissa_bits"]
    dtype = eqn.outvars[0].aval.dtype
    info = jnp.finfo(dtype)
    if exponent >= info.nexp and mantissa >= info.nmant:
        return x
    if dtype == np.float32 and exponent == 8 and mantissa >= 1:
        return b.emit(ops.reduce_precision, x, mantissa)
    if dtype in (np.float32, np.float64) and (exponent, mantissa) == (5, 10):
        return b.emit(ops.half_precision, x)
    raise b.unsupported(eqn, f"{exponent} exponent and {mantissa} mantissa bits of {dtype}")
