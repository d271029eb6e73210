"""What the optimizers of torch and of others keep of a parameter, by the algebra's names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq", "count": "step"}
_MOMENTUM = {"mu": "momentum_buffer", "trace": "momentum_buffer"}
_ONE_STATE = {"mu": "state1", "trace": "state1"}
_EIGHT_BIT = {"mu": "state1", "nu": "state2", "count": "step"}

MOMENTS: dict[str, dict[str, str]] = {
    **dict.fromkeys((f"torch.{name}" for name in ("Adam", "AdamW", "NAdam", "RAdam")), _ADAM),
    "torch.Adamax": {"mu": "exp_avg", "count": "step"},
    "torch.SGD": _MOMENTUM,
    "torch.Muon": _MOMENTUM,
    "torch.RMSprop": {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer", "count": "step"},
    "torch.Adadelta": {"nu": "square_avg", "count": "step"},
    **dict.fromkeys((f"torchao.{n}" for n in ("AdamW8bit", "AdamW4bit", "AdamWFp8", "_AdamW")), _ADAM),
    **dict.fromkeys((f"torchao.{n}" for n in ("Adam8bit", "Adam4bit", "AdamFp8", "_AdamBase")), _ADAM),
    **dict.fromkeys((f"bitsandbytes.{n}" for n in ("Adam", "Adam8bit", "AdamW", "AdamW8bit")), _EIGHT_BIT),
    **dict.fromkeys((f"bitsandbytes.{n}" for n in ("SGD", "SGD8bit", "Lion", "Lion8bit")), _ONE_STATE),
}  # fmt: skip
"""package.class -> name of a moment -> key of `optimizer.state[p]`."""

# What an optimizer keeps only if it was asked to.
_IF = {"momentum_buffer": "momentum", "grad_avg": "centered"}


def moments_of(base: torch.optim.Optimizer) -> dict[str, str]:
    """The moments that an optimizer keeps: name -> key of its state. Empty for one that no table knows."""
    kinds = [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(base).__mro__]
    table = next((MOMENTS[kind] for kind in kinds if kind in MOMENTS), {})
    kept = [
        key
        for key in table.values()
        if all(g.get(_IF.get(key, ""), True) for g in base.param_groups)
    ]
    return {name: key for name, key in table.items() if key in kept}


def value_of(entry: Mapping[str, Any], key: str) -> Any:
    """An entry of an optimizer's state as a plain tensor, out of its codes; None if it is not there."""
    value = entry.get(key)
    if not isinstance(value, Tensor):
        return value
    if value.dtype == torch.uint8 and key.startswith("state"):
        number = key.removeprefix("state")
        return decoded(value, entry[f"qmap{number}"], entry[f"absmax{number}"])
    return (
        value.dequantize() if type(value) is not Tensor and hasattr(value, "block_size") else value
    )  # pyright: ignore


def decoded(codes: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """The numbers that bitsandbytes holds in codes of 8 bits: `table[code]`, times the scale of its block."""
    flat = table[codes.reshape(-1).long()].float()
    block = -(-flat.numel() // scales.numel())
    block = (
        1 << (block - 1).bit_length()
    )  # block sizes are powers of two; the last block may be short
    return (flat * scales.repeat_interleave(block)[: flat.numel()]).reshape(codes.shape)
