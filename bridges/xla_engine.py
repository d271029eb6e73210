"""Steps that run in XLA and exchange tensors with torch over DLPack: for chains that have no lowering to torch.

What DLPack does and does not do, and how this file meets it:

- A tensor that requires grad, has strides or is conjugated is refused: tensors are detached and made contiguous.
- An import shares memory. XLA runs asynchronously and may hand an input through as an output, so the step waits for XLA
  to finish, and copies what shares memory with a tensor before any tensor is written.
- float64 and int64 are narrowed while x64 is off: traced and run under x64 if and only if an input has 64 bits.
- uint32 and typed random keys are held by torch as int64 (see `lowering.convert`): these few are converted by value.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

from chainrule.bridges.lowering.convert import MASKS, is_key, to_jax, to_torch
from chainrule.bridges.lowering.runtime import InPlace, write


def x64_if_wide(structs: Any) -> Any:
    """A context in which JAX keeps 64-bit values if a leaf of `structs` has them."""
    wide = any(
        not is_key(s.dtype) and np.dtype(s.dtype).itemsize >= 8 for s in jax.tree.leaves(structs)
    )
    return jax.enable_x64(wide or jax.config.read("jax_enable_x64"))


def used_inputs(fn: Callable[..., Any], *structs: Any) -> tuple[list[bool], Any]:
    """Traces `fn`: whether each flat input is used, and the structs of the result."""
    with x64_if_wide(structs):
        jaxpr, result = jax.make_jaxpr(fn, return_shape=True)(*structs)
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.jaxpr.outvars}
    return [id(v) in read for v in jaxpr.jaxpr.invars], result


def make_xla_step(
    fn: Callable[..., Any], structs: Sequence[Any], targets: Sequence[int]
) -> InPlace:
    """`fn` as a function of flat torch tensors that writes its outputs into its inputs.

    Args:
      fn: a pure JAX function of pytrees.
      structs: its arguments as pytrees of structs.
      targets: for every flat output, the position of the flat input that it renews.

    Returns:
      A function of the flat inputs, as `lowering.runtime.make_step` returns.
    """
    avals, structure = jax.tree.flatten(tuple(structs))
    by_value = [is_key(a.dtype) or np.dtype(a.dtype).name in MASKS for a in avals]

    @jax.jit
    def flat(*leaves):
        return jax.tree.leaves(fn(*jax.tree.unflatten(structure, leaves)))

    def step(inputs: Sequence[Tensor]) -> None:
        with torch.no_grad(), x64_if_wide(avals):
            arrays = [
                to_jax(t, aval) if slow else jax.dlpack.from_dlpack(_plain(t))
                for t, aval, slow in zip(inputs, avals, by_value, strict=True)
            ]
            outputs = jax.block_until_ready(flat(*arrays))
            shared = {t.data_ptr() for t in inputs}
            values = []
            for output, target in zip(outputs, targets, strict=True):
                if by_value[target]:
                    values.append(to_torch(output, inputs[target].device))
                else:
                    value = torch.from_dlpack(output)
                    values.append(value.clone() if value.data_ptr() in shared else value)
            write([inputs[t] for t in targets], values)

    return step


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous()
