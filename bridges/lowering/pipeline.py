"""The way of a lowered program to calls: the file to open first.

`lower_jaxpr` (`program.py`) translates a chain's jaxpr to a graph by the rules in `rules/`, and runs `simplify` and
`own_outputs` over each graph; `lower` traces a function first. The rest of the way is here. A pass takes a
`StepProgram` and returns it changed; its docstring says what holds before and after. What the passes know about an
operation stands in `op_info.py`.

1. `infer_values`: a fake tensor for every node;
2. `join_measures`: the kernel's sums over single tensors in one call;
3. `take_kernel_moves`: what the kernel does in place is taken out of the graph;
4. the passes of a backend:
   - *scalars* (`backends/scalar_program.py`), where nothing but scalars is left beside the kernel: none;
   - *eager* (`backends/foreach.py`): `fuse`, `rematerialise` on a CPU, `partition`;
   - *eager with the kernel* (the same): `scalarise`, `fuse`, `cut_at_sums`, `rematerialise_elements`, `partition`,
     `overwrite`;
   - *compiled* (`backends/inductor.py`): `scalarise`, `reciprocals`, `rematerialise_compiled`, `partition`,
     `overwrite`;
5. the backend turns pieces into calls, and the `Executor` runs them.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from chainrule.bridges.lowering.backends.foreach import foreach_calls, in_kernel
from chainrule.bridges.lowering.backends.kernel import KernelCall
from chainrule.bridges.lowering.backends.scalar_program import only_scalars, scalar_calls
from chainrule.bridges.lowering.executor import Emitted, Executor, Registers
from chainrule.bridges.lowering.passes.agree import agree_on_gradients
from chainrule.bridges.lowering.passes.assign_owners import assign_owners, leave_to_owners
from chainrule.bridges.lowering.passes.cut_at_sums import cut_at_sums
from chainrule.bridges.lowering.passes.fuse import fuse
from chainrule.bridges.lowering.passes.infer_values import infer_values
from chainrule.bridges.lowering.passes.join_measures import join_measures
from chainrule.bridges.lowering.passes.merge_collectives import merge_collectives
from chainrule.bridges.lowering.passes.overwrite import overwrite
from chainrule.bridges.lowering.passes.partition import copy_constants, partition
from chainrule.bridges.lowering.passes.reciprocals import reciprocals
from chainrule.bridges.lowering.passes.rematerialise import (
    rematerialise,
    rematerialise_compiled,
    rematerialise_elements,
)
from chainrule.bridges.lowering.passes.scalarise import scalarise
from chainrule.bridges.lowering.passes.shard import Sharding, shard
from chainrule.bridges.lowering.passes.take_kernel_moves import take_kernel_moves
from chainrule.bridges.lowering.program import Lowered, collector_paused
from chainrule.bridges.lowering.step_program import StepProgram

Pass = Callable[[StepProgram], StepProgram]
Backend = Callable[[StepProgram, Registers], Emitted]

FRONT: tuple[Pass, ...] = (infer_values, join_measures, take_kernel_moves)
SHARDED: tuple[Pass, ...] = (
    infer_values,
    assign_owners,
    shard,
    agree_on_gradients,
    infer_values,
    merge_collectives,
    leave_to_owners,
)


def back(program: StepProgram, compiled: bool) -> tuple[Sequence[Pass], Backend]:
    """The passes that are left, and the backend that follows them."""
    if program.moves and only_scalars(program):
        return (), scalar_calls
    if compiled:  # Inductor takes seconds to import
        from chainrule.bridges.lowering.backends.inductor import inductor_calls

        passes = (scalarise, reciprocals, copy_constants, rematerialise_compiled)
        return (*passes, partition, overwrite), inductor_calls
    # On a device a pass over memory costs less than a launch.
    carried = (rematerialise,) if program.on_cpu else ()
    if in_kernel(program):
        passes = (scalarise, fuse, cut_at_sums, rematerialise_elements, partition, overwrite)
        return passes, foreach_calls
    return (fuse, copy_constants, *carried, partition), foreach_calls


def run(passes: Sequence[Pass], program: StepProgram) -> StepProgram:
    """Runs passes in order, and notes what each did."""
    for each in passes:
        before = Counter(node.target for node in program.graph.nodes)
        program = each(program)
        after = Counter(node.target for node in program.graph.nodes)
        gone, new = (before - after).total(), (after - before).total()
        program.log.append(f"  {each.__name__:40}{after.total():>12,}{gone:>7,}{new:>7,}")
    return program


def build(program: StepProgram, compiled: bool) -> Executor:
    """A program as a function of its flat inputs; its graph is gone after it."""
    if program.sharding:
        program = run(SHARDED, program)
    program = run(FRONT, program)
    passes, backend = back(program, compiled)
    program = run(passes, program)
    registers = Registers(program)
    emitted = backend(program, registers)
    calls = len(emitted.calls) + len(program.moves)
    program.log.append(f"  {backend.__name__:40}{calls:>12,} calls")
    return Executor(program, registers, emitted, map(KernelCall, program.moves))


def sharded(lowered: Lowered, sharding: Sharding) -> Callable[..., Sequence[Tensor]]:
    """A program as a function of what this rank has of its inputs, which runs op by op and writes nothing."""
    program = run(SHARDED, StepProgram.of(lowered, (), sharding))
    return torch.no_grad()(fx.GraphModule(program.attributes, program.graph))


class Step:
    """A lowered program that writes its results into its inputs; it is built when it first runs, or is made `ready`.

    Attributes:
      log: what each pass did, once it is built.
      agrees: whether it takes one more input; see `StepProgram`. Known once it is built.
    """

    def __init__(
        self,
        lowered: Lowered,
        targets: Sequence[int],
        compiled: bool,
        sharding: Sharding | None = None,
    ):
        self._make = functools.partial(StepProgram.of, lowered, targets, sharding)
        self._compiled = compiled
        self._run: Executor | None = None
        self.agrees = False
        self.log: list[str] = []

    def ready(self) -> Executor:
        """The step, built; nothing is written."""
        if self._run is None:
            with collector_paused():
                program = self._make()
                self._run = build(program, self._compiled)
            self.log, self.agrees = program.log, program.agrees
            del self._make
        return self._run

    def __call__(self, inputs: Sequence[Tensor]) -> None:
        self.ready()(inputs)


def make_step(
    lowered: Lowered,
    targets: Sequence[int],
    *,
    compile: bool = False,
    sharding: Sharding | None = None,
) -> Step:
    """The program as a function that writes its outputs into its inputs.

    Args:
      lowered: the program.
      targets: for every output, the position of the input that it updates; no input twice.
      compile: whether to run it through Inductor.
      sharding: how the inputs lie on a mesh of devices; the program then takes what this rank has of each.

    Returns:
      A function of the flat inputs. They may be other tensors at every call, of the same shapes and
      dtypes.

    >>> import jax, jax.numpy as jnp, torch
    >>> from chainrule.bridges.lowering import lower
    >>> aval = jax.ShapeDtypeStruct((), jnp.float32)
    >>> swap = make_step(lower(lambda a, b: (b, a + b), aval, aval), (0, 1))
    >>> a, b = torch.tensor(1.0), torch.tensor(2.0)
    >>> swap([a, b]), a, b
    (None, tensor(2.), tensor(3.))
    """
    return Step(lowered, targets, compile, sharding)
