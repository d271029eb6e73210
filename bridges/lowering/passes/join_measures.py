"""Sums over single tensors, taken in one call of the kernel."""

import operator
from typing import Any

import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.nodes import args_of, mark_like, value_of
from chainrule.bridges.lowering.passes.simplify import unbind_vectors
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.native import forms


def join_measures(program: StepProgram) -> StepProgram:
    """Before: a kernel call for each tier, or each group, of tensors that a chain measures. After: calls with the same
    parameters, of inputs, are one, and what each returned is a part of its vectors.
    """
    graph = program.graph
    inputs = set(program.inputs)
    alike: dict[Any, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=ops.kernel_call):
        name, params, (c, *tensors) = args_of(node)
        of_one = name == "chainrule_sums" and dict(params)["kind"] in forms.OF_ONE
        if of_one and not isinstance(c, fx.Node) and inputs.issuperset(tensors):
            alike.setdefault((params, c), []).append(node)
    for (params, c), calls in alike.items():
        if len(calls) > 1:
            _join(graph, params, c, calls)
    unbind_vectors(graph)
    return program


def _join(graph: fx.Graph, params: Any, c: Any, calls: list[fx.Node]) -> None:
    """One call in the place of several, and their parts of its vectors."""
    own: list[list[fx.Node]] = [args_of(node)[2][1:] for node in calls]
    tensors = [x for xs in own for x in xs]
    vectors: dict[Any, fx.Node] = {}
    with graph.inserting_before(calls[0]):
        whole = graph.call_function(ops.kernel_call, ("chainrule_sums", params, [c, *tensors]))
        mark_like(whole, calls[0], [None] * len(value_of(calls[0])))
        taken = {args_of(user)[1]: user for call in calls for user in call.users}
        for k, user in taken.items():
            vectors[k] = graph.call_function(operator.getitem, (whole, k))
            mark_like(vectors[k], user, value_of(user).new_empty(len(tensors)))
            vectors[k].meta["aval"] = user.meta["aval"].update(shape=(len(tensors),))
            value_of(whole)[k] = value_of(vectors[k])
    start = 0
    for node, xs in zip(calls, own, strict=True):
        for user in list(node.users):
            with graph.inserting_before(user):
                part = graph.call_function(
                    torch.narrow, (vectors[args_of(user)[1]], 0, start, len(xs))
                )
            mark_like(part, user, value_of(user)).meta["aval"] = user.meta["aval"]
            user.replace_all_uses_with(part)
            graph.erase_node(user)
        graph.erase_node(node)
        start += len(xs)
