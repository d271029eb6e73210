"""Random chains on random trees, and what must hold of every one of them.

A `Composition` prints as the Python that makes it, so that a failure can be kept as a case as it is printed.
"""

import copy
import functools
import io
import pathlib
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from hypothesis import strategies as st

import chainrule
from chainrule import TorchBridge, transforms
from chainrule.bridges.lowering import LoweringError, to_jax, to_torch
from chainrule.bridges.step.settled import StateChanges
from harness import signature_of
from optax_cases import TRANSFORMS, VARIANTS, WRAPPERS
from registry import ATOMS
from roundings import PROBES, half, moved, spreads, too_far

# Few of them: eager JAX compiles every operation for every shape and dtype that it meets.
SHAPES = [(), (0,), (1,), (3, 2), (2, 3, 2)]
HALF_OR_FULL = ["float32", "bfloat16", "float16"]
DTYPES = [*HALF_OR_FULL, "float64"]

LEFT_OUT = {
    # Makes vectors of scalars.
    "optax.scale_by_distance_over_gradients",
    # `update` adds entries to their state, which no loop in JAX and no bridge can take.
    "optax.monitor",
    "optax.measure_with_ema",
    "optax.snapshot",
    # Says that it is `inject_hyperparams` under an old name.
    "optax.inject_stateful_hyperparams",
}


class Link(NamedTuple):
    """One transformation that can be drawn."""

    make: Callable[[], optax.GradientTransformation]
    ours: bool


def _ours() -> Iterator[tuple[str, Link]]:
    for case in ATOMS:
        if case.name == "compensated":
            continue  # one more link changes all draws; then `FAR_IF_COMPILED` of the tests was drawn
        for index, setting in enumerate(case.settings):
            if setting.get("coefficients") in ("aol", "cans"):
                continue  # likewise
            yield f"{case.name}-{index}", Link(functools.partial(case.make, setting), True)
    # Without the link that they need beside them: a neighbour may be the one.
    for case in ATOMS:
        if case.alone is not None:
            yield f"{case.name}, alone", Link(case.alone, True)
    yield "adaptive_beta1, alone", Link(transforms.adaptive_beta1, True)
    yield "scale_by_adam, b1=None", Link(lambda: transforms.scale_by_adam(b1=None), True)


def _optax() -> Iterator[tuple[str, Link]]:
    for case in (*TRANSFORMS, *VARIANTS, *WRAPPERS):
        if not (case.loss or case.batch or case.name in LEFT_OUT):
            yield case.name, Link(case.make, False)


LINKS: dict[str, Link] = dict([*_ours(), *_optax()])

Leaf = tuple[tuple[int, ...], str]


class Composition(NamedTuple):
    """A chain by the names of its links, and the parameters that it runs on."""

    links: tuple[str, ...]
    tree: dict[str, Leaf | None]
    stock: bool = False
    """Chained by `optax.chain` instead of `chainrule.chain`."""
    named: bool = True
    """The parameters are a dict, else a list."""
    seed: int = 0
    before: int = 0
    """Steps that JAX makes before the one that is looked at."""
    fresh: bool = True
    """A state dict is loaded into a bridge of its own, which costs another trace, else into the one that saved it."""

    def make(self) -> optax.GradientTransformationExtraArgs:
        chain = optax.chain if self.stock else chainrule.chain
        return chain(*(LINKS[name].make() for name in self.links))

    @property
    def dtypes(self) -> set[str]:
        return {leaf[1] for leaf in self.tree.values() if leaf}

    @property
    def eps(self) -> float:
        """A unit in the last place of 1 in the coarsest of the dtypes: a chain may couple the leaves.

        At least float32's, in which hyperparameters and numbers made from them are.
        """
        return max(float(jnp.finfo(dtype).eps) for dtype in self.dtypes | {"float32"})

    def wide(self) -> Any:
        """JAX has float64 only where it is enabled."""
        return jax.enable_x64("float64" in self.dtypes)

    def values(self, seed: int) -> Any:
        """Leaves of every scale, some of their entries 0."""
        rng = np.random.default_rng([self.seed, seed])

        def leaf(shape: tuple[int, ...], dtype: str) -> jax.Array:
            x = rng.normal(size=shape) * 10.0 ** rng.integers(-2, 2)
            return jnp.asarray(np.where(rng.random(shape) < 0.1, 0.0, x), dtype)

        with self.wide():
            tree = {name: spec and leaf(*spec) for name, spec in self.tree.items()}
        return tree if self.named else list(tree.values())


@st.composite
def compositions(draw: st.DrawFn, links: Sequence[str] = tuple(LINKS)) -> Composition:
    """Chains of these links."""
    # Ours and optax's alike often, though optax has more.
    ours = st.sampled_from([name for name in links if LINKS[name].ours])
    theirs = st.sampled_from([name for name in links if not LINKS[name].ours])
    dtypes = draw(st.sampled_from([*([dtype] for dtype in DTYPES), HALF_OR_FULL, DTYPES]))
    leaf = st.tuples(st.sampled_from(SHAPES), st.sampled_from(dtypes))
    holes = draw(st.sampled_from([False, False, False, True]))
    leaves = _drawn(draw, st.one_of(st.none(), leaf) if holes else leaf, 3)
    return Composition(
        links=tuple(_drawn(draw, st.one_of(ours, theirs), 5)),
        tree=dict(zip("bac", leaves, strict=False)),  # not as JAX sorts them
        stock=draw(st.booleans()),
        named=draw(st.booleans()),
        seed=draw(st.integers(0, 9)),
        before=draw(st.sampled_from([0, 1, 3])),
        fresh=draw(st.sampled_from([False, False, False, True])),
    )


def _drawn(draw: st.DrawFn, elements: Any, most: int) -> list[Any]:
    """Every length alike often, where a strategy of lists would prefer the short ones."""
    length = draw(st.integers(1, most))
    return draw(st.lists(elements, min_size=length, max_size=length))


# ---- errors --------------------------------------------------------------------------------

_OURS = str(pathlib.Path(chainrule.__file__).parent)
_OPTAX = str(pathlib.Path(optax.__file__).parent)
_NAMES_SOMETHING = re.compile(r"^\w+: .{20}|`\w+`")


def documented(error: Exception) -> bool:
    """Whether `error` is one that a user is meant to see.

    Ours is a `TypeError` or `ValueError` by a `raise` of ours, whose message begins with who raises it or names a thing
    in backticks. Optax's is raised in optax or below, and only `chain`, which hands through, called it: an atom of ours
    answers for what it calls.
    """
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    ours = max((i for i, file in enumerate(files) if file.startswith(_OURS)), default=-1)
    theirs = max((i for i, file in enumerate(files) if file.startswith(_OPTAX)), default=-1)
    if theirs > ours:
        return ours < 0 or files[ours].endswith("/_chain.py")
    raised = ours == len(files) - 1 and isinstance(error, (TypeError, ValueError))
    return raised and _NAMES_SOMETHING.search(str(error)) is not None


def outcome(work: Callable[[], Any]) -> Any:
    """What `work` returns, or None if it raises an error that is documented."""
    try:
        return work()
    except Exception as error:
        if not documented(error):
            raise
        return None


# ---- JAX -----------------------------------------------------------------------------------


class Step(NamedTuple):
    """One update in JAX: what it was given, and what came of it op by op and in one program."""

    grads: Any
    state: Any
    """Before `retier`, which a bridge calls by itself."""
    params: Any
    retiered: Any
    eager: Any
    jitted: Any
    spread: list[float]


def run_jax(composition: Composition) -> Step | None:
    """The update after `composition.before` others; None if an error is documented."""
    with composition.wide():
        tx, params = composition.make(), composition.values(0)

        def update(grads: Any, state: Any, params: Any) -> Any:
            updates, state = tx.update(grads, state, params, grad=grads, value=jnp.float32(1.0))
            return optax.apply_updates(params, updates), state

        def given(index: int) -> Any:
            grads = composition.values(index + 1)
            return grads, chainrule.retier(state, grads, params), params

        jitted = jax.jit(update)
        state = outcome(lambda: tx.init(params))
        if state is None:
            return None
        try:
            result = jitted(*given(0))
        except Exception:  # as without jit, where the traceback says whose it is
            if outcome(lambda: update(*given(0))) is None:
                return None
            raise
        for index in range(1, composition.before + 1):
            params, state = result
            result = jitted(*given(index))
        grads, retiered, _ = inputs = given(composition.before)
        spread = spreads(result, [jitted(*moved(inputs, seed)) for seed in range(PROBES)])
        return Step(grads, state, params, retiered, update(*inputs), result, spread)


def check_jax(composition: Composition, step: Step) -> None:
    """jit equals eager; the state keeps its structure, and that of our links its dtypes too."""
    far = too_far(step.eager, step.jitted, step.spread, composition.eps)
    # One program keeps float32 between half-precision operations, and so may be the only one to stay finite; what is
    # not finite decides what our links keep.
    if not (half(composition.eps) and np.inf in far.values()):
        assert not far, far
    params, state = step.jitted
    assert signature_of(params) == signature_of(step.params)
    assert jax.tree.structure(state) == jax.tree.structure(step.retiered)
    for name, old, new in zip(composition.links, step.retiered, state, strict=True):
        assert not LINKS[name].ours or signature_of(new) == signature_of(old), name
    chainrule.metrics(state)
    chainrule.hyperparams(state)


# ---- the torch bridge ----------------------------------------------------------------------


def entries(composition: Composition, tree: Any) -> list[Any]:
    """The leaves of a tree like the parameters in the order of the parameter group; JAX sorts them by name."""
    return [tree[name] for name in composition.tree] if composition.named else tree


def bridge_of(composition: Composition, **options: Any) -> TorchBridge:
    tree = composition.values(0)
    tensors = [torch.nn.Parameter(to_torch(x)) for x in entries(composition, tree)]
    params = zip(tree, tensors, strict=True) if composition.named else tensors
    return TorchBridge(composition.make(), params, **options)


def params_of(bridge: TorchBridge) -> list[torch.Tensor]:
    return bridge.param_groups[0]["params"]


def put(values: list[torch.Tensor], bridge: TorchBridge) -> None:
    for p, value in zip(params_of(bridge), values, strict=True):
        p.data.copy_(value)


def move(grads: list[Any], bridge: TorchBridge) -> None:
    """One step with these gradients and a loss of 1."""
    for p, grad in zip(params_of(bridge), grads, strict=True):
        p.grad = to_torch(grad)
    bridge.step(lambda: 1.0)


def taken(composition: Composition, bridge: TorchBridge) -> Any:
    """Parameters and state as JAX has them."""
    with composition.wide():
        values = [to_jax(p) for p in params_of(bridge)]
    tree = dict(zip(composition.tree, values, strict=True)) if composition.named else values
    return tree, bridge.jax_state()


# By a bridge, not by JAX: b2 = 0.999 is 1 in bfloat16; two states that would each move tensors.
REFUSED = re.compile(r"hyperparam_dtype|holds two tiered states")


def check_bridge(composition: Composition, step: Step, **options: Any) -> None:
    """From JAX's state a step ends where one of JAX's two ways of running it ends, and the next is made to the bit."""
    if None in composition.tree.values():
        return  # torch has no such parameters
    try:
        bridge = bridge_of(composition, **options)
    except (StateChanges, ValueError) as error:
        assert isinstance(error, StateChanges) or REFUSED.search(str(error))
        return
    except LoweringError as error:  # 64 random bits for a float64
        assert "uint64" in str(error) and 'engine="xla"' in str(error)
        options = {"engine": "xla"}
        bridge = bridge_of(composition, **options)
    put([to_torch(x) for x in entries(composition, step.params)], bridge)
    bridge.load_jax_state(step.state)
    grads = entries(composition, step.grads)
    move(grads, bridge)
    got = taken(composition, bridge)
    # Some of optax's promote their state in mixed trees from one step to the next; a bridge keeps it as it settles.
    if signature_of(step.jitted[1]) == signature_of(step.retiered):
        eager, jitted = (
            too_far(got, want, step.spread, composition.eps) for want in (step.eager, step.jitted)
        )
        far = {where: times for where, times in eager.items() if where in jitted}
        assert not far, far
    check_resumed(composition, bridge, grads, **options)


def check_resumed(
    composition: Composition, bridge: TorchBridge, grads: list[Any], **options: Any
) -> None:
    """From a state dict that went through a file a step is made again bit for bit."""
    file = io.BytesIO()
    torch.save((bridge.state_dict(), [p.detach() for p in params_of(bridge)]), file)
    move(grads, bridge)
    want = copy.deepcopy((bridge.state_dict(), params_of(bridge)))
    file.seek(0)
    state, params = torch.load(file, weights_only=True)
    resumed = bridge_of(composition, **options) if composition.fresh else bridge
    put(params, resumed)
    resumed.load_state_dict(state)
    move(grads, resumed)
    got = resumed.state_dict(), params_of(resumed)
    assert got[0].pop("param_groups") == want[0].pop("param_groups")
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
