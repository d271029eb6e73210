"""What ranks have to know of each other's gradients, told with what they tell each other anyway."""

import operator

import jax.numpy as jnp
from jax.core import ShapedArray

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import results_of, return_
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.step_program import StepProgram


def agree_on_gradients(program: StepProgram) -> StepProgram:
    """Before: the graph of a rank. After: if it has collectives, which wait for all ranks, one more input says which
    parameters have a gradient here (1, else 0), and becomes on how many ranks they have one.

    So a rank without a gradient takes part in the step, and then knows whether it was one. This is one entry more for
    each parameter in the first sum over all ranks, if there is one.
    """
    sharding, graph = program.sharding, program.graph
    nodes = [node for node in graph.nodes if info(node).collective]
    if sharding is None or not sharding.params or not nodes:
        return program
    with graph.inserting_after(program.inputs[-1]):
        here = graph.placeholder("present")
    with graph.inserting_before(graph.output_node()):
        args = [here], "sum", sharding.mesh.everyone
        everywhere = graph.call_function(ops.all_reduce, args)
        item = graph.call_function(operator.getitem, (everywhere, 0))
    aval = ShapedArray((sharding.params,), jnp.dtype("float32"))
    for level, node in enumerate((here, everywhere, item)):
        node.meta.update(link="", source="", aval=aval, level=max(level - 1, 0))
    program.targets = (*program.targets, len(program.inputs) - 1)
    program.agrees = True
    return_(graph, [*results_of(graph), item])
    return program
