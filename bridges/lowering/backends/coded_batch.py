"""Pieces in codes, eagerly: alike ones as a program of elements, tile by tile, or as a `Batch`.

In a batch a large tensor goes part by part from its codes to its codes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.backends import parts
from chainrule.bridges.lowering.backends.batch import Batch
from chainrule.bridges.lowering.backends.coded import (
    Codes,
    Decode,
    Encode,
    Tiles,
    fits_tiles,
    held,
)
from chainrule.bridges.lowering.backends.elements import Plan
from chainrule.bridges.lowering.backends.stage_scalars import StageScalars
from chainrule.bridges.lowering.executor import Registers
from chainrule.bridges.lowering.nodes import first_arg, value_of
from chainrule.bridges.lowering.ops.codes import decode_part, encode_part
from chainrule.bridges.lowering.passes.coded import Coded
from chainrule.native import _kernel


def coded_batches(
    pieces: Sequence[Coded], registers: Registers, scalars: StageScalars | None
) -> "list[Batch | ElementTiles]":
    """A batch for all pieces that compute alike."""
    kinds: dict[Any, list[Coded]] = {}
    for piece in pieces:
        in_tiles = scalars is not None and bool(piece.inner.nodes) and fits_tiles(piece)
        kinds.setdefault((piece.inner.kind, in_tiles), []).append(piece)
    batches = []
    for (_, in_tiles), alike in kinds.items():
        plan = Plan(alike[0].inner) if in_tiles else None
        if plan is not None and plan.fits and scalars is not None:
            batches.append(ElementTiles(plan, alike, registers, scalars))
        else:
            batches.append(_CodedBatch(alike, registers))
    return batches


class ElementTiles(Tiles):
    """Pieces of a kind whose arithmetic is a program of elements."""

    def __init__(
        self, plan: Plan, pieces: Sequence[Coded], registers: Registers, scalars: StageScalars
    ):
        super().__init__(plan.function, pieces, registers)
        self._steps, self._columns = plan.steps, range(len(plan.arrays) + len(plan.fresh))
        self._words = [(piece.size, plan.row(piece.inner, scalars)[1]) for piece in pieces]
        self.written = [pair for piece in pieces for pair in piece.written]

    def ready(self, body: np.ndarray) -> None:
        """Makes the program, when the words of the stage are there."""
        rows = [(size, self._columns, words) for size, words in self._words]
        columns = len(self._columns)
        super().ready(_kernel.ElementProgram(self._steps, rows, body, columns))


class _CodedBatch(Batch):
    """What alike pieces compute, between tensors that are decoded before and encoded after it."""

    def __init__(self, pieces: Sequence[Coded], registers: Registers):
        super().__init__([piece.inner for piece in pieces], registers, True)
        self._pieces = pieces
        self._codes = [Codes(piece, registers) for piece in pieces]
        given = list(zip(pieces, self._codes, strict=True))
        self._decode = [Decode(piece, codes, registers) for piece, codes in given]
        self._encode = [Encode(piece, codes, registers) for piece, codes in given]
        self.written += [pair for piece in pieces for pair in piece.updates.items()]

    def __call__(self, memory: list[Any]) -> None:
        for group, in_parts in self.groups:
            if in_parts and self._in_parts(group[0], memory):
                continue
            for i in group:
                self._decode[i](memory)
            self.run_group(group, in_parts, memory)
            for i in group:
                self._encode[i](memory)

    def _in_parts(self, i: int, memory: list[Any]) -> bool:
        """Runs a piece part by part, where its tensors lie in the order of its codes and parts are whole blocks."""
        piece = self._pieces[i]
        blocks = [held(node).block for node in (*piece.decoded, *piece.encoded)]
        given = {
            node: memory[column[i]]
            for node, column in zip(piece.inner.inputs, self.inputs, strict=True)
            if node not in piece.decoded
        }
        in_order = all(x.is_contiguous() for x in given.values())
        if not in_order or not piece.by_parts or any(parts.PART % (2 * b) for b in blocks):
            return False
        cut = parts.split([*given.values()])
        if cut is None:
            return False
        self._codes[i].allocate(memory)
        made = self._made(i, memory)
        room = [torch.empty(min(parts.PART, piece.size), device="cpu") for _ in piece.decoded]
        for number, part in enumerate(cut):
            begin = number * parts.PART
            own = [x[: piece.size - begin] for x in room]
            values = dict(zip((*given, *piece.decoded), (*part, *own), strict=True))
            self._part(i, begin, values, made, memory)
        return True

    def _made(self, i: int, memory: list[Any]) -> dict[fx.Node, Tensor]:
        """New tensors for the outputs of a piece that others read and that are not computed in an input."""
        made = {}
        for node, (_, column), old in zip(
            self._pieces[i].inner.outputs, self.outputs, self.olds[i], strict=True
        ):
            if old is not None:
                memory[column[i]] = memory[old]
            elif node in self._pieces[i].outputs:
                like = value_of(node)
                made[node] = memory[column[i]] = torch.empty(
                    like.shape, dtype=like.dtype, device="cpu"
                )
        return made

    def _part(
        self,
        i: int,
        begin: int,
        values: dict[fx.Node, Tensor],
        made: dict[fx.Node, Tensor],
        memory: list[Any],
    ) -> None:
        """Decodes, computes and encodes what stands at `begin`; `values` are its inputs there."""
        piece, codes = self._pieces[i], self._codes[i]
        for node, own in zip(piece.decoded, codes.read, strict=True):
            packed, scales = (memory[r] for r in own)
            decode_part(values[node], packed, scales, held(node), piece.size, begin)
        found = self.run([[values[node]] for node in piece.inner.inputs], [i])
        values |= {n: x for n, (x,) in zip(piece.inner.outputs, found, strict=True)}
        for node, own, key in zip(piece.encoded, codes.written, codes.keys, strict=True):
            words = None if key is None else memory[key].contiguous()
            x, (packed, scales) = values[first_arg(node)], (memory[r] for r in own)
            encode_part(x, packed, scales, words, held(node), piece.size, begin)
        for node, whole in made.items():
            whole.view(-1)[begin : begin + values[node].numel()].copy_(values[node])
