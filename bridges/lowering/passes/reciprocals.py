"""Quotients of tensors by a scalar as products with its inverse, where codes leave no time to divide."""

import torch
from torch import fx

from chainrule.bridges.lowering.nodes import args_of, is_array, is_scalar, mark_like, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.step_program import StepProgram


def reciprocals(program: StepProgram) -> StepProgram:
    """Before: tensors are divided by scalars, such as a bias correction. After, in a program with codes on a CPU: they
    are multiplied by inverses, each taken once.

    A step that reads and writes float32 waits for memory, and divides meanwhile; in 8 or 4 bits it does not wait.
    """
    graph = program.graph
    if not any(info(node).codes for node in graph.nodes):
        return program
    inverses: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.target is not torch.div or node.kwargs or len(args_of(node)) != 2:
            continue
        x, y = args_of(node)
        if not (isinstance(y, fx.Node) and is_scalar(value_of(y)) and is_array(value_of(node))):
            continue
        if value_of(y).dtype != value_of(node).dtype:
            continue
        if y not in inverses:
            with graph.inserting_after(y):
                new = graph.call_function(torch.reciprocal, (y,))
            inverses[y] = mark_like(new, y, value_of(y))
        node.target, node.args = torch.mul, (x, inverses[y])
    return program
