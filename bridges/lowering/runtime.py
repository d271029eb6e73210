"""A lowered program as a function that works in place."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chainrule.bridges.lowering.foreach import foreach_step
from chainrule.bridges.lowering.native import kernel_step
from chainrule.bridges.lowering.program import Lowered

InPlace = Callable[[Sequence[Tensor]], None]
"""Takes the flat inputs of a program and writes every output into the input that it renews."""


class Step:
    """A program that is built for each device when it first runs there, or before: `ready` writes nothing."""

    def __init__(self, build: Callable[[torch.device], InPlace]):
        self._build = build
        self._steps: dict[torch.device, InPlace] = {}

    def ready(self, device: torch.device) -> InPlace:
        if device not in self._steps:
            self._steps[device] = self._build(device)
        return self._steps[device]

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        self.ready(inputs[0].device)(inputs)


def make_step(lowered: Lowered, targets: Sequence[int], *, compile: bool = False) -> Step:
    """The program as a function that writes its outputs into its inputs.

    Args:
      lowered: the program.
      targets: for every output, the position of the input that it renews; no input twice.
      compile: whether to run it through Inductor.

    Returns:
      A function of the flat inputs. They may be other tensors at every call, of the same shapes and
      dtypes.

    >>> import jax, jax.numpy as jnp
    >>> from chainrule.bridges.lowering import lower
    >>> aval = jax.ShapeDtypeStruct((), jnp.float32)
    >>> swap = make_step(lower(lambda a, b: (b, a + b), aval, aval), (0, 1))
    >>> a, b = torch.tensor(1.0), torch.tensor(2.0)
    >>> swap([a, b]), a, b
    (None, tensor(2.), tensor(3.))
    """
    build = foreach_step
    if compile:  # Inductor takes seconds to import
        from chainrule.bridges.lowering.inductor import compiled_step

        build = compiled_step
    return Step(lambda device: kernel_step(build, lowered, targets, device))


def write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies every value into its target."""
    if targets:
        copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
        copy(list(targets), list(values))
