"""How an exported optimizer runs compiled functions on a CPU: for parameter after parameter, in one loop of C++."""

# pyright: reportPrivateUsage=false, reportUnusedClass=false, reportUnusedFunction=false
import ctypes
import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from chainrule.bridges.export.runtime_lists import _Entries, _Leaf

# ------------------------------------------------------------------------------------------------


_CASES = "".join(
    f"    case {n}: ((void (*)({', '.join(['W'] * n)}))f)({', '.join(f'w[r[{k}]]' for k in range(n))}); break;\n"
    for n in range(1, 65)
)
_LOOP = f"""
#include <cstdint>
#include <cstring>
using W = std::uintptr_t;
extern "C" void copy(W to, W from, W bytes) {{ std::memcpy((void*)to, (const void*)from, bytes); }}
static void call(W f, const W* w, const std::uint32_t* r, int arity) {{
  switch (arity) {{
{_CASES}  }}
}}
extern "C" void run(W f, const W* w, const std::uint32_t* rows, int count, int arity, int threads) {{
  if (threads < 2) {{
    for (int i = 0; i < count; ++i) call(f, w, rows + i * arity, arity);
    return;
  }}
#pragma omp parallel for num_threads(threads)
  for (int i = 0; i < count; ++i) call(f, w, rows + i * arity, arity);
}}
"""
"""Calls of one function with words out of `w`: a pointer and an integer of 64 bits are passed alike.

A parallel loop of one thread would be no way out: what a function starts in it are threads anew each time.
"""
_SMALL = 1024
"""Up to so many elements a copy is one of the loop's, and what functions hand on has one place for all steps."""
_LAYOUT = operator.attrgetter("shape", "dtype", "layout", "is_cpu")


class _Registers:
    """What calls take: tensors of the step, memory for what functions hand on, and numbers; and the calls."""

    def __init__(self, fakes: Sequence[Tensor]):
        self.number = {id(x): i for i, x in enumerate(fakes)}
        self.memory: list[Any] = [None] * len(fakes)
        self.fresh: dict[int, tuple[torch.Size, torch.dtype]] = {}
        """Large ones, which are allocated anew at each step."""
        self.launches: list[Callable[[], Any]] = []
        self.words: Any = None
        self.filled_by: Any = None
        """Whose parameters and state they hold."""

    def keep(self, value: Any) -> int:
        """A register for a number, or for memory that stays."""
        self.memory.append(value)
        return len(self.memory) - 1

    def made(self, result: Any) -> int:
        """A register for what a function makes."""
        if isinstance(result, _Entries):
            vector = torch.empty(result.vector.shape, dtype=result.vector.dtype)
            for entry, own in zip(result, vector.unbind(), strict=True):
                self.number[id(entry)] = self.keep(own)
            return self.keep(vector)
        is_large = result.numel() > _SMALL
        register = self.keep(None if is_large else torch.empty(result.shape, dtype=result.dtype))
        if is_large:
            self.fresh[register] = result.shape, result.dtype
        self.number[id(result)] = register
        return register

    def launch(self, function: Any, rows: Sequence[Sequence[int]], threads: int = 1) -> None:
        """Calls of a C++ function with the words of some registers are next."""
        flat = (ctypes.c_uint32 * (len(rows) * len(rows[0])))(*itertools.chain(*rows))
        run, count, arity = _loop().run, len(rows), len(rows[0])
        self.launches.append(lambda: run(function, self.words, flat, count, arity, threads))

    def finish(self) -> None:
        words = (x.data_ptr() if isinstance(x, Tensor) else x or 0 for x in self.memory)
        self.words = (ctypes.c_size_t * len(self.memory))(*words)

    def fill(self, first: int, tensors: Sequence[Tensor]) -> None:
        """Tensors of the step from one on."""
        self.memory[first : first + len(tensors)] = tensors
        self.words[first : first + len(tensors)] = list(map(Tensor.data_ptr, tensors))

    def release(self, first: int, last: int) -> None:
        self.memory[first:last] = [None] * (last - first)

    def run(self) -> None:
        for register, (shape, dtype) in self.fresh.items():
            self.fill(register, [torch.empty(shape, dtype=dtype)])
        for launch in self.launches:
            launch()
        for register in self.fresh:
            self.release(register, register + 1)

    def __call__(self, tensors: Sequence[Tensor]) -> None:
        self.filled_by = None
        self.fill(0, tensors)
        self.run()
        self.release(0, len(tensors))


@functools.cache
def _loop() -> Any:
    """The loop, compiled."""
    from torch._inductor.codecache import CppCodeCache

    library = CppCodeCache.load(_LOOP)
    library.run.argtypes = [
        *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ]
    library.run.restype = None
    return library


class _Again:
    """A compiled step for once more: with the parameters and the state of the last, but for their values."""

    def __init__(
        self,
        group: Mapping[str, Any],
        leaves: Sequence[_Leaf],
        tensors: Sequence[Tensor],
        program: _Registers,
    ):
        """`tensors`: parameters, gradients and state, all contiguous and on a CPU."""
        self.count, self.program = len(leaves), program
        self.group = self.settings(group)
        self.params = list(tensors[: self.count])
        self.layouts = list(map(_LAYOUT, self.params))
        self.states = [leaf.state for leaf in leaves]
        self.fixed = list(tensors[2 * self.count :])
        self.inner = self.fixed[: sum(map(len, self.states))]
        self.places = list(map(Tensor.data_ptr, self.fixed))

    @staticmethod
    def settings(group: Mapping[str, Any]) -> Any:
        """What decides on the order of parameters."""
        ids = list(map(id, group["params"]))
        return ids, group.get("tree"), list(group.get("param_names") or ())

    def gradients(self, group: Mapping[str, Any], state: Mapping[Any, Any]) -> list[Any] | None:
        """Those of the step; None if anything is not as it was."""
        grads: list[Any] = [p.grad for p in self.params]
        is_same = (
            all(g is not None for g in grads)
            and list(map(_LAYOUT, grads)) == self.layouts
            and list(map(_LAYOUT, self.params)) == self.layouts
            and all(map(Tensor.is_contiguous, grads))
            and all(map(Tensor.is_contiguous, self.params))
            and all(map(operator.is_, map(state.get, self.params), self.states))
            and sum(map(len, self.states)) == len(self.inner)
            and all(map(operator.is_, itertools.chain(*map(dict.values, self.states)), self.inner))
            and list(map(Tensor.data_ptr, self.fixed)) == self.places
            and self.settings(group) == self.group
        )
        return grads if is_same else None

    def forget(self) -> None:
        """Leaves parameters and state to others."""
        if self.program.filled_by is self:
            self.program.release(0, 2 * self.count + len(self.fixed))
            self.program.filled_by = None

    def run(self, grads: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        program, count = self.program, self.count
        if program.filled_by is not self:
            program.fill(2 * count, self.fixed)
            program.filled_by = self
        last = 2 * count + len(self.fixed)
        program.fill(0, [*self.params, *grads])
        program.fill(last, others)
        program.run()
        program.release(count, 2 * count)
        program.release(last, last + len(others))


def _are_plain(leaves: Sequence[_Leaf], tensors: Sequence[Tensor]) -> bool:
    """Whether a step takes parameters and gradients as they are."""
    are_own = all(leaf.param.grad is leaf.grad for leaf in leaves)
    return are_own and all(map(Tensor.is_contiguous, tensors))


def _again(
    known: _Again | None, group: Mapping[str, Any], state: Mapping[Any, Any]
) -> Callable[[list[Tensor]], None] | None:
    """The last compiled step of a group, which takes rates and loss; None if anything is not as it was."""
    grads = known and known.gradients(group, state)
    return functools.partial(known.run, grads) if known and grads else None
