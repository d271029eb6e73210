"""Matrix work on one rank for all: which rank works on which tensor, and what the others leave to it."""

import math
from collections.abc import Iterator

import torch
from torch import fx

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.layouts import is_cut
from chainrule.bridges.lowering.nodes import args_of, is_array, shape_of, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.simplify import drop_dead
from chainrule.bridges.lowering.step_program import StepProgram


def assign_owners(program: StepProgram) -> StepProgram:
    """Before: a graph of whole tensors. After: where ranks have parts of what is multiplied, decomposed or sorted,
    `meta["owner"]` of the nodes that do it is the number of the rank that does it for all.

    What hangs together goes to one rank: the heavy nodes of a tensor, what lies between two of them, and what is made
    for them alone of the tensors that they read. The largest goes first, each to the rank that has least to do.
    """
    if program.sharding is None:
        return program
    regions: dict[fx.Node, list[fx.Node]] = {}
    for node, root in _regions(program).items():
        regions.setdefault(root, []).append(node)
    work = {root: sum(map(_operations, nodes)) for root, nodes in regions.items()}
    load = [0.0] * len(program.sharding.mesh.order)
    for root in sorted(regions, key=lambda root: -work[root]):
        owner = load.index(min(load))
        load[owner] += work[root]
        for node in regions[root]:
            node.meta["owner"] = owner
    if regions:
        shares = ", ".join(f"{x / max(sum(load), 1):.0%}" for x in load[:8])
        more = ", ..." if len(load) > 8 else ""
        program.log.append(f"    matrix work of {len(regions)} tensors by rank: {shares}{more}")
    return program


def leave_to_owners(program: StepProgram) -> StepProgram:
    """Before: the work of all owners is in the graph. After: only this rank's own; the collectives are those of all."""
    for node in program.graph.find_nodes(op="call_function", target=ops.exchange):
        xs, routes, *rest = args_of(node)
        given = [x if sent else None for x, (sent, *_) in zip(xs, routes, strict=True)]
        node.args = (given, routes, *rest)
    drop_dead(program.graph)
    return program


def _regions(program: StepProgram) -> dict[fx.Node, fx.Node]:
    """The nodes that are to have an owner, each with one that stands for its region."""
    nodes = [node for node in program.graph.nodes if node.op != "output"]
    between = _between_heavy(program, nodes)
    parent = {node: node for node in between}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = node = parent[parent[node]]
        return node

    for node in between:
        for source in _arrays(node):
            if source in between:
                parent[root(source)] = root(node)

    base = _bases(nodes)
    read: dict[fx.Node, set[fx.Node]] = {}
    for node in between:
        read.setdefault(root(node), set()).update(base[s] for s in _arrays(node))
    found = {node: root(node) for node in between}
    for node in reversed(nodes):
        users = {found.get(user) for user in node.users}
        if node.op != "call_function" or node in found or info(node).host or len(users) != 1:
            continue
        (user,) = users
        # Nothing is sent to the owner for it that is not sent anyway.
        if user is not None and all(base[source] in read[user] for source in _arrays(node)):
            found[node] = user
    return found


def _between_heavy(program: StepProgram, nodes: list[fx.Node]) -> dict[fx.Node, None]:
    """The heavy nodes with operands that are cut, and the tensors between two of them, in order."""
    assert program.sharding is not None
    axes = zip(program.inputs, program.sharding.axes, strict=True)
    cut = {node for node, own in axes if is_cut(own)}
    behind, ahead, heavy = set[fx.Node](), set[fx.Node](), set[fx.Node]()
    for node in nodes:
        sources = set(_arrays(node))
        if sources & cut and not info(node).host:  # sums that the kernel takes are whole
            cut |= {node} if is_array(value_of(node)) else set()
            heavy |= {node} if info(node).heavy else set()
        if node in heavy or (sources & behind and is_array(value_of(node))):
            behind.add(node)
    for node in reversed(nodes):
        if node in heavy or (is_array(value_of(node)) and not ahead.isdisjoint(node.users)):
            ahead.add(node)
    return dict.fromkeys(n for n in nodes if n in ahead and n in behind and not info(n).host)


def _arrays(node: fx.Node) -> Iterator[fx.Node]:
    return (source for source in node.all_input_nodes if is_array(value_of(source)))


def _bases(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """For every node the tensor that it is made of, if that is one only and has no more entries; else itself."""
    base: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        sources = list(_arrays(node))
        alone = node.op == "call_function" and len(sources) == 1 and not info(node).host
        alone = alone and _entries(node) >= _entries(sources[0])
        base[node] = base[sources[0]] if alone else node
    return base


def _entries(node: fx.Node) -> int:
    return math.prod(shape_of(value_of(node)))


def _operations(node: fx.Node) -> float:
    """About how many a node takes, if it is heavy."""
    if not info(node).heavy:
        return 0
    first, *_, last = node.all_input_nodes * 2
    if node.target in (ops.sort, ops.top_k):
        return _entries(first) * math.log2(_entries(first) + 2)
    if node.target in _DECOMPOSITIONS:
        return 10 * _entries(first) * min(shape_of(value_of(first))[-2:])
    return 2 * math.sqrt(_entries(first) * _entries(last) * _entries(node))  # m k, k n and m n


_DECOMPOSITIONS = torch.linalg.qr, ops.cholesky, ops.eigh, ops.singular_values, ops.svd
