"""Moves of parameters in the compiled kernel, as calls."""

import operator
from typing import Any

import numpy as np
from torch import Tensor

from chainrule.bridges.lowering.ops.kernel import buffers, run_tier2
from chainrule.bridges.lowering.passes.take_kernel_moves import SIGN
from chainrule.bridges.lowering.step_program import KernelMove
from chainrule.native import _kernel
from chainrule.native.primitives import TIER2_NUMBERS


class KernelCall:
    """Moves of one kind, p + s d + r p, in one call."""

    def __init__(self, move: KernelMove):
        self._kind, self._tensors, self._values, self._columns = move
        self._written = [role for role in move.tensors if role != "gradients"]

    def __call__(self, memory: list[Any]) -> None:
        scale, decay, *rest = self._values[self._columns].prod(axis=2, dtype=np.float64)
        given = {role: [memory[i] for i in registers] for role, registers in self._tensors.items()}
        tensors = {role: list(map(Tensor.contiguous, ts)) for role, ts in given.items()}
        # p + s d + r p is p - rate (d + weight_decay p)
        moves = scale != 0
        weight_decay = np.divide(decay, scale, out=np.zeros_like(scale), where=moves)
        only_decayed = () if moves.all() else np.flatnonzero(~moves)
        numbers = {"learning_rate": -scale, "weight_decay": weight_decay}
        if self._kind == SIGN:
            _kernel.tier0(**{name: buffers(ts, name) for name, ts in tensors.items()}, **numbers)
        else:
            numbers |= dict(zip(TIER2_NUMBERS[2:], rest, strict=True))
            run_tier2(self._kind[1], tensors, numbers)
        for i in only_decayed:
            tensors["parameters"][i].mul_(1 + decay[i])
        for role in self._written:
            if any(map(operator.is_not, tensors[role], given[role])):
                for old, new in zip(given[role], tensors[role], strict=True):
                    old.copy_(new)
