"""What `TorchWrap` asks of the optimizer inside it, and how a state dict of both is put together and taken apart."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from chainrule.bridges.sharded import is_distributed
from chainrule.bridges.torch_links import named


def of_base(name: str) -> Any:
    """A property that is the base's."""

    def read(self: Any) -> Any:
        return getattr(self.base, name)

    def write(self: Any, value: Any) -> None:
        setattr(self.base, name, value)

    return property(read, write, doc=f"`{name}` of the base.")


def check_base(base: Any, before: Any, after: Any) -> None:
    """Raises `TypeError` or `ValueError` for what no links can be put around."""
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            f"TorchWrap: `base` must be an optimizer of torch, got {type(base).__name__}; it comes first, and it is "
            "made already"
        )
    if any(is_distributed(p) for group in base.param_groups for p in group["params"]):
        raise NotImplementedError(
            "TorchWrap: the parameters are DTensors; give `TorchBridge` a chain with the links in it, which takes them"
        )
    if before is None and after is None:
        raise ValueError("TorchWrap: give links `before` the optimizer, `after` it, or both")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"TorchWrap: {type(base).__name__} evaluates the model within its step, so that no link can see its "
            "gradients; use an optimizer that takes the gradients as they are"
        )


def groups_of(
    base: torch.optim.Optimizer, params: Iterable[tuple[str, Tensor]] | None
) -> Callable[[], list[dict[str, Any]]]:
    """What makes the groups of a bridge over the parameters of the base."""
    if params is None:
        return lambda: [{"params": named(group)} for group in base.param_groups]
    name_of = {p: name for name, p in params}
    for group in base.param_groups:
        for p in group["params"]:
            if p not in name_of:
                raise ValueError(
                    f"TorchWrap: `params` must name every parameter of the base; one of shape {tuple(p.shape)} has none"
                )
    return lambda: [{"params": [(name_of[p], p) for p in g["params"]]} for g in base.param_groups]


def prefixed(role: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of one side's state or group in a state dict of all."""
    return {f"{role}.{key}": value for key, value in entries.items() if key != "params"}


def part_of(state_dict: Mapping[str, Any], role: str | None) -> dict[str, Any]:
    """What belongs to one side in a state dict of all; None: to the base."""
    roles = ("before.", "after.")

    def own(entries: Mapping[str, Any] | None) -> dict[str, Any]:
        entries = entries or {}
        if role is None:
            return {key: value for key, value in entries.items() if not str(key).startswith(roles)}
        start = f"{role}."
        mine = {k[len(start) :]: v for k, v in entries.items() if str(k).startswith(start)}
        return {**{k: v for k, v in entries.items() if k == "params"}, **mine}

    return {
        **({k: v for k, v in state_dict.items() if k not in ("state", "param_groups")}),
        "state": {k: e for k, e in ((k, own(e)) for k, e in state_dict["state"].items()) if e},
        "param_groups": [own(group) for group in state_dict["param_groups"]],
    }
