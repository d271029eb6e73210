"""Results straight into the memory of what they replace, where nobody reads that any more.

A piece updates in place what it reads. What it does not read, such as a measure that a state only shows, would get
memory of its own and be copied at the end of the step, a call for all and a cache line more for each.
"""

from torch import fx

from chainrule.bridges.lowering.nodes import value_of
from chainrule.bridges.lowering.op_info import readers
from chainrule.bridges.lowering.passes.partition import Piece, is_apart
from chainrule.bridges.lowering.step_program import StepProgram


def overwrite(program: StepProgram) -> StepProgram:
    """Before: pieces update inputs that they read. After, all that are not apart update also inputs of the step that
    they do not read, and no other piece does at their stage or later; these are inputs of the piece then.
    """
    old_of = dict(program.updates)
    stage_of = {n: i for i, stage in enumerate(program.stages) for p in stage for n in p.nodes}
    last_read: dict[fx.Node, int] = {
        old: max((stage_of.get(n, -1) for n in readers(old)), default=-1) for old in old_of.values()
    }
    program.stages = tuple(
        tuple(_overwriting(piece, i, old_of, last_read) for piece in stage)
        for i, stage in enumerate(program.stages)
    )
    return program


def _overwriting(
    piece: Piece, stage: int, old_of: dict[fx.Node, fx.Node], last_read: dict[fx.Node, int]
) -> Piece:
    if any(map(is_apart, piece.nodes)):
        return piece
    inside = {i for i, _ in piece.updates}
    more: list[tuple[int, fx.Node]] = []
    for i, node in enumerate(piece.outputs):
        old = old_of.get(node)
        if old is None or i in inside or old is node or last_read[old] >= stage:
            continue
        now, before = value_of(node), value_of(old)
        if (now.shape, now.dtype) == (before.shape, before.dtype):
            more.append((i, old))
    return piece._replace(
        inputs=(*piece.inputs, *(old for _, old in more)),
        updates=(*piece.updates, *more),
        kind=(piece.kind, tuple(i for i, _ in more)),
    )
