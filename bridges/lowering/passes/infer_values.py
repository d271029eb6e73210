"""A fake tensor for every node: its shape, dtype and device without memory."""

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.arrays import physical_shape, torch_dtype
from chainrule.bridges.lowering.nodes import args_of, first_arg, function_of, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.simplify import key_of
from chainrule.bridges.lowering.step_program import StepProgram


def infer_values(program: StepProgram) -> StepProgram:
    """Before: nodes of JAX variables have `meta["aval"]`. After: every node has `meta["val"]`.

    Leaves that are alike give alike nodes, so what an operation makes of the same fakes is asked once: the same object
    stands for all of them.
    """
    with torch.no_grad():
        fakes = _Fakes(program.device)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                node.meta["val"] = fakes.like(node.meta["aval"])
            elif node.op == "get_attr":
                node.meta["val"] = program.attributes[str(node.target)]
            elif node.op == "call_function":
                node.meta["val"] = fakes.of(node)
    return program


class _Fakes:
    def __init__(self, device: torch.device):
        self.device, self.mode = device, FakeTensorMode(allow_non_fake_inputs=True)
        self.known: dict[Any, Any] = {}
        self.held: list[Any] = []
        """Whatever is known by its `id`."""

    def like(self, aval: Any) -> torch.Tensor:
        shape, dtype = physical_shape(aval), torch_dtype(aval.dtype)
        if (shape, dtype) not in self.known:
            with self.mode:
                self.known[shape, dtype] = torch.empty(shape, dtype=dtype, device=self.device)
        return self.known[shape, dtype]

    def of(self, node: fx.Node) -> Any:
        if node.target is ops.decode:
            return self.like(node.meta["aval"])
        if info(node).host or info(node).codes:  # its results are told apart by who takes them
            taken: dict[Any, fx.Node] = {args_of(user)[1]: user for user in node.users}
            count = max(taken, default=-1) + 1
            return [self.like(taken[i].meta["aval"]) if i in taken else None for i in range(count)]
        if node.target is operator.getitem:
            return value_of(first_arg(node))[args_of(node)[1]]

        def identity(arg: fx.Node) -> int:
            return id(value_of(arg))

        key = node.target, key_of(node.args, identity), key_of(node.kwargs, identity)
        if key not in self.known:
            args = fx.map_arg(args_of(node), value_of)
            kwargs: Any = fx.map_arg(node.kwargs, value_of)
            with self.mode:
                self.known[key] = function_of(node)(*args, **kwargs)
            self.held.extend(value_of(x) for x in node.all_input_nodes)
        return self.known[key]
