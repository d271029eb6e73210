"""A flat chain as a step on Keras variables, on the torch backend: lowered to torch, in place."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch import Tensor

from chainrule.bridges.flat_chain import FlatChain
from chainrule.bridges.lowering import lower
from chainrule.bridges.lowering.executor import InPlace
from chainrule.bridges.lowering.pipeline import make_step
from chainrule.bridges.step.trace import Struct
from chainrule.native.dtypes import x64_if_wide as wide


def in_place(
    function: Callable[..., Any],
    structs: Sequence[Any],
    targets: Sequence[int],
    device: torch.device,
    compile: bool,
) -> InPlace:
    """A JAX function of flat lists as a torch program that writes its outputs into its inputs.

    Args:
      function: pure, of one list for each entry of `structs`.
      structs: shapes and dtypes.
      targets: for every flat output, the position of the flat input that it renews.
      device: where the tensors are.
      compile: whether to run it through Inductor.
    """
    lowered = lower(function, *structs, device=device, compiled=compile)
    return make_step(lowered, targets, compile=compile)


class TorchStep:
    """Runs the update as a torch program on the variables' own tensors."""

    def __init__(self, flat: FlatChain, compile: bool):
        self._flat, self._compile = flat, compile
        self._programs: dict[Any, InPlace] = {}

    def _program(
        self, name: str, missing: tuple[int, ...], device: torch.device, moved: bool = False
    ) -> InPlace:
        """`FlatChain.step` or `.direction` in place; a direction is written into the last list of tensors."""
        key = (name, missing, device, moved)
        if key not in self._programs:
            params = self._flat.structs
            grads = [s for i, s in enumerate(params) if i not in missing]
            stored = [Struct(k.shape, jnp.dtype(k.dtype)) for k in self._flat.stored]
            structs = [params, grads, stored, Struct((), jnp.float32), *([grads] if moved else [])]
            starts = [0, len(params), len(params) + len(grads)]
            starts.append(starts[2] + len(stored) + 1)
            new = range(starts[2], starts[2] + len(stored))
            first = starts[0 if name == "step" else 3 if moved else 1]
            count = len(params) if name == "step" else len(grads)
            function = functools.partial(getattr(self._flat, name), missing=missing)
            with wide(params):
                targets = [*range(first, first + count), *new]
                self._programs[key] = in_place(function, structs, targets, device, self._compile)
        return self._programs[key]

    @torch.compiler.disable  # a program already; Keras may compile the training step around it
    @torch.no_grad()
    def __call__(
        self,
        params: Sequence[Any],
        grads: Sequence[Tensor],
        stored: Sequence[Any],
        rate: Tensor,
        missing: tuple[int, ...],
    ) -> None:
        """Writes new parameters and state into the variables `params` and `stored`."""
        variables = [*params, *stored]
        tensors = _tensors(variables)
        values, state = tensors[: len(params)], tensors[len(params) :]
        given = [v for i, v in enumerate(values) if i not in missing]
        grads = [g.detach().to(v) for g, v in zip(grads, given, strict=True)]
        device = values[0].device
        self._program("step", missing, device)([*values, *grads, *state, rate.to(device)])
        _write_back(variables, tensors)

    @torch.compiler.disable
    @torch.no_grad()
    def direction(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        stored: Sequence[Any],
        rate: Tensor,
        missing: tuple[int, ...],
        moved: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """The updates for values of parameters and gradients; writes the state into the variables `stored`."""
        state, device = _tensors(stored), params[0].device
        given = [p for i, p in enumerate(params) if i not in missing]
        grads = [g.detach().to(p, copy=moved is None) for g, p in zip(grads, given, strict=True)]
        last = [] if moved is None else [m.detach().clone() for m in moved]
        program = self._program("direction", missing, device, moved is not None)
        program([*(p.detach() for p in params), *grads, *state, rate.to(device), *last])
        _write_back(stored, state)
        return last if moved is not None else grads


def _tensors(variables: Sequence[Any]) -> list[Tensor]:
    """What a program may write to: the variables' tensors, or copies in a stateless scope, which owns its values."""
    if in_stateless_scope():
        return [v.value.detach().clone() for v in variables]
    return [v.value.detach() for v in variables]


def _write_back(variables: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    if in_stateless_scope():
        for variable, tensor in zip(variables, tensors, strict=True):
            variable.assign(tensor)


def loss_gradients(model: Any, x: Any, y: Any) -> list[Tensor]:
    """The gradients of a compiled model's loss on one batch."""
    loss = model.compute_loss(x, y, model(x, training=True))
    return list(torch.autograd.grad(loss, [v.value for v in model.trainable_variables]))
