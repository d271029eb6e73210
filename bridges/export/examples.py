"""A chain's `init` and step for lists of example parameters, as graphs: what `generalise` compares.

The passes are those of the eager bridge, so that a file computes what the bridge does, but the compiled kernel has no
part: its primitives are lowered to their forms.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax.extend.core import Primitive
from torch import fx

from chainrule.bridges.export.newton_schulz import newton_schulz_steps
from chainrule.bridges.lowering import Lowered
from chainrule.bridges.lowering.builder import Builder, Equation, Shared, Target, Value, build
from chainrule.bridges.lowering.nodes import first_arg, inputs_of, results_of, return_
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.lowering.passes.fuse import fuse
from chainrule.bridges.lowering.passes.infer_values import infer_values
from chainrule.bridges.lowering.passes.rematerialise import rematerialise_compiled
from chainrule.bridges.lowering.passes.simplify import drop_dead, unbind_vectors
from chainrule.bridges.lowering.program import collector_paused
from chainrule.bridges.lowering.rules import TABLE
from chainrule.bridges.lowering.rules.elementwise import ELEMENTWISE
from chainrule.bridges.lowering.step_program import StepProgram
from chainrule.bridges.step.description import Description, describe
from chainrule.bridges.step.trace import Struct, Trace
from chainrule.native.dtypes import x64_if_wide
from chainrule.native.primitives import OPERATIONS
from chainrule.transforms._gram_iteration import one_equation
from chainrule.transforms._polar_coefficients import Triple

_steps = Primitive("newton_schulz_steps")
_steps.def_abstract_eval(lambda x, **_: x)
_CPU = torch.device("cpu")


class Role(NamedTuple):
    """What an input of a program is, or what an output becomes."""

    kind: str
    """`param`, `grad` or `state` of a leaf, `group` for the state of all; `live` (a key), `multiplier`, `loss`."""
    leaf: int | None = None
    name: str = ""


class Program(NamedTuple):
    """A graph, with what its inputs and outputs are."""

    graph: fx.Graph
    attributes: dict[str, Any]
    inputs: dict[fx.Node, Role]
    outputs: dict[Role, fx.Node]


class Example(NamedTuple):
    """A chain for one list of parameters."""

    structs: list[Struct]
    described: Description
    init: Program
    step: Program


def example(chain: Any, structs: Sequence[Struct]) -> Example:
    """The programs of a chain for a list of parameters.

    Raises:
      NeedsLossFunction, StateChanges, UnsupportedPrimitive: see `describe` and `lower_jaxpr`.
    """
    with collector_paused(), _newton_schulz_as_one_equation():
        described = describe(chain, list(structs))
        trace = described.trace(True)
        step = infer_values(StepProgram.of(_lowered(trace), described.targets))
        init = infer_values(StepProgram.of(_lowered(described.init()), ()))
        for part in (init, step):
            _uncopied(part.graph)
            _pick(part.graph)
        step = rematerialise_compiled(fuse(step))
    n, live = len(structs), {leaf: name for name, leaf in described.live.items()}
    params = [Role("param", i) for i in range(n)]
    state = [
        Role("live", None, live[k]) if k in live
        else Role("group", None, slot.name) if slot.owner is None
        else Role("state", slot.owner, slot.name)
        for k, slot in enumerate(described.slots)
    ]  # fmt: skip
    grads = [Role("grad", i) for i in range(n)]
    roles = [*params, *grads, *state, Role("multiplier"), Role("loss")]
    given = dict(zip(step.inputs, roles, strict=True))
    updated = dict(zip([*params, *state], step.results, strict=True))
    made = dict(zip(state, results_of(init.graph), strict=True))
    return Example(
        list(structs),
        described,
        Program(init.graph, init.attributes, dict(zip(inputs_of(init.graph), params, strict=True)), made),
        Program(step.graph, step.attributes, given, updated),
    )  # fmt: skip


def _pick(graph: fx.Graph) -> None:
    """Takes scalars out of vectors in one way, however many they are."""
    unbind_vectors(graph, 1)
    drop_dead(graph)


def _uncopied(graph: fx.Graph) -> None:
    """Leaves the copies out that `own_outputs` made of results: whoever writes results copies them where he must."""
    results: list[fx.Node] = []
    for node in results_of(graph):
        root = first_arg(node) if node.target is torch.clone and node.kwargs else node
        source = root
        while info(source).view:
            source = first_arg(source)
        results.append(node if source.op == "placeholder" else root)
    return_(graph, results)


def _lowered(trace: Trace) -> Lowered:
    """A trace as a graph without the kernel."""
    table = TABLE | dict.fromkeys(OPERATIONS, _form) | {_steps.name: _newton_schulz}
    with x64_if_wide(trace.inputs):
        shared = Shared(table, frozenset(ELEMENTWISE), _CPU, Target(_CPU.type, False), {}, {}, {})
        graph, attributes = build(trace.jaxpr, shared)
    return Lowered(graph, attributes, (), {}, _CPU)


@contextlib.contextmanager
def _newton_schulz_as_one_equation() -> Iterator[None]:
    """The products that it takes depend on the sides of a matrix: to one equation all matrices are alike."""

    def bind(x: jax.Array, triples: Sequence[Triple], gram: bool | str) -> jax.Array:
        return _steps.bind(x, triples=tuple(triples), gram=gram)

    token = one_equation.set(bind)
    try:
        yield
    finally:
        one_equation.reset(token)


def _newton_schulz(b: Builder, eqn: Equation, x: Value) -> Value:
    aval: Any = eqn.invars[0].aval
    rounded = np.asarray(eqn.params["triples"], aval.dtype).astype(float).tolist()
    triples = tuple(tuple(triple) for triple in rounded)
    return b.emit(newton_schulz_steps, b.tensor(x, aval), triples, eqn.params["gram"])


def _form(b: Builder, eqn: Equation, *operands: Value) -> Sequence[Value]:
    form = functools.partial(OPERATIONS[eqn.primitive.name].form, **eqn.params)
    structs = [Struct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    jaxpr = jax.make_jaxpr(form)(*structs)
    return b.inline(jaxpr.jaxpr, jaxpr.consts, operands)
