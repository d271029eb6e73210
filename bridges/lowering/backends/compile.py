"""One piece through Inductor."""

import functools
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo.convert_frame import compile_lock
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import config, cpu_vec_isa
from torch._inductor.codegen.cpp import CppScheduling
from torch._inductor.compile_fx import compile_fx_inner
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from chainrule.bridges.lowering.backends.body import body_of
from chainrule.bridges.lowering.backends.early_copies import (
    _copy_early,  # pyright: ignore[reportPrivateUsage]
)
from chainrule.bridges.lowering.backends.launches import Function, function_of
from chainrule.bridges.lowering.nodes import inputs_of, results_of, return_, value_of
from chainrule.bridges.lowering.passes.partition import Piece
from chainrule.native import _kernel

Compiled = Callable[[list[Any]], Sequence[Tensor]]
"""Takes the inputs of a piece, and returns its outputs but those that it writes into inputs."""


class Lengths(NamedTuple):
    """The lengths that flat pieces on a device are compiled for; no other's, so that nothing is specialised to them."""

    small: tuple[int, ...]
    large: tuple[int, ...]
    large_from: int
    """From so many elements on, a piece is compiled for all threads or processors."""


ON_CPU = Lengths((97, 101), ((1 << 20) + 7, (1 << 20) + 11), 1 << 16)
ON_GPU = Lengths((4099,), ((1 << 22) + 15,), 1 << 13)
"""By the length Inductor decides how a sum is made: up to 8192 elements by one block, which takes at most the
length (and 2048) at a time, else by a block for 8192 elements of it, whatever the number of elements is then."""


def lengths_for(piece: Piece) -> Lengths:
    """The lengths for the device of a piece."""
    devices = {x.device.type for x in map(value_of, piece.inputs) if isinstance(x, Tensor)}
    return ON_CPU if devices <= {"cpu"} else ON_GPU


COMPILED: dict[Any, tuple[Compiled, Function | None]] = {}
"""What this process compiled: another bridge finds it here, and so does the next trace of this one. It is never
dropped, because Inductor keeps its modules as long."""


def compile_piece(piece: Piece, large: bool) -> tuple[Compiled, Function | None]:
    """The piece through Inductor, with updates as copies into its inputs, which Inductor does in place.

    Args:
      piece: one of its kind.
      large: whether to compile it for the large of `lengths_for`.

    Returns:
      The compiled piece, and the C++ function behind it if it is no more than that.
    """
    values = map(value_of, piece.inputs)
    devices = tuple(x.device if isinstance(x, Tensor) else None for x in values)
    updates = tuple((i, piece.inputs.index(old)) for i, old in piece.updates)
    # Code for large tensors is for a number of threads; options of torch are the user's, who may change them.
    settings = (torch.get_num_threads(), config.get_hash())
    key = (piece.kind, updates, devices, large, settings)
    if key not in COMPILED:
        COMPILED[key] = _compile(piece, large)
    return COMPILED[key]


def _compile(piece: Piece, large: bool) -> tuple[Compiled, Function | None]:
    body = body_of(piece)

    def example(node: fx.Node, length: int) -> Tensor:
        fake = value_of(node)
        if not (piece.flat and fake.ndim):
            shape = tuple(fake.shape)
        else:
            shape = (fake.numel() if fake.numel() < 2 else length,)
        if (
            not shape
        ):  # an entry of a vector lies anywhere: code that wants it aligned would copy it first
            return torch.empty((2,), dtype=fake.dtype, device=fake.device)[1]
        return torch.empty(shape, dtype=fake.dtype, device=fake.device)

    lengths = lengths_for(piece).large if large else lengths_for(piece).small
    examples = {length: [example(n, length) for n in piece.inputs] for length in lengths}
    if not any(x.shape == (lengths[0],) for x in examples[lengths[0]]):
        examples = {0: examples[lengths[0]]}
    # Tracing and Inductor keep state of the process: torch's own lock, so that its threads wait too.
    with compile_lock, torch.no_grad():
        compiled = _through_inductor(piece, body, next(iter(examples.values())), large)
    return compiled, None if _kernel is None else function_of(compiled, examples)


def _through_inductor(
    piece: Piece, body: Callable[..., Any], inputs: list[Tensor], large: bool
) -> Compiled:
    mode = "symbolic" if piece.flat else "fake"
    module = make_fx(body, select_decomp_table(), tracing_mode=mode)(*inputs)
    _write(module.graph, piece)
    module.recompile()
    values = [value_of(p) for p in inputs_of(module.graph)]
    # The bridge checks what it hands over; asserting it again costs a tenth of a small step. But since torch 2.14 it is
    # with the assertions that Inductor reads the length of a flat piece from its inputs.
    asserts = piece.flat and torch.__version__ >= "2.14"
    options = {"size_asserts": asserts, "cpp.vec_isa_ok": _instructions_are_known()}
    on_cpu = lengths_for(piece) is ON_CPU
    if on_cpu:
        # What two loops read of several tensors is computed in both: memory for it costs more.
        options |= {"realize_reads_threshold": 16}
    # In a context of tracing Inductor looks for what it made of the graph in its cache on disk; not tried on a GPU.
    looks_up = tracing(TracingContext(detect_fake_mode(values))) if on_cpu else nullcontext()
    with config.patch(options), _loops_whole(), looks_up:
        module = _keyed(module, (lengths_for(piece), large)) if on_cpu else module
        compiled: Any = compile_fx_inner(module, values)
        return compiled


def _loops_whole() -> Any:
    """Inductor without an optimisation of it that is wrong.

    Where an entry reads another at its index divided by a number (the scale of its block), Inductor makes two loops of
    one, and leaves out the entries behind the last whole block (torch 2.13).
    """
    if not hasattr(CppScheduling, "try_loop_split"):
        return nullcontext()
    return mock.patch.object(CppScheduling, "try_loop_split", lambda self, nodes: nodes)


def _keyed(module: fx.GraphModule, lengths: Any) -> fx.GraphModule:
    """A traced piece that Inductor may look up in its cache on disk.

    The cache's key has no lengths of tensors of any length, and no instructions of the processor: what is compiled for
    small tensors would be found for large ones, and code for long vectors by a processor that has none. Nor has it what
    `_loops_whole` changes. Whatever else tracing left in the module cannot be in a key.
    """
    bare = fx.GraphModule(module, module.graph)
    bare.meta["compiled for"] = (
        f"{lengths}, {cpu_vec_isa.pick_vec_isa()}, {torch.get_num_threads()}, whole loops"
    )
    return bare


def _write(graph: fx.Graph, piece: Piece) -> None:
    """Makes a traced piece copy updates into its inputs, and return its other results."""
    inputs, results = inputs_of(graph), results_of(graph)
    updates = dict(piece.updates)
    for i, old in updates.items():
        target, new = inputs[piece.inputs.index(old)], results[i]
        with graph.inserting_before(graph.output_node()):
            copy = graph.call_function(torch.ops.aten.copy_.default, (target, new))
        copy.meta["val"] = value_of(target)
    return_(graph, [r for i, r in enumerate(results) if i not in updates])
    if lengths_for(piece) is ON_CPU:
        _copy_early(graph)


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
