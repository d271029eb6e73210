"""Pieces that sum a tensor and go on with it, cut at the sum.

A program of elements (`backends/elements.py`) may end in sums of what it computes, but has them when it is through. Op
by op such a piece, of twenty operations perhaps, would be as many passes over memory.
"""

from chainrule.bridges.lowering.backends.element_ops import is_sum, takes
from chainrule.bridges.lowering.nodes import is_array, value_of
from chainrule.bridges.lowering.passes.partition import Piece, partition
from chainrule.bridges.lowering.step_program import StepProgram


def cut_at_sums(program: StepProgram) -> StepProgram:
    """Before: a sum of a tensor and what reads it may be one piece. After, where the kernel has a program for each
    part: the sum has `meta["ends"]`, with which its piece ends.
    """
    for stage in partition(program).stages:
        for piece in stage:
            if _is_known(piece):
                for node in filter(is_sum, piece.nodes):
                    node.meta["ends"] = True
    return program


def _is_known(piece: Piece) -> bool:
    """Whether the kernel has what a piece computes of arrays."""
    arrays = [n for n in piece.nodes if any(is_array(value_of(x)) for x in (n, *n.all_input_nodes))]
    return piece.flat and all(map(takes, arrays))
