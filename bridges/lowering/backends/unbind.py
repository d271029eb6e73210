"""Vectors taken apart."""

from typing import Any

import torch

from chainrule.bridges.lowering.executor import Registers
from chainrule.bridges.lowering.nodes import args_of, first_arg, value_of
from chainrule.bridges.lowering.passes.partition import Piece


class Unbind:
    """Entries of a vector: views, made once, of a copy of it."""

    def __init__(self, piece: Piece, registers: Registers):
        source = first_arg(piece.nodes[0])
        fake = value_of(source)
        self.source = registers[source]
        self.vector = torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)
        for node in piece.outputs:
            registers.bring(registers[node], self.vector[args_of(node)[1]])

    def __call__(self, memory: list[Any]) -> None:
        self.vector.copy_(memory[self.source])
