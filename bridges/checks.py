"""What a bridge refuses among parameters and gradients, before anything is written."""

import itertools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def check_params(params: Sequence[Tensor], labels: Sequence[str]) -> None:
    """Raises `TypeError` or `ValueError` for parameters that no chain can update, or names given twice."""
    if len(set(labels)) != len(labels):
        raise ValueError("TorchBridge: two parameters of one group have the same name")
    for p, label in zip(params, labels, strict=True):
        if p.is_complex():
            raise TypeError(
                f"TorchBridge: parameter {label} is {p.dtype}; JAX and torch conjugate complex gradients differently, "
                "so optimize torch.view_as_real of it"
            )
        if not p.is_floating_point():
            raise TypeError(
                f"TorchBridge: parameter {label} is {p.dtype}, expected a floating-point dtype"
            )
        distributed = sys.modules.get("torch.distributed.tensor")
        if distributed is not None and isinstance(p, distributed.DTensor):
            raise TypeError(
                f"TorchBridge: parameter {label} is a DTensor; a chain may couple parameters, so pass full tensors, or "
                "the local ones (`p.to_local()`) to a chain that works leaf by leaf"
            )
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.nbytes, label)
        for p, label in zip(params, labels, strict=True)
        if p.device.type == "cpu" and p.numel() and p.is_contiguous()
    )
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"TorchBridge: parameters {one} and {other} overlap in memory, so a step would update the overlap "
                "twice; clone one of them"
            )


def check_gradients(
    params: Sequence[Tensor],
    grads: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    labels: Sequence[str],
) -> None:
    """Raises `RuntimeError` for a gradient that is sparse, or where a dtype is not the one that was traced."""
    for p, g, dtype, label in zip(params, grads, dtypes, labels, strict=True):
        if p.dtype is not dtype:
            raise RuntimeError(
                f"TorchBridge: parameter {label} was {dtype} when the bridge was made and is {p.dtype} now; make a new "
                "bridge"
            )
        if g is None:
            continue
        if g.layout is not torch.strided:
            raise RuntimeError(
                f"TorchBridge does not support sparse gradients, got one for parameter {label}"
            )
        if g.dtype is not dtype:
            raise RuntimeError(
                f"TorchBridge: the gradient of parameter {label} is {g.dtype}, the parameter {p.dtype}; cast it first"
            )
