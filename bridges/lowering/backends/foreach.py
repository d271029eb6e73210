"""Eager calls: alike pieces of all leaves run as one `torch._foreach_*` call an operation; see `batch.py`.

On a CPU the compiled kernel, where it is there, takes scalars (`stage_scalars.py`) and elementwise pieces
(`elements.py`).
"""

from collections.abc import Sequence

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.backends.batch import Batch
from chainrule.bridges.lowering.backends.coded_batch import ElementTiles, coded_batches
from chainrule.bridges.lowering.backends.elements import Elements, element_calls
from chainrule.bridges.lowering.backends.stage_scalars import StageScalars
from chainrule.bridges.lowering.backends.unbind import Unbind
from chainrule.bridges.lowering.executor import Call, Emitted, Registers
from chainrule.bridges.lowering.passes.coded import is_coded, take_apart
from chainrule.bridges.lowering.passes.partition import Piece, by_kind
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native import _kernel


def in_kernel(program: StepProgram) -> bool:
    """Whether scalars and elementwise pieces of an eager program are the kernel's."""
    return program.on_cpu and _kernel is not None


def foreach_calls(program: StepProgram, registers: Registers) -> Emitted:
    """The stages as calls, one for all pieces of a kind."""
    calls: list[Call] = []
    written = set()
    for index, stage in enumerate(program.stages):
        scalars = StageScalars(program, index, registers) if in_kernel(program) else None
        pieces = stage if scalars is None else scalars.rest
        made, batches = _calls(pieces, registers, scalars, program.on_cpu)
        if scalars is not None:
            written |= scalars.written
            calls += scalars.calls()
            for batch in batches:
                if isinstance(batch, Elements | ElementTiles):
                    batch.ready(scalars.words)
        written |= {pair for batch in batches for pair in batch.written}
        calls += made
    return Emitted(calls, written)


def _calls(
    pieces: Sequence[Piece], registers: Registers, scalars: StageScalars | None, on_cpu: bool
) -> tuple[list[Call], list[Batch | Elements | ElementTiles]]:
    """Calls for the pieces of a stage, and those of them that write into inputs."""
    unbinds: list[Call] = [Unbind(p, registers) for p in pieces if _unbinds(p)]
    coded = [piece for piece in pieces if is_coded(piece)]
    batches: list[Batch | Elements | ElementTiles] = []
    for kind in by_kind([p for p in pieces if not is_coded(p) and not _unbinds(p)]):
        elements = None if scalars is None else element_calls(kind, registers, scalars)
        batches.append(elements or Batch(kind, registers, on_cpu))
    batches += coded_batches([take_apart(piece) for piece in coded], registers, scalars)
    return [*unbinds, *batches], batches


def _unbinds(piece: Piece) -> bool:
    return piece.nodes[0].target is ops.unbind
