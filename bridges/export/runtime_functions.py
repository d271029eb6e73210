"""How an exported optimizer compiles a step on a CPU: each of its functions once, whatever the number of parameters."""

# pyright: reportPrivateUsage=false, reportUnusedFunction=false
import ctypes
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from chainrule.bridges.export.runtime_checks import _FLAT, _step
from chainrule.bridges.export.runtime_compiled import (
    _as_a_whole,
    _given,
    _inputs,
    _numbers_apart,
    _NumbersStay,
    _through_inductor,
    _traced,
)
from chainrule.bridges.export.runtime_launches import _SMALL, _loop, _Registers
from chainrule.bridges.export.runtime_lists import _Entries, _Leaf
from chainrule.bridges.export.runtime_record import (
    _Call,
    _rebound,
    _Record,
    _results,
    _with_entries,
)
from chainrule.bridges.lowering.backends.launches import function_of

# ------------------------------------------------------------------------------------------------


_LARGE = 1 << 16
"""From so many elements on a tensor is worth all threads; so many elements of small ones are worth a thread."""
_LENGTHS = (97, 101), ((1 << 20) + 7, (1 << 20) + 11)
"""The lengths that functions are compiled for, small and large; no other's, so that no code is special to one."""


def _program(
    owner: str,
    leaves: Sequence[_Leaf],
    shared: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    loss: Tensor,
) -> Callable[[list[Tensor]], Any]:
    """The step for tensors of these shapes, all contiguous; it writes in place.

    Raises:
      RuntimeError: it cannot be traced or compiled.
    """
    step = leaves, shared, rates, loss
    try:
        with torch.autocast(loss.device.type, enabled=False):
            on_cpu = all(x.is_cpu for x in _inputs(*step))
            return (_by_function(*step) if on_cpu else None) or _as_a_whole(*step)
    except Exception as error:
        raise RuntimeError(
            f"{owner}: this step cannot be compiled: {error}; give `compile=False`"
        ) from error


def _by_function(
    leaves: Sequence[_Leaf],
    shared: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    loss: Tensor,
) -> _Registers | None:
    """The step for tensors of these shapes, contiguous and on a CPU; None if it is no list of calls of functions."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode, record = FakeTensorMode(), _Record()
    fakes = [mode.from_tensor(x.detach()) for x in _inputs(leaves, shared, rates, loss)]
    step = _rebound(_step, {name: record.recorded(name) for name in _FLAT})
    with mode, _NumbersStay(), record:
        step(*_given(fakes, leaves, shared, rates))
    if record.calls is None:
        return None
    registers = _Registers(fakes)
    for name, calls in itertools.groupby(record.calls, lambda call: call.name):
        if name:
            _add_calls(name, calls, registers)
        else:
            _add_copies([(call.results[0], call.arguments[0]) for call in calls], registers)
    registers.finish()
    return registers


def _add_copies(pairs: Iterable[tuple[Any, Any]], registers: _Registers) -> None:
    """Copies (to, from) in order, those of numbers in the loop."""
    number, memory = registers.number, registers.memory
    address = ctypes.cast(_loop().copy, ctypes.c_void_p).value
    sizes: dict[int, int] = {}

    def is_plain(pair: tuple[Tensor, Tensor]) -> bool:
        to, source = pair
        same = to.shape == source.shape and to.dtype is source.dtype
        return same and source.numel() <= _SMALL

    for in_loop, own in itertools.groupby(pairs, is_plain):
        rows: list[list[int]] = []
        for to, source in own:
            target = number.get(id(to))
            rows.append([registers.made(to) if target is None else target, number[id(source)]])
            size = source.numel() * source.itemsize
            if in_loop:
                if size not in sizes:
                    sizes[size] = registers.keep(size)
                rows[-1].append(sizes[size])
        if in_loop:
            registers.launch(address, rows)
        else:
            for i, j in rows:
                registers.launches.append(lambda i=i, j=j: memory[i].copy_(memory[j]))


class _Plan(NamedTuple):
    """A call: its arguments, with `Tensor` and `_Entries` in the place of tensors; these, and then its results."""

    template: list[Any]
    operands: list[Tensor]
    registers: list[int]
    results: list[int]
    """Which results are operands; the others are arguments, written in place."""

    def size(self) -> int:
        return max((x.numel() for x in self.operands), default=0)

    def key(self, flat: bool) -> Any:
        """What calls have in common that run the same code."""
        constants = [torch.Size if flat and isinstance(x, torch.Size) else x for x in self.template]
        shapes = [
            (x.dtype, min(x.numel(), 2) if flat and x.ndim else x.shape) for x in self.operands
        ]
        return self.size() >= _LARGE, repr(constants), *self.results, *shapes


def _plan(call: _Call, registers: _Registers) -> _Plan:
    """A call and its registers; lists of numbers are copied to vectors before it."""
    plan = _Plan([], [], [], [])
    copies: list[tuple[Tensor, Tensor]] = []

    def take(fake: Tensor, register: int) -> None:
        plan.operands.append(fake)
        plan.registers.append(register)

    def hole(x: Any) -> Any:
        if isinstance(x, Tensor):
            take(x, registers.number[id(x)])
            return Tensor
        if isinstance(x, list) and x and all(isinstance(y, Tensor) for y in x):
            if any(y.ndim or y.dtype is not x[0].dtype for y in x):
                return list(map(hole, x))
            entries = _Entries(torch.empty(len(x), dtype=x[0].dtype))
            take(entries.vector, registers.made(entries))
            copies.extend(zip(entries, x, strict=True))
            return _Entries
        return x

    plan.template.extend(map(hole, call.arguments))
    for k, x in enumerate(call.results):
        fake = x.vector if isinstance(x, _Entries) else x
        if id(fake) not in registers.number:
            plan.results.append(k)
            take(fake, registers.made(x))
    _add_copies(copies, registers)
    return plan


def _add_calls(name: str, calls: Iterable[_Call], registers: _Registers) -> None:
    """The calls of one function, those that run the same code in one loop."""
    alike: dict[Any, list[_Plan]] = {}
    for call in calls:
        plan = _plan(call, registers)
        alike.setdefault(plan.key(_FLAT[name]), []).append(plan)
    for plans in alike.values():
        for compiled, code, made in _compiled_function(name, plans[0]):
            for plan in plans:  # numbers that this part makes of numbers, for the next
                rooms = [torch.empty((), dtype=dtype) for dtype in made]
                plan.registers.extend(map(registers.keep, rooms))
            if code is None:
                registers.launches.extend(
                    _python_call(compiled, plan, registers, _FLAT[name]) for plan in plans
                )
                continue
            numbers: dict[int, int] = {}
            rows = [_words(code, plan, registers, numbers) for plan in plans]
            small = plans[0].size() < _LARGE
            work = sum(map(_Plan.size, plans)) // _LARGE if small else 1
            registers.launch(code.address, rows, max(1, min(torch.get_num_threads(), work)))


def _words(code: Any, plan: _Plan, registers: _Registers, numbers: dict[int, int]) -> list[int]:
    """The registers of the arguments of a C++ function."""
    words: list[int] = []
    for kind, which in code.arguments:
        if kind == "input":
            words.append(plan.registers[which])
        elif kind == "buffer":
            words.append(registers.keep(torch.empty((), dtype=code.buffers[which])))
        else:
            number = plan.size() if kind == "size" else which
            if number not in numbers:
                numbers[number] = registers.keep(number)
            words.append(numbers[number])
    return words


def _python_call(
    compiled: Callable[[list[Tensor]], Any], plan: _Plan, registers: _Registers, flat: bool
) -> Callable[[], Any]:
    memory = registers.memory

    def call() -> None:
        given = map(memory.__getitem__, plan.registers)
        compiled([x.view(-1) if flat and x.ndim > 1 else x for x in given])

    return call


def _compiled_function(
    name: str, plan: _Plan
) -> Iterator[tuple[Callable[[list[Tensor]], Any], Any, list[torch.dtype]]]:
    """A function of the step through Inductor, and the C++ function behind it if that is all.

    It takes arguments and then room for results; flat, tensors of any length. What it makes of numbers alone comes
    first, with the dtypes of the numbers that both parts take then.
    """
    flat, function = _FLAT[name], _with_entries(name)

    def example(like: Tensor, length: int) -> Tensor:
        if not like.ndim:  # it may lie anywhere: code that wants it aligned would copy it first
            return torch.empty((2,), dtype=like.dtype)[1]
        whole = like.shape if not flat else (like.numel() if like.numel() < 2 else length,)
        return torch.empty(whole, dtype=like.dtype)

    def body(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        whole = max(tensors, key=Tensor.dim)

        def filled(x: Any) -> Any:
            if x is Tensor or x is _Entries:
                return next(given) if x is Tensor else _Entries(next(given))
            if isinstance(x, list):
                return list(map(filled, x))
            return whole.shape if flat and isinstance(x, torch.Size) else x

        with _NumbersStay():
            made = _results(function(*map(filled, plan.template)))
        for k in plan.results:
            next(given).copy_(made[k].vector if isinstance(made[k], _Entries) else made[k])
        return []

    lengths = _LENGTHS[plan.size() >= _LARGE]
    examples = {length: [example(x, length) for x in plan.operands] for length in lengths}
    if not flat or not any(x.shape == (lengths[0],) for x in examples[lengths[0]]):
        examples = {0: examples[lengths[0]]}
    # Since torch 2.14 it is with the assertions that code reads the length of its tensors.
    options = {"size_asserts": flat and torch.__version__ >= "2.14"}
    inputs = next(iter(examples.values()))
    graph = _traced(body, inputs, flat)
    numbers = torch.fx.GraphModule(graph, _numbers_apart(graph.graph))
    graph.recompile()
    rooms = _into_rooms(numbers)
    first = _through_inductor(numbers, options) if flat and rooms else None
    for own in examples.values():
        own += [torch.empty((2,), dtype=dtype)[1] for dtype in rooms]
    if first and (code := function_of(first, examples)):
        yield first, code, rooms
    else:  # there is nothing to gain
        examples = {length: own[: len(plan.operands)] for length, own in examples.items()}
        graph = _traced(body, inputs[: len(plan.operands)], flat)
    compiled = _through_inductor(graph, options)
    yield compiled, function_of(compiled, examples), []


def _into_rooms(module: torch.fx.GraphModule) -> list[torch.dtype]:
    """Lets a graph write its results into inputs of their own, after the others; their dtypes."""
    graph, results = module.graph, list(module.graph.output_node().all_input_nodes)
    dtypes: list[torch.dtype] = []
    for result in results:
        with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
            room = graph.placeholder(f"room_{len(dtypes)}")
        with graph.inserting_before(graph.output_node()):
            copy = graph.call_function(torch.ops.aten.copy_.default, (room, result))
        room.meta["val"] = copy.meta["val"] = result.meta["val"]
        dtypes.append(result.meta["val"].dtype)
    graph.output_node().args = ([],)
    module.recompile()
    return dtypes
