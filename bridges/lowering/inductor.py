"""Compiled steps: each kind of piece goes through Inductor once, whatever the number of leaves.

A flat piece is compiled for tensors of any length and called for each leaf with its tensors given
flat; any other for its shapes. The compiled code is called directly, without Dynamo's guards: the
bridge has checked shapes, dtypes and devices. Parameters and state are renewed in place. Inductor
keeps what it compiled on disk, so another process starts warm.
"""

import copy
import dataclasses
import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._dynamo.convert_frame import compile_lock
from torch._inductor import config, cpu_vec_isa
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.entries import split_vectors
from chainrule.bridges.lowering.pieces import (
    Piece,
    Program,
    body_of,
    by_kind,
    cut,
    fake_values,
    is_apart,
)
from chainrule.bridges.lowering.program import Lowered
from chainrule.bridges.lowering.recompute import recompute
from chainrule.bridges.lowering.release import dissolve_with

Step = Callable[[Sequence[Tensor]], None]

_LARGE = 1 << 16
"""From this many elements on, a piece is compiled for all threads."""


def compiled_step(lowered: Lowered, targets: Sequence[int], device: torch.device) -> Step:
    """The program as a compiled function of its flat inputs that renews them in place.

    Args:
      lowered: the program.
      targets: for every output, the position of the input that it renews.
      device: of the inputs.

    Returns:
      A function of the flat inputs.
    """
    lowered = dataclasses.replace(lowered, graph=copy.deepcopy(lowered.graph))
    graph, values = lowered.graph.graph, fake_values(lowered, device)
    if device.type == "cpu":  # elsewhere a vector is one launch, and its entries are views
        split_vectors(lowered.graph, values)
    recompute(graph, values, targets)
    program = cut(graph, targets, values)
    slots: dict[fx.Node, int] = {n: i for i, n in enumerate(program.placeholders)}
    constants = []
    for node in graph.find_nodes(op="get_attr"):
        slots[node] = len(slots)
        constants.append(getattr(lowered.graph, str(node.target)))
    calls = [
        call
        for stage in program.stages
        for kind in by_kind(stage)
        for call in _calls(kind, program, slots)
    ]
    renewed = {
        (p.outputs[i], old)
        for stage in program.stages
        for p in stage
        if _compiles(p, program)
        for i, old in p.renews
    }
    pairs = zip(program.results, targets, strict=True)
    left = [(r, program.placeholders[t]) for r, t in pairs]
    copies = [(slots[r], slots[old]) for r, old in left if r is not old and (r, old) not in renewed]
    borrowed = [r for r, _ in copies if r < len(program.placeholders)]
    empty = [None] * (len(slots) - len(program.placeholders) - len(constants))
    write = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
    compiled = [call for call in calls if isinstance(call, _CompiledCall)]
    moves, turns = _watched(compiled, program)
    memory: list[Any] = []

    @torch.no_grad()
    def step(inputs: Sequence[Tensor]) -> None:
        env: list[Any] = [*inputs, *constants, *empty]
        # The same tensors may have other memory, or the same in another order: `p.data = ...`
        found = [*map(Tensor.data_ptr, map(env.__getitem__, moves))]
        found += map(Tensor.is_contiguous, map(env.__getitem__, turns))
        if found != memory:
            memory[:] = found
            for call in compiled:
                call.forget()
        kept = {r: env[r].clone() for r in borrowed}
        for call in calls:
            call(env)
        if copies:
            write([env[old] for _, old in copies], [kept.get(r, env[r]) for r, _ in copies])

    dissolve_with(step, lowered.graph)
    return step


def _watched(calls: Sequence["_CompiledCall"], program: Program) -> tuple[list[int], list[int]]:
    """Slots of the tensors that calls remember: those of which they keep a view, which is good while the address is the
    same; and those that could lie in their memory in another order (strided, or transposed), in the same shape."""
    slots = sorted({call.inputs[j] for call in calls for j in call.seen})
    shapes = {slot: program.values[program.placeholders[slot]].shape for slot in slots}

    def may_turn(shape: torch.Size) -> bool:
        dims = [d for d in shape if d != 1]
        return len(shape) == 1 or len(set(dims)) < len(dims)

    return [i for i in slots if len(shapes[i]) > 1], [i for i in slots if may_turn(shapes[i])]


def _compiles(piece: Piece, program: Program) -> bool:
    return not any(is_apart(n, program.values) for n in piece.nodes)


def _calls(
    pieces: Sequence[Piece], program: Program, slots: dict[fx.Node, int]
) -> list[Callable[[list[Any]], None]]:
    """A call for each piece of one kind; they share what is compiled."""
    programs: dict[bool, Callable[[list[Any]], Sequence[Tensor]]] = {}
    calls = []
    for piece in pieces:
        compiles = _compiles(piece, program)
        renews = piece.renews if compiles else ()
        # What renews an input is found where the input was.
        slots |= {piece.outputs[i]: slots[old] for i, old in renews}
        for node in piece.outputs:
            slots.setdefault(node, len(slots))
        inputs = [slots[n] for n in piece.inputs]
        outputs = [n for n in piece.outputs if n not in {piece.outputs[i] for i, _ in renews}]
        tensors = (program.values[n] for n in piece.inputs)
        sizes = [t.numel() for t in tensors if isinstance(t, Tensor)]
        large = max(sizes, default=0) >= _LARGE
        if large not in programs:
            make = _compile if compiles else _plain
            programs[large] = make(piece, program, large)
        call = _Call(programs[large], inputs, [slots[n] for n in outputs])
        if compiles:
            call = _CompiledCall(call, piece, program.values, outputs)
        calls.append(call)
    return calls


class _Call(NamedTuple):
    """A call of a piece: what it runs, and the slots that it reads and writes."""

    program: Callable[[list[Any]], Sequence[Any]]
    inputs: list[int]
    outputs: list[int]

    def __call__(self, env: list[Any]) -> None:
        results = self.program([env[i] for i in self.inputs])
        for slot, result in zip(self.outputs, results, strict=True):
            env[slot] = result


class _CompiledCall:
    """A call of compiled code, which wants its tensors contiguous: others are copied there and back."""

    def __init__(
        self, call: _Call, piece: Piece, values: dict[fx.Node, Any], outputs: list[fx.Node]
    ):
        self.program, self.inputs, self.outputs = call
        self.shapes = [values[n].shape for n in outputs] if piece.flat else None
        arrays = [j for j, n in enumerate(piece.inputs) if values[n].ndim > 0]
        renewed = {piece.inputs.index(old) for _, old in piece.renews}
        self.others = [j for j in arrays if j not in renewed]
        # Parameters and state are the same tensors in most steps; to keep a gradient would keep its memory.
        self.renewed = [j for j in arrays if j in renewed]
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.forget()

    def forget(self) -> None:
        none = torch.empty(0, device="cpu")
        self.seen = dict.fromkeys(self.renewed, (none, none))

    def __call__(self, env: list[Any]) -> None:
        given = [env[i] for i in self.inputs]
        copies = []
        for j, (known, ready) in self.seen.items():
            x = given[j]
            if x is known:
                given[j] = ready
            elif x.is_contiguous():
                given[j] = self.ready(x)
                self.seen[j] = x, given[j]
            else:
                given[j] = self.ready(x.contiguous())
                copies.append((x, given[j]))
        for j in self.others:
            given[j] = self.ready(given[j].contiguous())
        results = self.program(given)
        for x, new in copies:
            x.copy_(new.view(x.shape))
        if self.shapes is None:
            for slot, result in zip(self.outputs, results, strict=True):
                env[slot] = result
            return
        for slot, result, shape in zip(self.outputs, results, self.shapes, strict=True):
            env[slot] = result.view(shape) if result.ndim else result

    def ready(self, x: Tensor) -> Tensor:
        return x if self.shapes is None or x.ndim == 1 else x.view(-1)


def _plain(piece: Piece, program: Program, large: bool) -> Callable[[list[Any]], Sequence[Tensor]]:
    del large
    if piece.nodes[0].target is ops.unbind:
        entries: list[Any] = [n.args[1] for n in piece.outputs]

        def entries_of(inputs: list[Any]) -> Sequence[Tensor]:
            parts = ops.unbind(inputs[0])
            return [parts[i] for i in entries]

        return entries_of
    body = body_of(piece, program.values)
    return lambda inputs: body(*inputs)


def _compile(
    piece: Piece, program: Program, large: bool
) -> Callable[[list[Any]], Sequence[Tensor]]:
    """The piece through Inductor, with the renewals as copies into its inputs, which Inductor does in place."""
    values = program.values
    body = body_of(piece, values)

    def example(node: fx.Node) -> Tensor:
        fake = values[node]
        if not (piece.flat and fake.ndim):
            shape = tuple(fake.shape)
        elif fake.numel() < 2:
            shape = (fake.numel(),)
        else:  # a length that is no other's, so that nothing is specialised to it
            shape = ((1 << 20) + 7 if large else 97,)
        if (
            not shape
        ):  # an entry of a vector lies anywhere: code that wants it aligned would copy it first
            return torch.empty((2,), dtype=fake.dtype, device=fake.device)[1]
        return torch.empty(shape, dtype=fake.dtype, device=fake.device)

    # Tracing and Inductor keep state of the process: torch's own lock, so that its threads wait too.
    with compile_lock, torch.no_grad():
        return _through_inductor(piece, body, [example(n) for n in piece.inputs])


def _through_inductor(
    piece: Piece, body: Callable[..., Any], inputs: list[Tensor]
) -> Callable[[list[Any]], Sequence[Tensor]]:
    mode = "symbolic" if piece.flat else "fake"
    module = make_fx(body, select_decomp_table(), tracing_mode=mode)(*inputs)
    graph = module.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    output = graph.output_node()
    results: Any = list(output.args[0])  # pyright: ignore
    renewed = {}
    with graph.inserting_before(output):
        for i, old in piece.renews:
            target = placeholders[piece.inputs.index(old)]
            node = graph.call_function(torch.ops.aten.copy_.default, (target, results[i]))
            node.meta["val"] = target.meta["val"]
            renewed[i] = node
        output.args = (tuple(r for i, r in enumerate(results) if i not in renewed),)
    module.recompile()
    # The bridge checks what it hands over; asserting it again costs a tenth of a small step. But since torch 2.14 it is
    # with the assertions that Inductor reads the length of a flat piece from its inputs.
    asserts = piece.flat and torch.__version__ >= "2.14"
    options = {"size_asserts": asserts, "cpp.vec_isa_ok": _instructions_are_known()}
    with config.patch(options):
        return compile_fx_inner(module, [p.meta["val"] for p in placeholders])  # pyright: ignore


@functools.cache
def _instructions_are_known() -> bool | None:
    """True where the C++ compiler knows the processor's vector instructions, else None: Inductor finds out.

    It would build and load a library for each set of instructions: six seconds, of which one again in every process.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return None
    supported = cpu_vec_isa.x86_isa_checker()
    sets = [s for s in cpu_vec_isa.supported_vec_isa_list if {*str(s).split()} <= {*supported}]
    flags = [flag for s in sets for flag in s.build_arch_flags().split()]
    command = [get_cpp_compiler(), *flags, "-E", "-x", "c++", os.devnull]
    found = subprocess.run(command, capture_output=True, check=False)
    return True if found.returncode == 0 else None
