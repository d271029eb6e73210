"""From a jaxpr to a ``torch.fx.Graph``, one equation at a time.

While building, a value is a graph node, a Python scalar (a literal, or what folding literals
gave), or ``Full``, a constant array that is one scalar everywhere. Scalars stay Python scalars as
long as a torch function takes them, so that Inductor and ``torch._foreach_*`` see scalars.

Where the semantics need a tensor, ``Builder.tensor`` makes one. The rules that say what a
primitive becomes are in ``rules``.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import torch
from jax.extend import core
from torch import fx

from chainrule.bridges.lowering.arrays import MASKS, to_torch, torch_dtype
from chainrule.bridges.lowering.errors import UnsupportedPrimitive
from chainrule.bridges.lowering.origin import Equation, Place, place_of
from chainrule.bridges.lowering.passes.own_outputs import own_outputs
from chainrule.bridges.lowering.passes.simplify import simplify
from chainrule.native.dtypes import is_key

Scalar: TypeAlias = bool | int | float | complex


class Full(NamedTuple):
    """A constant array holding one scalar everywhere."""

    value: Scalar
    aval: Any


Value: TypeAlias = fx.Node | Scalar | Full
Rule: TypeAlias = Callable[..., Any]  # (Builder, Equation, *Value) -> Value or a sequence of them


def scalar(value: Any, dtype: Any) -> Scalar:
    """``value``, rounded to ``dtype``, as a Python scalar."""
    array = np.asarray(value).astype(dtype)
    if array.dtype == np.bool_:
        return bool(array)
    if jax.numpy.issubdtype(array.dtype, np.integer):
        return int(array)
    if jax.numpy.issubdtype(array.dtype, np.complexfloating):
        return complex(array)
    return float(array)


class Target(NamedTuple):
    """Where a program will run, which decides what is left to the compiled kernel."""

    device: str  # the type of the device
    compiled: bool  # by a compiler that fuses operations, instead of one by one
    sharded: bool = False  # on parts of tensors, which several ranks have


class Shared(NamedTuple):
    """What a graph and its sub-graphs (branches, loop bodies) have in common."""

    table: dict[str, Rule]
    elementwise: frozenset[str]
    device: torch.device
    target: Target
    live: dict[core.Jaxpr, list[Equation]]
    subgraphs: dict[Any, fx.GraphModule]
    folded: dict[Any, Scalar]


class Builder:
    """Holds one fx graph under construction; rules emit into it."""

    def __init__(self, shared: Shared):
        self.shared = shared
        self.device = shared.device
        self.target = shared.target
        self.graph = fx.Graph()
        self.root: dict[str, Any] = {}
        self.place = Place("", "")
        self._attributes: dict[int, tuple[Any, fx.Node]] = {}

    # ---- emitting --------------------------------------------------------------------------

    def emit(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A ``call_function`` node that remembers where its equation came from."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(link=self.place.link, source=self.place.source)
        return node

    def items(self, node: fx.Node, count: int) -> list[fx.Node]:
        """The elements of a node that returns a tuple."""
        return [self.emit(operator.getitem, node, i) for i in range(count)]

    def tensor(self, value: Value, aval: Any = None) -> fx.Node:
        """A node for ``value``; a scalar becomes a 0-d tensor of ``aval``'s dtype."""
        if isinstance(value, fx.Node):
            return value
        if isinstance(value, Full):
            value, aval = value
            shape = tuple(aval.shape)
        else:
            shape = ()
        dtype = torch_dtype(aval.dtype)
        node = self.emit(torch.full, shape, value, dtype=dtype, device=self.device)
        node.meta["aval"] = aval if aval.shape == shape else aval.update(shape=shape)
        return node

    def constant(self, array: Any) -> Value:
        """A closed-over array: a Python scalar when 0-d, else a buffer of the module."""
        if not is_key(array.dtype) and np.ndim(array) == 0:
            return scalar(array, array.dtype)
        if id(array) not in self._attributes:
            name = f"constant_{len(self.root)}"
            self.root[name] = to_torch(array, self.device)
            self._attributes[id(array)] = (array, self._attribute(name))
        return self._attributes[id(array)][1]

    def module(self, jaxpr: core.ClosedJaxpr) -> fx.Node:
        """A reference to the sub-graph of a branch or loop body."""
        graphs = self.shared.subgraphs
        if jaxpr.jaxpr not in graphs:
            graph, attributes = build(jaxpr, self.shared)
            graphs[jaxpr.jaxpr] = fx.GraphModule(attributes, graph)
        if id(jaxpr.jaxpr) not in self._attributes:
            name = f"body_{len(self.root)}"
            self.root[name] = graphs[jaxpr.jaxpr]
            self._attributes[id(jaxpr.jaxpr)] = (jaxpr.jaxpr, self._attribute(name))
        return self._attributes[id(jaxpr.jaxpr)][1]

    def _attribute(self, name: str) -> fx.Node:
        node = self.graph.create_node("get_attr", name)
        node.meta.update(link="", source="")
        return node

    def wrap(self, node: fx.Node, aval: Any) -> fx.Node:
        """``node`` with the bits an unsigned dtype does not have cleared (see ``arrays``)."""
        name = "" if is_key(aval.dtype) else aval.dtype.name
        return self.emit(torch.bitwise_and, node, MASKS[name]) if name in MASKS else node

    def unsupported(self, eqn: Equation, detail: str = "") -> UnsupportedPrimitive:
        """The error for an equation that has no lowering."""
        return UnsupportedPrimitive(eqn.primitive.name, *self.place, detail)

    # ---- walking ---------------------------------------------------------------------------

    def inline(
        self, jaxpr: core.Jaxpr, constants: Sequence[Any], operands: Sequence[Value]
    ) -> list[Value]:
        """Emit the equations of ``jaxpr`` here; returns the values of its outputs."""
        env: dict[core.Var, Value] = dict(zip(jaxpr.invars, operands, strict=True))
        env |= {v: self.constant(c) for v, c in zip(jaxpr.constvars, constants, strict=True)}

        def read(atom: Any) -> Value:
            if isinstance(atom, core.Literal):
                aval: Any = atom.aval
                return scalar(atom.val, aval.dtype)
            return env[atom]

        outer = self.place
        for eqn in self._live(jaxpr):
            own = place_of(eqn, jaxpr) if outer.link else place_of(eqn)
            self.place = own if own.link else outer
            values = self._apply(eqn, [read(v) for v in eqn.invars])
            for var, value in zip(eqn.outvars, values, strict=True):
                if isinstance(value, fx.Node):
                    value.meta.setdefault("aval", var.aval)
                env[var] = value
        self.place = outer
        return [read(v) for v in jaxpr.outvars]

    def _live(self, jaxpr: core.Jaxpr) -> list[Equation]:
        if jaxpr not in self.shared.live:
            needed = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
            kept = []
            for eqn in reversed(jaxpr.eqns):
                if eqn.effects or not needed.isdisjoint(eqn.outvars):
                    needed.update(v for v in eqn.invars if isinstance(v, core.Var))
                    kept.append(eqn)
            self.shared.live[jaxpr] = kept[::-1]
        return self.shared.live[jaxpr]

    def _apply(self, eqn: Equation, operands: list[Value]) -> Sequence[Value]:
        name = eqn.primitive.name
        rule = self.shared.table.get(name)
        if rule is None:
            raise self.unsupported(eqn)
        if name in self.shared.elementwise:
            if not any(isinstance(x, fx.Node) for x in operands):
                return [self._fold(eqn, operands)]
            aval = eqn.outvars[0].aval
            scalars = [s for s in map(scalar_source, operands) if s is not None]
            if aval.shape and not is_key(aval.dtype) and len(scalars) == len(operands):
                return [self._repeated(eqn, rule, scalars)]
            operands = self._narrow(eqn, operands)
        out = rule(self, eqn, *operands)
        return out if isinstance(out, list | tuple) and not isinstance(out, Full) else [out]

    def _fold(self, eqn: Equation, operands: Sequence[Value]) -> Value:
        """An elementwise equation of constants only, evaluated by JAX itself."""
        scalars = tuple(x.value if isinstance(x, Full) else x for x in operands)
        dtypes = tuple(v.aval.dtype for v in eqn.invars)
        key = (eqn.primitive.name, repr(eqn.params), repr(scalars), dtypes)
        aval = eqn.outvars[0].aval
        if key not in self.shared.folded:
            arrays = [np.asarray(x, d) for x, d in zip(scalars, dtypes, strict=True)]
            with jax.ensure_compile_time_eval():
                value = eqn.primitive.bind(*arrays, **eqn.params)
            self.shared.folded[key] = scalar(value, aval.dtype)
        value = self.shared.folded[key]
        return Full(value, aval) if aval.shape else value

    def _repeated(self, eqn: Equation, rule: Rule, scalars: Sequence[Value]) -> Value:
        """An elementwise equation of scalars that are repeated everywhere, such as norms with their axes kept."""
        (aval,) = (v.aval for v in eqn.outvars)
        value: Any = rule(self, eqn, *scalars)
        if not isinstance(value, fx.Node):
            return Full(value, aval)
        value.meta.setdefault("aval", aval.update(shape=()))
        return self.repeat(value, aval.shape)

    def repeat(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """A scalar everywhere; who reads it may read the scalar."""
        node = self.emit(torch.broadcast_to, x, tuple(shape))
        node.meta["broadcast_of"] = x
        return node

    def _narrow(self, eqn: Equation, operands: list[Value]) -> list[Value]:
        """Constants and broadcast scalars as scalars, if another operand has the full shape."""
        shape = eqn.outvars[0].aval.shape
        sources = [
            scalar_source(x) if v.aval.shape else None
            for x, v in zip(operands, eqn.invars, strict=True)
        ]
        full = [
            isinstance(x, fx.Node) and source is None and v.aval.shape == shape
            for x, source, v in zip(operands, sources, eqn.invars, strict=True)
        ]
        if not any(full):  # one operand must keep the shape
            for i, v in enumerate(eqn.invars):
                if sources[i] is not None and v.aval.shape == shape:
                    sources[i] = None
                    break
        narrowed = [
            x if source is None else source for x, source in zip(operands, sources, strict=True)
        ]
        return [self.tensor(x) if isinstance(x, Full) else x for x in narrowed]


def scalar_source(x: Value) -> Value | None:
    """The scalar that ``x`` is, or repeats everywhere; None if it is not known to."""
    if isinstance(x, Full):
        return x.value
    if not isinstance(x, fx.Node):
        return x
    aval = x.meta.get("aval")
    is_scalar = aval is not None and not aval.shape and not is_key(aval.dtype)
    return x if is_scalar else x.meta.get("broadcast_of")


def build(
    jaxpr: core.ClosedJaxpr, shared: Shared, names: Sequence[str] = ()
) -> tuple[fx.Graph, dict[str, Any]]:
    """The graph of a closed jaxpr, flat tensors in, a tuple of flat tensors out, and what its `get_attr` nodes name."""
    builder = Builder(shared)
    inputs: list[Value] = []
    for i, var in enumerate(jaxpr.jaxpr.invars):
        node = builder.graph.placeholder(names[i] if names else f"x{i}")
        node.meta.update(aval=var.aval, link="", source="")
        inputs.append(node)
    outputs = builder.inline(jaxpr.jaxpr, jaxpr.consts, inputs)
    nodes = [builder.tensor(x, v.aval) for x, v in zip(outputs, jaxpr.jaxpr.outvars, strict=True)]
    builder.graph.output(tuple(nodes))
    simplify(builder.graph)
    own_outputs(builder.graph)
    return builder.graph, builder.root
