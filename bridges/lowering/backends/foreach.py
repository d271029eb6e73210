"""Eager calls: alike pieces of all leaves run as one `torch._foreach_*` call an operation; see `batch.py`."""

from chainrule.bridges.lowering.backends.batch import Batch
from chainrule.bridges.lowering.backends.coded_batch import coded_batches
from chainrule.bridges.lowering.executor import Emitted, Registers
from chainrule.bridges.lowering.passes.coded import is_coded, take_apart
from chainrule.bridges.lowering.passes.partition import by_kind
from chainrule.bridges.lowering.step_program import StepProgram


def foreach_calls(program: StepProgram, registers: Registers) -> Emitted:
    """The stages as calls, one for all pieces of a kind."""
    batches: list[Batch] = []
    for stage in program.stages:
        plain = [piece for piece in stage if not is_coded(piece)]
        batches += [Batch(kind, registers, program.on_cpu) for kind in by_kind(plain)]
        batches += coded_batches([take_apart(p) for p in stage if is_coded(p)], registers)
    return Emitted([*batches], {pair for batch in batches for pair in batch.written})
