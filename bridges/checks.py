"""What a bridge refuses among parameters and gradients, before anything is written."""

import contextlib
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from chainrule.bridges.sharded import local

_Result = TypeVar("_Result")

quick_reads = torch._C.DisableTorchFunctionSubclass
"""A context in which to read an attribute of a DTensor costs as much as of a plain tensor, a third of what it does
elsewhere: torch does not look whether its class has a function for that."""

FLAGS = {
    "foreach": "a bridge batches over parameters by itself",
    "fused": "use TorchBridge(..., compile=True)",
    "capturable": "a bridge reads no values on the host where its chain needs none",
    "maximize": "negate the gradients in the chain: optax.chain(optax.scale(-1.0), ...)",
    "differentiable": "it writes in place, outside autograd; to differentiate through updates run the chain in JAX",
    "amsgrad": "use optax.amsgrad for the chain",
}
"""What torch's own optimizers take: False and None ask for what a bridge does; what to do for the rest."""


def check_flags(group: Mapping[str, Any], owner: str) -> None:
    """Raises `ValueError` for a flag of torch's optimizers that asks for what no bridge does."""
    for flag, remedy in FLAGS.items():
        if group.get(flag):
            raise ValueError(f"{owner}: `{flag}` cannot be {group[flag]!r} in a bridge; {remedy}")


def is_flag(key: str, value: Any) -> bool:
    """Whether a group's entry is a flag of torch's optimizers that asks for nothing."""
    return key in FLAGS and not value


def check_order(chain: Any, params: Any) -> None:
    """Raises `TypeError`, which says what to write, for swapped arguments, a torch optimizer or a module."""
    if isinstance(chain, torch.optim.Optimizer):
        raise TypeError(
            f"TorchBridge: `chain` must be a gradient transformation, got the torch optimizer {type(chain).__name__}; "
            "give a chain, such as `chainrule.chains.adam()` or `optax.sgd(0.1)`"
        )
    if hasattr(params, "init") and hasattr(params, "update"):
        raise TypeError(
            "TorchBridge: `params` is a gradient transformation; the chain comes first: write "
            "`TorchBridge(chain, params)`"
        )
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"TorchBridge: `params` must be parameters, got the module {type(params).__name__}; give "
            "`model.parameters()`, or `model.named_parameters()` for a chain that reads names"
        )


def check_params(params: Sequence[Tensor], labels: Sequence[str]) -> None:
    """Raises `TypeError` or `ValueError` for parameters that no chain can update, or names given twice."""
    if len(set(labels)) != len(labels):
        raise ValueError("TorchBridge: two parameters of one group have the same name")
    for p, label in zip(params, labels, strict=True):
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(
                f"TorchBridge: parameter {label} has no shape yet; run the model once (a lazy module finds its shapes "
                "then) before you make the bridge"
            )
        if p.is_inference():
            raise ValueError(
                f"TorchBridge: parameter {label} was made in torch.inference_mode, so no step may change it; make the "
                "model outside"
            )
        if p.is_complex():
            raise TypeError(
                f"TorchBridge: parameter {label} is {p.dtype}; JAX and torch conjugate complex gradients differently, "
                "so optimize torch.view_as_real of it"
            )
        if not p.is_floating_point():
            raise TypeError(
                f"TorchBridge: parameter {label} is {p.dtype}, expected a floating-point dtype"
            )
        if getattr(p, "_fsdp_flattened", False):
            raise TypeError(
                f"TorchBridge: parameter {label} is cut or flattened by FullyShardedDataParallel (FSDP1), so its shape "
                "is lost; shard the model with torch.distributed.fsdp.fully_shard"
            )
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.nbytes, label)
        for p, label in zip(map(local, params), labels, strict=True)
        if p.device.type == "cpu" and p.numel() and p.is_contiguous()
    )
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            raise ValueError(
                f"TorchBridge: parameters {one} and {other} overlap in memory, so a step would update the overlap "
                "twice; clone one of them"
            )


def one_device(params: Sequence[Tensor]) -> torch.device:
    """The device of all parameters of a group.

    Raises:
      ValueError: there are several.
    """
    with quick_reads():
        devices = {p.device for p in params}
    if len(devices) > 1:
        raise ValueError(
            f"TorchBridge: a parameter group lies on {' and '.join(sorted(map(str, devices)))}; a chain sees each "
            "group as one tree, so give every device a group of its own"
        )
    return devices.pop()


def check_not_meta(params: Sequence[Tensor], owner: str) -> None:
    """Raises `RuntimeError` for parameters on the device `meta`."""
    if params[0].is_meta:
        raise RuntimeError(
            f"{owner}: its parameters are on the device `meta` and have no gradients. `model.to_empty` makes new "
            "parameters, so make the bridge after it, or call "
            "torch.__future__.set_swap_module_params_on_conversion(True) before it"
        )


def outside_inference_mode(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """`function` with inference mode off: tensors that are made in it could not be changed outside."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> _Result:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call


_dtype, _shape, _layout = map(operator.attrgetter, ("dtype", "shape", "layout"))


def check_gradients(
    params: Sequence[Tensor],
    grads: Sequence[Any],
    dtypes: Sequence[torch.dtype],
    shapes: Sequence[torch.Size],
    labels: Sequence[str],
) -> None:
    """Raises `RuntimeError` for a sparse gradient, or where a dtype or a shape is not the one that was traced."""
    # All at once, because a step on many small tensors spends much of its time in loops like the one below.
    there = [g for g in grads if g is not None]
    own = list(dtypes)
    if len(there) < len(grads):
        own = [d for d, g in zip(dtypes, grads, strict=True) if g is not None]
    if (
        list(map(_dtype, params)) == list(dtypes)
        and all(map(operator.eq, map(_shape, params), shapes))
        and set(map(_layout, there)) <= {torch.strided}
        and list(map(_dtype, there)) == own
    ):
        return
    for p, g, dtype, shape, label in zip(params, grads, dtypes, shapes, labels, strict=True):
        if p.dtype is not dtype or p.shape != shape:
            then, now = f"{dtype} {tuple(shape)}", f"{p.dtype} {tuple(p.shape)}"
            raise RuntimeError(
                f"TorchBridge: parameter {label} was {then} when the state was made and is {now} now; make a new bridge"
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


_NOTHING = contextlib.nullcontext()


def autocast_off(params: Iterable[Tensor]) -> contextlib.AbstractContextManager[Any]:
    """A context in which operations on the devices of `params`, and on the CPU, keep their dtypes, whatever
    `torch.autocast` is around it."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING
    stack = contextlib.ExitStack()
    for device_type in {"cpu", *(p.device.type for p in params)} - {"meta"}:
        if torch.is_autocast_enabled(device_type):
            stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack
