"""A flat chain as a step on Keras variables, on the torch backend: lowered to torch, in place."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import torch
from keras.src.backend.common.stateless_scope import in_stateless_scope
from torch import Tensor

from chainrule.bridges.flat_chain import FlatChain, Struct
from chainrule.bridges.lowering import lower
from chainrule.bridges.lowering.runtime import InPlace, make_step
from chainrule.bridges.probing import wide


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
        self._stored = [Struct(k.shape, jnp.dtype(k.dtype)) for k in flat.stored]

    def _program(self, key: Any, device: torch.device) -> InPlace:
        """The program for parameters without a gradient, by position, or for `"direction"`."""
        if (key, device) not in self._programs:
            make = (
                self._made_direction if key == "direction" else functools.partial(self._made, key)
            )
            self._programs[key, device] = make(device)
        return self._programs[key, device]

    def _made(self, missing: tuple[int, ...], device: torch.device) -> InPlace:
        params = self._flat.structs
        grads = [s for i, s in enumerate(params) if i not in missing]
        structs = (params, grads, self._stored, Struct((), jnp.float32))
        first = len(params) + len(grads)
        targets = [*range(len(params)), *range(first, first + len(self._stored))]
        with wide(params):
            step = functools.partial(self._flat.step, missing=missing)
            return in_place(step, structs, targets, device, self._compile)

    def _made_direction(self, device: torch.device) -> InPlace:
        """Writes the updates into the gradients."""
        params = self._flat.structs
        structs = (params, params, self._stored, Struct((), jnp.float32))
        targets = [*range(len(params), 2 * len(params) + len(self._stored))]
        with wide(params):
            return in_place(self._flat.direction, structs, targets, device, self._compile)

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
        self._program(missing, values[0].device)(
            [*values, *grads, *state, rate.to(values[0].device)]
        )
        _write_back(variables, tensors)

    @torch.no_grad()
    def direction(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], stored: Sequence[Any], rate: Tensor
    ) -> list[Tensor]:
        """The updates for values of parameters and gradients; writes the state into the variables `stored`."""
        state = _tensors(stored)
        updates = [g.detach().to(p, copy=True) for g, p in zip(grads, params, strict=True)]
        device = params[0].device
        self._program("direction", device)(
            [*(p.detach() for p in params), *updates, *state, rate.to(device)]
        )
        _write_back(stored, state)
        return updates


def _tensors(variables: Sequence[Any]) -> list[Tensor]:
    """What a program may write to: the variables' tensors, or copies in a stateless scope, which owns its values."""
    if in_stateless_scope():
        return [v.value.detach().clone() for v in variables]
    return [v.value.detach() for v in variables]


def _write_back(variables: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    if in_stateless_scope():
        for variable, tensor in zip(variables, tensors, strict=True):
            variable.assign(tensor)
