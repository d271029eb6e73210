"""Rules for primitives that move elements about: shapes, indexing, sorting, constants.

Typed PRNG keys are their data with a trailing axis of words (see ``arrays``), which these rules
leave where it is.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jax.lax import GatherScatterMode
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.arrays import physical_shape, torch_dtype
from chainrule.bridges.lowering.builder import (
    Builder,
    Equation,
    Full,
    Rule,
    Value,
    scalar_source,
)
from chainrule.native.dtypes import is_key


def _physical(aval: Any, axes: Sequence[int]) -> list[int]:
    """``axes`` with the trailing word axis of a key array kept last."""
    return [*axes, *range(len(aval.shape), len(physical_shape(aval)))]


def broadcast_in_dim(b: Builder, eqn: Equation, x: Value, *_: Value) -> Value:
    """``x`` with its axes at ``broadcast_dimensions`` of ``shape``."""
    old, new = eqn.invars[0].aval, eqn.outvars[0].aval
    if not isinstance(x, fx.Node):
        return Full(x.value if isinstance(x, Full) else x, new)
    if old.shape == new.shape:
        return x
    shape = physical_shape(new)
    source = scalar_source(x)
    if isinstance(source, fx.Node):
        return b.repeat(source, shape)
    axes = _physical(old, eqn.params["broadcast_dimensions"])
    if is_key(new.dtype):
        axes[len(old.shape) :] = range(len(new.shape), len(shape))
    ones = [1] * len(shape)
    for size, axis in zip(physical_shape(old), axes, strict=True):
        ones[axis] = size
    # Leading axes torch adds by itself.
    lead = next((i for i in range(len(ones)) if i in axes), len(ones))
    node = x if tuple(ones[lead:]) == physical_shape(old) else b.emit(torch.reshape, x, ones)
    if tuple(ones) == shape and node is not x:
        return node
    return b.emit(torch.broadcast_to, node, shape)


def _reshape(b: Builder, eqn: Equation, x: Value, *_: Value) -> Value:
    old, new = eqn.invars[0].aval, eqn.outvars[0].aval
    if isinstance(x, Full):
        return Full(x.value, new) if new.shape else x.value
    if old.shape == new.shape:
        return x
    if not isinstance(x, fx.Node):
        return Full(x, new)
    source = scalar_source(x)
    if isinstance(source, fx.Node):
        return b.repeat(source, new.shape) if new.shape else source
    return b.emit(torch.reshape, x, physical_shape(new))


def _transpose(b: Builder, eqn: Equation, x: Value) -> Value:
    old, new = eqn.invars[0].aval, eqn.outvars[0].aval
    if isinstance(x, Full):
        return Full(x.value, new)
    axes = eqn.params["permutation"]
    if tuple(axes) == tuple(range(len(axes))):
        return x
    return b.emit(torch.permute, x, _physical(old, axes))


def _slice(b: Builder, eqn: Equation, x: Value) -> Value:
    aval = eqn.outvars[0].aval
    if isinstance(x, Full):
        return Full(x.value, aval)
    if aval.shape == eqn.invars[0].aval.shape:
        return x
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    if not any(starts) and aval.size == 1 and not is_key(aval.dtype):
        return b.emit(ops.first, x)
    strides = eqn.params["strides"] or [1] * len(starts)
    for axis, (start, limit, stride) in enumerate(zip(starts, limits, strides, strict=True)):
        if (start, limit, stride) == (0, eqn.invars[0].aval.shape[axis], 1):
            continue
        if stride == 1:
            x = b.emit(torch.narrow, x, axis, start, limit - start)
        else:
            index = (*[slice(None)] * axis, slice(start, limit, stride))
            x = b.emit(torch.Tensor.__getitem__, x, index)
    return x


def _rev(b: Builder, eqn: Equation, x: Value) -> Value:
    if isinstance(x, Full):
        return x
    return b.emit(torch.flip, x, tuple(eqn.params["dimensions"]))


def _concatenate(b: Builder, eqn: Equation, *operands: Value) -> Value:
    nodes = [b.tensor(x, v.aval) for x, v in zip(operands, eqn.invars, strict=True)]
    return nodes[0] if len(nodes) == 1 else b.emit(torch.cat, nodes, int(eqn.params["dimension"]))


def _stack(b: Builder, eqn: Equation, *operands: Value) -> Value:
    nodes = [b.tensor(x, v.aval) for x, v in zip(operands, eqn.invars, strict=True)]
    return b.emit(torch.stack, nodes, eqn.params["axis"])


def _unstack(b: Builder, eqn: Equation, x: Value) -> Sequence[Value]:
    node = b.tensor(x, eqn.invars[0].aval)
    axis = eqn.params["axis"]
    return [b.emit(torch.select, node, axis, i) for i in range(len(eqn.outvars))]


def _split(b: Builder, eqn: Equation, x: Value) -> Sequence[Value]:
    starts = np.cumsum([0, *eqn.params["sizes"]])
    node = b.tensor(x, eqn.invars[0].aval)
    return [
        b.emit(torch.narrow, node, eqn.params["axis"], int(start), int(size))
        for start, size in zip(starts, eqn.params["sizes"], strict=False)
    ]


def _pad(b: Builder, eqn: Equation, x: Value, value: Value) -> Value:
    # JAX keeps NumPy integers as they come; the graph's code is text and knows Python's.
    config = tuple(tuple(int(n) for n in axis) for axis in eqn.params["padding_config"])
    return b.emit(ops.pad, b.tensor(x, eqn.invars[0].aval), value, config)


def _iota(b: Builder, eqn: Equation, *_: Value) -> Value:
    aval, axis = eqn.outvars[0].aval, eqn.params["dimension"]
    n = aval.shape[axis]
    node = b.emit(torch.arange, n, dtype=torch_dtype(aval.dtype), device=b.device)
    if len(aval.shape) == 1:
        return node
    node = b.emit(torch.reshape, node, [n if d == axis else 1 for d in range(len(aval.shape))])
    return b.emit(torch.broadcast_to, node, tuple(aval.shape))


def _iota_2x32(b: Builder, eqn: Equation) -> Sequence[Value]:
    return b.items(b.emit(ops.iota_2x32, tuple(eqn.params["shape"]), b.device), 2)


def _dynamic_slice(b: Builder, eqn: Equation, x: Value, *starts: Value) -> Value:
    if isinstance(x, Full):
        return Full(x.value, eqn.outvars[0].aval)
    return b.emit(ops.dynamic_slice, x, starts, tuple(eqn.params["slice_sizes"]))


def _dynamic_update_slice(
    b: Builder, eqn: Equation, x: Value, update: Value, *starts: Value
) -> Value:
    operand, new = (b.tensor(v, a.aval) for v, a in zip((x, update), eqn.invars, strict=False))
    if is_key(eqn.invars[0].aval.dtype):
        starts = (*starts, 0)
    return b.emit(ops.dynamic_update_slice, operand, new, starts)


def _fill(dtype: Any) -> float | int | bool:
    """What an out-of-bounds gather reads by default: NaN, the lowest signed, the highest unsigned."""
    if dtype == np.bool_:
        return True
    if np.issubdtype(dtype, np.signedinteger):
        return int(np.iinfo(dtype).min)
    if np.issubdtype(dtype, np.unsignedinteger):
        return int(np.iinfo(dtype).max)
    return math.nan


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    """Python integers, where JAX may have NumPy ones that generated code cannot name."""
    return tuple(int(v) for v in values)


def _gather(b: Builder, eqn: Equation, x: Value, indices: Value) -> Value:
    aval, p = eqn.invars[0].aval, eqn.params
    if is_key(aval.dtype):
        raise b.unsupported(eqn, "of typed PRNG keys")
    dims, mode, fill = p["dimension_numbers"], p["mode"], p["fill_value"]
    batching = zip(dims.operand_batching_dims, dims.start_indices_batching_dims, strict=True)
    return b.emit(
        ops.gather,
        b.tensor(x, aval),
        b.tensor(indices, eqn.invars[1].aval),
        _ints(p["slice_sizes"]),
        _ints(dims.offset_dims),
        _ints((*dims.collapsed_slice_dims, *dims.operand_batching_dims)),
        _ints(dims.start_index_map),
        tuple(_ints(pair) for pair in batching),
        mode != GatherScatterMode.FILL_OR_DROP,
        _fill(aval.dtype) if fill is None else fill,
    )


def _scatter(reduce: str) -> Rule:
    def rule(b: Builder, eqn: Equation, x: Value, indices: Value, updates: Value) -> Value:
        p = eqn.params
        if is_key(eqn.invars[0].aval.dtype):
            raise b.unsupported(eqn, "of typed PRNG keys")
        dims, avals = p["dimension_numbers"], [v.aval for v in eqn.invars]
        batching = zip(dims.operand_batching_dims, dims.scatter_indices_batching_dims, strict=True)
        node = b.emit(
            ops.scatter,
            *(b.tensor(v, a) for v, a in zip((x, indices, updates), avals, strict=True)),
            reduce,
            _ints(dims.update_window_dims),
            _ints((*dims.inserted_window_dims, *dims.operand_batching_dims)),
            _ints(dims.scatter_dims_to_operand_dims),
            tuple(_ints(pair) for pair in batching),
            p["mode"] == GatherScatterMode.CLIP,
        )
        return b.wrap(node, avals[0])

    return rule


def _sort(b: Builder, eqn: Equation, *operands: Value) -> Sequence[Value]:
    nodes = [b.tensor(x, v.aval) for x, v in zip(operands, eqn.invars, strict=True)]
    node = b.emit(ops.sort, nodes, eqn.params["dimension"], eqn.params["num_keys"])
    return b.items(node, len(nodes))


def _top_k(b: Builder, eqn: Equation, x: Value) -> Sequence[Value]:
    aval, k, axis = eqn.invars[0].aval, eqn.params["k"], eqn.params.get("axis", -1)
    dtype = torch_dtype(eqn.outvars[1].aval.dtype)
    return b.items(b.emit(ops.top_k, b.tensor(x, aval), k, axis % len(aval.shape), dtype), 2)


STRUCTURAL: dict[str, Rule] = {
    "broadcast_in_dim": broadcast_in_dim,
    "concatenate": _concatenate,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "expand_dims": _reshape,
    "gather": _gather,
    "iota": _iota,
    "iota_2x32_shape": _iota_2x32,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "scatter": _scatter("set"),
    "scatter-add": _scatter("sum"),
    "scatter-max": _scatter("amax"),
    "scatter-min": _scatter("amin"),
    "scatter-mul": _scatter("prod"),
    "chainrule_alike": lambda b, eqn, x, like: x,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _reshape,
    "stack": _stack,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}
