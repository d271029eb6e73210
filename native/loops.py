"""Element-wise programs as one foreign call: a JAX primitive whose loops are compiled for it.

`loops` takes tensors and numbers, and computes what its jaxpr says. Where a program is compiled for one CPU device and
there are the kernel and a C++ compiler, it is one foreign call of C++ that was generated from the jaxpr (`loop_text`),
which reads and writes each tensor once and updates operands in place; elsewhere XLA computes the jaxpr. Derivatives and
``vmap`` are XLA's.
"""

import ctypes
import functools
import hashlib
import os
import pathlib
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from chainrule.native import _kernel, available
from chainrule.native.loop_text import loops_of
from chainrule.native.primitives import on_one_device

# As the kernel itself is built, but for the instruction set, which is this machine's.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-trapping-math", "-shared", "-fPIC"),
)

loops = core.Primitive("chainrule_loops")
"""Operands as the parameter `jaxpr`, a closed one without constants, takes them; `aliases`: pairs of an operand and the
result that takes its memory. Results as the jaxpr's, each of another variable."""
loops.multiple_results = True


def _form(*operands: Any, jaxpr: core.ClosedJaxpr, aliases: Any) -> list[jax.Array]:
    return core.jaxpr_as_fun(jaxpr)(*operands)


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler: that of CXX, or the first that is there; None, with a warning, without one."""
    asked = os.environ.get("CXX")
    for command in [shlex.split(asked)] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return tuple(command)
    warnings.warn(
        "chainrule.fused: there is no C++ compiler, so XLA computes the step; install one, or name it in CXX",
        RuntimeWarning,
        stacklevel=2,
    )
    return None


@functools.cache
def _loaded(command: tuple[str, ...], source: str, kinds: int) -> str:
    """Compiles the source and tells the kernel its loops; the key under which they are known there."""
    assert _kernel is not None
    key = hashlib.sha256("\n".join([*command, *_FLAGS, source]).encode()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        text, library = pathlib.Path(folder, "loops.cc"), pathlib.Path(folder, "loops.so")
        text.write_text(source)
        call = [*command, *_FLAGS, str(text), "-o", str(library)]
        made = subprocess.run(call, capture_output=True, text=True, check=False)
        if made.returncode:
            raise RuntimeError(f"chainrule.fused: {shlex.join(call)} failed:\n{made.stderr}")
        found = ctypes.CDLL(str(library))
    pointers = [ctypes.cast(getattr(found, f"loop_{i}"), ctypes.c_void_p) for i in range(kinds)]
    _kernel.add_loops(key, [p.value or 0 for p in pointers])
    return key


def _call(
    *operands: jax.Array, jaxpr: core.ClosedJaxpr, aliases: Sequence[tuple[int, int]]
) -> list[jax.Array]:
    command = compiler()
    assert command is not None
    found = loops_of(jaxpr.jaxpr)
    rows: list[int] = []
    for call in found.calls:
        buffers = (*call.operands, *call.results)
        rows += [call.kind, len(buffers), *buffers]
    return list(
        jax.ffi.ffi_call(
            "chainrule_loops",
            [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in jaxpr.out_avals],
            input_output_aliases=dict(aliases),
        )(
            *operands,
            key=_loaded(command, found.source, found.kinds),
            rows=np.asarray(rows, np.int32),
        )
    )


def _lowered_on_cpu(ctx: mlir.LoweringRuleContext, *operands: Any, **params: Any) -> Any:
    exported = ctx.module_context.lowering_parameters.for_export
    fits = on_one_device(ctx) and not exported and available() and compiler() is not None
    return mlir.lower_fun(_call if fits else _form)(ctx, *operands, **params)


def _abstract(*avals: Any, jaxpr: core.ClosedJaxpr, aliases: Any) -> Any:
    if all(a.sharding.mesh.empty for a in avals):
        return jaxpr.out_avals
    # On a mesh a result's type tells what it varies over, and the form knows.
    return jax.make_jaxpr(functools.partial(_form, jaxpr=jaxpr, aliases=aliases))(*avals).out_avals


def _batched(operands: Sequence[Any], axes: Sequence[int | None], **params: Any) -> Any:
    results = jax.vmap(functools.partial(_form, **params), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    full = tuple(ad.instantiate_zeros(t) for t in tangents)
    return jax.jvp(functools.partial(_form, **params), tuple(primals), full)


loops.def_impl(_form)
loops.def_abstract_eval(_abstract)
ad.primitive_jvps[loops] = _jvp
batching.primitive_batchers[loops] = _batched
mlir.register_lowering(loops, mlir.lower_fun(_form))
mlir.register_lowering(loops, _lowered_on_cpu, platform="cpu")
