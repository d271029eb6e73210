"""A lowered program as a function that works in place."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from chainrule.bridges.lowering.program import Lowered

InPlace = Callable[[Sequence[Tensor]], None]
"""Takes the flat inputs of a program and writes every output into the input that it renews."""


def make_step(lowered: Lowered, targets: Sequence[int], *, compile: bool = False) -> InPlace:
    """The program as a function that writes its outputs into its inputs.

    Args:
      lowered: the program.
      targets: for every output, the position of the input that it renews; no input twice.
      compile: whether to run it through Inductor.

    Returns:
      A function of the flat inputs. They may be other tensors at every call, of the same shapes, dtypes and device. If
      the program raises, nothing has been written.

    >>> import jax, jax.numpy as jnp
    >>> from chainrule.bridges.lowering import lower
    >>> aval = jax.ShapeDtypeStruct((), jnp.float32)
    >>> swap = make_step(lower(lambda a, b: (b, a + b), aval, aval), (0, 1))
    >>> a, b = torch.tensor(1.0), torch.tensor(2.0)
    >>> swap([a, b]), a, b
    (None, tensor(2.), tensor(3.))
    """
    if compile:
        raise NotImplementedError("compile=True: not built yet")
    renewed = [(i, t) for i, t in enumerate(targets) if lowered.passthrough.get(i) != t]
    # An output that is another input unchanged must be read before that input is renewed.
    borrowed = [i for i, _ in renewed if i in lowered.passthrough]

    def step(inputs: Sequence[Tensor]) -> None:
        outputs = list(lowered(*inputs))
        for i in borrowed:
            outputs[i] = outputs[i].clone()
        with torch.no_grad():
            write([inputs[t] for _, t in renewed], [outputs[i] for i, _ in renewed])

    return step


def write(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies every value into its target."""
    if targets:
        copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
        copy(list(targets), list(values))
