"""An all-reduce of compiled code: in memory of its own, which is there before the first step.

Scalars that compiled code makes are written where they are sent from, and what comes back is read where it arrives; so
to tell hundreds of them costs no call for each.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.executor import Registers, write
from chainrule.bridges.lowering.nodes import args_of, value_of
from chainrule.bridges.lowering.ops.collectives import all_reduce_
from chainrule.bridges.lowering.passes.partition import Piece


def vector_for(nodes: Sequence[fx.Node]) -> Tensor:
    """Memory for what an all-reduce takes, which is of one dtype."""
    first = value_of(nodes[0])
    size = sum(value_of(node).numel() for node in nodes)
    return torch.empty(size, dtype=first.dtype, device=first.device)


def entries_of(vector: Tensor, nodes: Sequence[fx.Node]) -> Iterator[Tensor]:
    """The part of a vector for each of some nodes, one after the other, in its shape."""
    parts = vector.split([value_of(node).numel() for node in nodes])
    return (part.view(value_of(n).shape) for part, n in zip(parts, nodes, strict=True))


class Reduced:
    """The call of a piece that is one all-reduce."""

    def __init__(
        self,
        piece: Piece,
        registers: Registers,
        vector: Tensor,
        homes: Mapping[fx.Node, Tensor],
    ):
        """`vector`: what is sent; `homes`: where compiled code writes what it makes, in this vector or elsewhere."""
        node, *_ = piece.nodes
        xs, self.kind, self.group = args_of(node)[:3]
        self.sent, self.got = vector, torch.empty_like(vector)
        parts = dict(enumerate(entries_of(vector, xs)))
        self.given = {
            i: registers[x]
            for i, x in enumerate(xs)
            if x not in homes or homes[x].data_ptr() != parts[i].data_ptr()
        }
        """What others make, by its register; it is copied."""
        self.places = [parts[i] for i in self.given]
        found = list(entries_of(self.got, xs))
        for item in piece.outputs:
            registers.bring(registers[item], found[args_of(item)[1]])

    def __call__(self, memory: list[Any]) -> None:
        write(self.places, [memory[register] for register in self.given.values()])
        self.got.copy_(self.sent)
        all_reduce_(self.got, self.kind, self.group)
