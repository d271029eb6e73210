"""The live hyperparameters of a parameter group: its keys in torch, scalar inputs of the program."""

import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chainrule.bridges.checks import check_flags
from chainrule.bridges.step.description import RATES
from chainrule.transforms._checks import check_bounds

_HALF = (torch.bfloat16, torch.float16)
_RATE = "lr"  # the key of the learning rate, or of the multiplier that stands in for it


def key_of(name: str) -> str:
    """The key in a group of a chain's hyperparameter."""
    return _RATE if name in RATES else name


def shortest(value: Tensor) -> float | int:
    """The Python number of a scalar tensor with as few digits as its dtype needs: 0.001, not 0.0010000000474974513."""
    number = value.item()
    if value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return float(str(np.float32(number)))
    return number


def number_of(owner: str, key: str, value: Any, wait: bool) -> Any:
    """The number in a tensor, if it can be had without waiting for a device, or `wait`; anything else as it is.

    Raises:
      ValueError: a tensor of several elements or none.
    """
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(
            f"{owner}: `{key}` must be a number or a tensor of one element, got shape {tuple(value.shape)}"
        )
    return value.item() if wait or value.device.type == "cpu" else value


def check_number(owner: str, key: str, value: Any, dtype: torch.dtype = torch.float32) -> None:
    """Raises `TypeError` or `ValueError` for what is no number, or out of the bounds of the group's key, as it is or in
    the half-precision dtype that holds it."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{owner}: `{key}` must be a number or a tensor, got {value!r}")
    name = key.rpartition(".")[2]
    name = "learning_rate" if name == _RATE else name
    held: Any = value
    if dtype in _HALF:
        held = torch.tensor(float(value), dtype=dtype, device="cpu").item()
    try:
        check_bounds(owner, **{name: value})
        check_bounds(owner, **{name: held})
    except ValueError as error:
        if dtype not in _HALF or held != 1:
            raise
        raise ValueError(
            f"{error}. Its chain keeps hyperparameters in {dtype}, where 0.999 is 1: optax.inject_hyperparams takes "
            "the dtype of the parameters; give it `hyperparam_dtype=jnp.float32`"
        ) from error


def fill(scalar: Tensor, loss: Any) -> None:
    """Writes what a closure returned into a scalar of the program.

    Raises:
      TypeError: it is no number and no tensor.
      ValueError: a tensor of several elements or none.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            shape = tuple(loss.shape)
            raise ValueError(
                f"TorchBridge: the closure must return a scalar loss, got shape {shape}"
            )
        scalar.copy_(loss.detach().reshape(()))
        return
    if not isinstance(loss, numbers.Real):
        raise TypeError(
            f"TorchBridge: the closure must return a scalar loss, got {type(loss).__name__}"
        )
    scalar.fill_(float(loss))


def pair(betas: Any, owner: str = "TorchBridge") -> tuple[Any, Any]:
    """`betas` of a group as (b1, b2).

    Raises:
      ValueError: it is no pair.
    """
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{owner}: `betas` must be a pair (b1, b2), got {betas!r}")
    return betas[0], betas[1]


class Hyperparameters:
    """The scalar inputs of a program that a group's keys set.

    Attributes:
      tensors: key of the group -> the scalar that its program reads.
      multiplier: the scalar for `Extras.multiplier`; that of the key `lr` if the chain exposes no learning rate.
    """

    def __init__(self, dtypes: Mapping[str, torch.dtype], multiplier: bool, device: torch.device):
        """`dtypes` has those of the live hyperparameters by key; `multiplier`: whether `lr` is one."""
        self.tensors = {
            key: torch.zeros((), dtype=dtype, device=device) for key, dtype in dtypes.items()
        }
        self.multiplier = torch.ones((), dtype=torch.float32, device=device)
        if multiplier:
            self.tensors[_RATE] = self.multiplier
        self._filled: dict[str, Any] = {}

    @property
    def has_betas(self) -> bool:
        """Whether the group has `betas`, torch's name for the pair (b1, b2), which its schedulers cycle."""
        return "b1" in self.tensors and "b2" in self.tensors

    def sync(self, group: dict[str, Any], owner: str) -> None:
        """Fills the program's scalars with the values of the group, where they changed.

        Raises:
          TypeError: a value is no number.
          ValueError: a value is out of bounds.
        """
        check_flags(group, owner)
        for key in self.tensors:
            if key not in group:
                raise ValueError(f"{owner} has no `{key}` any more, a hyperparameter of its chain")
        self.sync_betas(group)
        for key, target in self.tensors.items():
            value = group[key]
            if isinstance(value, Tensor):  # on another device it is not looked at: that would wait
                value = number_of(owner, key, value, wait=False)
            if isinstance(value, Tensor):
                target.copy_(value.detach().reshape(()))
                self._filled.pop(key, None)
            elif value != self._filled.get(key):
                check_number(owner, key, value, target.dtype)
                target.fill_(float(value))
                self._filled[key] = value

    def check(self, group: dict[str, Any], owner: str) -> None:
        """Raises what `sync` raises, also for tensors on other devices; a step would not wait for these."""
        check_flags(group, owner)
        for key, target in self.tensors.items():
            check_number(owner, key, number_of(owner, key, group[key], wait=True), target.dtype)

    def sync_betas(self, group: dict[str, Any]) -> None:
        """Makes `betas` and the pair (b1, b2) agree: `betas` counts if it changed since the last call."""
        if not self.has_betas:
            return
        known = self._filled.get("betas")
        if known is not None and group.setdefault("betas", known) != known:
            group["b1"], group["b2"] = pair(group["betas"])
        group["betas"] = self._filled["betas"] = (group["b1"], group["b2"])
