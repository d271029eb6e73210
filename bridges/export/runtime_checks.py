"""What an exported optimizer refuses; what `file` writes above it for each chain is declared here."""

# pyright: reportUnusedFunction=false, reportUnusedVariable=false
import numbers
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_BOUNDS: Mapping[str, tuple[float, float, bool, bool]] = {}
_FLAT: Mapping[str, bool] = {}
_GROUP_STATE: Sequence[str] = ()
_LEAF_STATE: Sequence[Sequence[str]] = ()
_LIVE: Mapping[str, torch.dtype] = {}
_READS_LOSS = False


def _kind_of(dtype: torch.dtype, shape: torch.Size) -> int | None:
    del dtype, shape
    raise NotImplementedError


def _start(leaves: Sequence[Any], group: dict[str, Tensor]) -> None:
    raise NotImplementedError


def _step(
    leaves: Sequence[Any], group: dict[str, Tensor], rates: Mapping[str, Tensor], loss: Tensor
) -> None:
    raise NotImplementedError


# ------------------------------------------------------------------------------------------------


_FLAGS = {
    "foreach": "parameters are batched where that is faster",
    "fused": "there is no fused form",
    "capturable": "it cannot be captured",
    "maximize": "negate the loss",
    "differentiable": "it writes in place",
    "amsgrad": "export a chain of optax.amsgrad",
}
_TORCH_KEYS = {
    "params", "param_names", "betas", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum",
    "initial_momentum", "tree",
}  # fmt: skip


def _pair(betas: Any, owner: str) -> tuple[Any, Any]:
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{owner}: `betas` must be a pair (b1, b2), got {betas!r}")
    return betas[0], betas[1]


def _check(owner: str, key: str, value: Any) -> None:
    """Raises `TypeError` or `ValueError` for a hyperparameter that is no number, or out of bounds."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{owner}: `{key}` must be a number, got shape {tuple(value.shape)}")
        value = value.item()
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{owner}: `{key}` must be a number or a tensor, got {value!r}")
    if key not in _BOUNDS:
        return
    low, high, open_low, open_high = _BOUNDS[key]
    number = float(value)
    if not (
        (number > low if open_low else number >= low)
        and (number < high if open_high else number <= high)
    ):
        interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"
        raise ValueError(f"{owner}: `{key}` must be in {interval}, got {value}")


def _check_param(owner: str, p: Tensor) -> None:
    if p.is_complex() or not p.is_floating_point():
        raise TypeError(f"{owner}: a parameter is {p.dtype}, expected a real floating-point dtype")
    _kind(owner, p)


def _kind(owner: str, p: Tensor) -> int:
    found = _kind_of(p.dtype, p.shape)
    if found is None:
        raise ValueError(
            f"{owner}: a parameter of {p.dtype} {tuple(p.shape)} is none of those that this file was exported for; "
            "export the chain again with it among the parameters"
        )
    return found


def _check_grad(owner: str, p: Tensor) -> None:
    if p.grad is None:
        return
    if p.grad.layout is not torch.strided:
        raise RuntimeError(f"{owner}: sparse gradients are not supported")
    if p.grad.dtype is not p.dtype:
        raise RuntimeError(
            f"{owner}: a gradient is {p.grad.dtype}, its parameter {p.dtype}; cast it first"
        )


def _ordered(group: Mapping[str, Any], members: Iterable[Tensor]) -> list[Tensor]:
    """Parameters in the order of their names, if they have any."""
    names = group.get("param_names")
    if names is None or isinstance(names, tuple) or group.get("tree") == "positions":
        return list(members)
    name_of = dict(zip(group["params"], names, strict=True))
    return sorted(members, key=name_of.__getitem__)


def _saved_ids(owner: str, group: Mapping[str, Any], saved: Mapping[str, Any]) -> list[Any]:
    """The saved id of every parameter: by name if both sides have names, else by position."""
    ids, names, own = list(saved["params"]), saved.get("param_names"), group.get("param_names")
    if len(ids) != len(group["params"]):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group"
        )
    if names is None or own is None:
        return ids
    if set(names) != set(own):
        raise ValueError(
            f"{owner} is of other parameters: {sorted(set(names) ^ set(own))[:8]} are in one of them only"
        )
    id_of = dict(zip(names, ids, strict=True))
    return [id_of[name] for name in own]


def _fitting(owner: str, name: str, value: Any, target: Tensor) -> Tensor:
    """A copy of a saved entry in the dtype of its target."""
    if not isinstance(value, Tensor) or value.shape != target.shape:
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"{owner}: state entry `{name}` is {found}, expected {tuple(target.shape)}"
        )
    if value.is_floating_point() != target.is_floating_point():
        raise ValueError(f"{owner}: state entry `{name}` is {value.dtype}, expected {target.dtype}")
    return value.detach().to(device=target.device, dtype=target.dtype, copy=True)


def _float32(x: float) -> float:
    """A number rounded to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]
