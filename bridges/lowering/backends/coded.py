"""Pieces in codes as calls: tile by tile in one loop around a function, or whole tensors before and after.

The function is compiled, or a program of elements (`elements.py`). A tile is decoded into memory that stays in the
cache, computed by the function, and encoded from there: the tensors that the codes stand for are never in memory as a
whole.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.backends.launches import Function
from chainrule.bridges.lowering.executor import Call, Registers
from chainrule.bridges.lowering.nodes import args_of, first_arg, value_of
from chainrule.bridges.lowering.ops.codes import decode_part, encode_part, kernel_format
from chainrule.bridges.lowering.passes.coded import Coded, results_of
from chainrule.native import _kernel
from chainrule.native.coding import Format, block_count, packed_size

_Place = tuple[int, int, int]
"""Kind, index, and bytes of an element, as `_kernel.CodedLaunches` takes them."""
_NUMBER, _TENSOR, _SCRATCH, _LENGTH = range(4)

_A_THREADS_WORK = 1 << 15
"""So many elements are worth a thread."""
_MOST_IN_A_TILE = 1 << 15
"""Elements of two blocks; of longer ones the whole tensor is decoded first."""


def held(node: fx.Node) -> Format:
    """The format of a node that decodes or encodes."""
    return args_of(node)[-1]


def fits_tiles(coded: Coded) -> bool:
    """Whether tiles of whole blocks can be decoded, computed and encoded one after the other."""
    blocks = sorted({held(node).block for node in (*coded.decoded, *coded.encoded)})
    divide = all(b % a == 0 for a, b in itertools.pairwise(blocks))
    return coded.by_parts and divide and 2 * blocks[-1] <= _MOST_IN_A_TILE


class Codes:
    """The registers of codes and scales that a piece reads and writes; what replaces nothing is new each step."""

    def __init__(self, coded: Coded, registers: Registers):
        self.read = [[registers[x] for x in args_of(node)[:2]] for node in coded.decoded]
        self.keys = [None if k is None else registers[k] for _, k, _ in map(args_of, coded.encoded)]
        self.written: list[list[int]] = []
        self._new: list[tuple[int, int, torch.dtype]] = []
        for node in coded.encoded:
            size, own = value_of(first_arg(node)).numel(), results_of(node)
            lengths = packed_size(size, held(node).bits), block_count(size, held(node).block)
            found = []
            for i, (length, dtype) in enumerate(
                zip(lengths, (torch.uint8, torch.float32), strict=True)
            ):
                if own.get(i) in coded.updates:
                    registers.alias(own[i], coded.updates[own[i]])
                found.append(registers[own[i]] if i in own else registers.free())
                if own.get(i) not in coded.updates:
                    self._new.append((found[-1], length, dtype))
            self.written.append(found)

    def allocate(self, memory: list[Any]) -> None:
        for register, length, dtype in self._new:
            memory[register] = torch.empty((length,), dtype=dtype, device="cpu")


class Decode:
    """The tensors of a piece, whole, from their codes."""

    def __init__(self, coded: Coded, codes: Codes, registers: Registers):
        self._given = [
            (registers[node], tuple(value_of(node).shape), own, held(node))
            for node, own in zip(coded.decoded, codes.read, strict=True)
        ]

    def __call__(self, memory: list[Any]) -> None:
        for register, shape, (codes, scales), form in self._given:
            memory[register] = x = torch.empty(shape, dtype=torch.float32, device="cpu")
            decode_part(x, memory[codes], memory[scales], form, x.numel(), 0)


class Encode:
    """The codes of tensors of a piece that are whole; what was decoded is gone after it."""

    def __init__(self, coded: Coded, codes: Codes, registers: Registers):
        self._codes = codes
        self._given = [
            (registers[first_arg(node)], own, key, held(node))
            for node, own, key in zip(coded.encoded, codes.written, codes.keys, strict=True)
        ]
        dead = (n for n in coded.values if n not in coded.outputs and n.op != "placeholder")
        self._dead = {registers[n] for n in dead}

    def __call__(self, memory: list[Any]) -> None:
        self._codes.allocate(memory)
        for register, (codes, scales), key, form in self._given:
            x: Tensor = memory[register]
            words = None if key is None else memory[key].contiguous()
            encode_part(x, memory[codes], memory[scales], words, form, x.numel(), 0)
        for register in self._dead:
            memory[register] = None


class Tiles:
    """Pieces of a kind in one loop over the function that they have in common, which `ready` takes."""

    def __init__(self, function: Function, pieces: Sequence[Coded], registers: Registers):
        self._numbers: list[int] = []
        self._codes: list[Codes] = []
        self._new: list[tuple[int, Any]] = []
        self._updated: set[int] = set()
        self._tensors: dict[int, int] = {}
        """The position of each register that the loop reads or writes."""
        self._rows = [self._row(function, coded, registers) for coded in pieces]
        self._work = sum(coded.size for coded in pieces)

    def ready(self, body: Any) -> None:
        """Takes the address of the function, or the program."""
        self._launches = _kernel.CodedLaunches(body, self._rows, self._numbers, len(self._tensors))

    def _tensor(self, register: int) -> int:
        return self._tensors.setdefault(register, len(self._tensors))

    def _row(self, function: Function, coded: Coded, registers: Registers) -> Any:
        """A call of the function: its length, its arguments, and what is decoded and encoded beside it."""
        piece, codes = coded.inner, Codes(coded, registers)
        self._codes.append(codes)
        scratch = {node: (_SCRATCH, i, 0) for i, node in enumerate(coded.decoded)}
        rooms = len(scratch)
        places: dict[fx.Node, _Place] = {**scratch}
        places |= {n: self._place(n, registers) for n in piece.inputs if n not in scratch}
        for i, old in piece.updates:
            new = piece.outputs[i]
            places[new] = places[old]
            if old not in scratch:
                registers.alias(new, old)
                self._updated.add(registers[old])
        in_place = {i for i, _ in piece.updates}
        made = [n for i, n in enumerate(piece.outputs) if i not in in_place]
        buffers: dict[int, _Place] = {}
        for k, node in zip(function.results, made, strict=True):
            if node in coded.outputs:
                self._new.append((registers[node], value_of(node)))
                places[node] = self._place(node, registers)
                buffers[k] = places[node]
        for k in range(len(function.buffers)):
            if k not in buffers:
                buffers[k], rooms = (_SCRATCH, rooms, 0), rooms + 1
        places |= {n: buffers[k] for k, n in zip(function.results, made, strict=True)}

        def place(kind: str, which: int) -> _Place:
            if kind == "input":
                return places[piece.inputs[which]]
            if kind == "buffer":
                return buffers[which]
            if kind == "size":
                return (_LENGTH, 0, 0)
            self._numbers.append(which)
            return (_NUMBER, len(self._numbers) - 1, 0)

        arguments = [place(*argument) for argument in function.arguments]
        decoded = [
            (kernel_format(held(node)), places[node], *map(self._tensor, own), -1)
            for node, own in zip(coded.decoded, codes.read, strict=True)
        ]
        encoded = [
            (
                kernel_format(held(node)),
                places[first_arg(node)],
                *map(self._tensor, own),
                -1 if key is None else self._tensor(key),
            )
            for node, own, key in zip(coded.encoded, codes.written, codes.keys, strict=True)
        ]
        return coded.size, arguments, decoded, encoded

    def _place(self, node: fx.Node, registers: Registers) -> _Place:
        value = value_of(node)
        return _TENSOR, self._tensor(registers[node]), value.itemsize if value.ndim else 0

    def __call__(self, memory: list[Any]) -> None:
        for codes in self._codes:
            codes.allocate(memory)
        for register, like in self._new:
            memory[register] = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        given = [memory[register] for register in self._tensors]
        ready = [x.contiguous() for x in given]
        threads = max(1, min(torch.get_num_threads(), self._work // _A_THREADS_WORK))
        self._launches.run([x.data_ptr() for x in ready], threads)
        for register, old, new in zip(self._tensors, given, ready, strict=True):
            if new is not old and register in self._updated:
                old.copy_(new)


def whole_calls(coded: Coded, inner: Sequence[Call], registers: Registers) -> list[Call]:
    """Calls of what a piece computes, with its tensors decoded before and encoded after."""
    codes = Codes(coded, registers)
    return [Decode(coded, codes, registers), *inner, Encode(coded, codes, registers)]
