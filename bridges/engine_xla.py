"""Steps that run in XLA and exchange tensors with torch over DLPack: for chains that have no lowering to torch.

What DLPack does and does not do, and how this file meets it:

- A tensor that requires grad, has strides or is conjugated is refused: tensors are detached and made contiguous.
- An import shares memory. XLA runs asynchronously and may hand an input through as an output, so the step waits for XLA
  to finish, and copies what shares memory with a tensor before any tensor is written.
- float64 and int64 are narrowed while x64 is off: traced and run under x64 if and only if an input has 64 bits.
- uint32 and typed random keys are held by torch as int64 (see `lowering.arrays`): these few are converted by value.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.extend.core import jaxpr_as_fun
from jax.sharding import SingleDeviceSharding
from torch import Tensor

from chainrule.bridges.lowering.arrays import MASKS, to_jax, to_torch
from chainrule.bridges.lowering.executor import InPlace, write
from chainrule.bridges.step.trace import Trace
from chainrule.native.dtypes import is_key, x64_if_wide


class XlaProgram:
    """A step that JAX computes."""

    def __init__(self, trace: Trace, targets: Sequence[int], device: torch.device):
        self._targets = targets
        self._avals = jax.tree.leaves(trace.inputs)
        self._by_value = [is_key(a.dtype) or np.dtype(a.dtype).name in MASKS for a in self._avals]
        self._jaxpr, self._device = trace.jaxpr, device
        self._flat: Any = None

    def ready(self) -> InPlace:
        if self._flat is None:  # compiled now: what fails in a step leaves it half done
            where = SingleDeviceSharding(
                jax.dlpack.from_dlpack(torch.empty(1, device=self._device)).device
            )
            avals = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where) for a in self._avals]
            with x64_if_wide(self._avals):
                self._flat = jax.jit(jaxpr_as_fun(self._jaxpr)).lower(*avals).compile()
        return self

    def agrees(self) -> bool:
        return False

    def passes(self) -> list[str]:
        return ["  passes: XLA's own"]

    def explained(self, parameters: int) -> list[str]:
        return ["  runs in XLA over DLPack"]

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        with torch.no_grad(), x64_if_wide(self._avals):
            arrays = [
                to_jax(t, aval) if slow else jax.dlpack.from_dlpack(_plain(t))
                for t, aval, slow in zip(inputs, self._avals, self._by_value, strict=True)
            ]
            outputs = jax.block_until_ready(self._flat(*arrays))
            shared = {t.data_ptr() for t in inputs}
            values = []
            for output, target in zip(outputs, self._targets, strict=True):
                if self._by_value[target]:
                    values.append(to_torch(output, inputs[target].device))
                else:
                    value = torch.from_dlpack(output)
                    values.append(value.clone() if value.data_ptr() in shared else value)
            write([inputs[t] for t in self._targets], values)


class XlaEngine:
    """Leaves steps to JAX."""

    def program(
        self,
        trace: Trace,
        targets: Sequence[int],
        device: torch.device,
        sharding: Any = None,
    ) -> XlaProgram:
        if sharding is not None:
            raise NotImplementedError(
                'TorchBridge: engine="xla" runs on one device, and a parameter is a DTensor; use the default engine'
            )
        return XlaProgram(trace, targets, device)

    def initial(
        self, init: Trace, params: Sequence[Tensor], device: torch.device, sharding: Any = None
    ) -> list[Tensor]:
        del sharding  # `program` refused it
        avals = jax.tree.leaves(init.inputs)
        with x64_if_wide(avals):
            arrays = [to_jax(p, aval) for p, aval in zip(params, avals, strict=True)]
            return [to_torch(leaf, device) for leaf in jaxpr_as_fun(init.jaxpr)(*arrays)]


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous()
