"""A flat chain as a step on Keras variables, on the torch backend: lowered to torch, in place."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax.numpy as jnp
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch import Tensor

from chainrule.bridges.keras_backends import FlatStep
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


class TorchStep(FlatStep):
    """Runs the update as a torch program on the variables' own tensors."""

    # A program already: Keras may compile the training step around it.
    __call__ = cast(Any, torch.compiler.disable(torch.no_grad()(FlatStep.__call__)))
    direction = cast(Any, torch.compiler.disable(torch.no_grad()(FlatStep.direction)))

    def _made(self, name: str, missing: tuple[int, ...], *more: Any) -> InPlace:
        """`FlatChain.step` or `.direction` in place; a direction is written into the last list of tensors."""
        device, moved = more
        params = self._flat.structs
        grads = [s for i, s in enumerate(params) if i not in missing]
        stored = [Struct(k.shape, jnp.dtype(k.dtype)) for k in self._flat.stored]
        structs = [params, grads, stored, Struct((), jnp.float32), *([grads] if moved else [])]
        starts = [0, len(params), len(params) + len(grads)]
        starts.append(starts[2] + len(stored) + 1)
        new = range(starts[2], starts[2] + len(stored))
        first = starts[0 if name == "step" else 3 if moved else 1]
        count = len(params) if name == "step" else len(grads)
        with wide(params):
            targets = [*range(first, first + count), *new]
            return in_place(self._function(name, missing), structs, targets, device, self._compile)

    def _run(self, name: str, missing: tuple[int, ...], *arguments: Any) -> tuple[Any, Any]:
        params, grads, state, rate, *moved = arguments
        params = [p.detach() for p in params]
        device = params[0].device
        written = params
        if name == "direction":  # over a copy of what the caller goes on reading
            written = [t.detach().clone() for t in (moved[0] if moved else grads)]
            grads, moved = (grads, [written]) if moved else (written, [])
        program = self._program(name, missing, device, bool(moved))
        program([*params, *grads, *state, rate.to(device), *(moved[0] if moved else [])])
        return written, state

    def _values(self, variables: Sequence[Any]) -> list[Tensor]:
        """What a program may write to: the tensors, or copies in a stateless scope, which owns its values."""
        if in_stateless_scope():
            return [v.value.detach().clone() for v in variables]
        return [v.value.detach() for v in variables]

    def _like(self, grad: Tensor, value: Tensor) -> Tensor:
        return grad.detach().to(value)

    def _assign(self, variables: Sequence[Any], values: Sequence[Tensor]) -> None:
        if in_stateless_scope():
            super()._assign(variables, values)


def loss_gradients(model: Any, x: Any, y: Any) -> list[Tensor]:
    """The gradients of a compiled model's loss on one batch."""
    loss = model.compute_loss(x, y, model(x, training=True))
    return list(torch.autograd.grad(loss, [v.value for v in model.trainable_variables]))
