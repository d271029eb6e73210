"""Hyperparameters that live in the state: float32 arrays by name, set between steps without a recompile."""

import functools
import inspect
import numbers
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.transforms._checks import check_bounds, check_link, check_params
from chainrule.transforms._numerics import increment
from chainrule.transforms._protocols import Tree, has_hyperparams, is_state, typed
from chainrule.transforms._trees import where_updated
from chainrule.transforms._words import bind


class LiveState(NamedTuple):
    """State of a chain with live hyperparameters; read and set them with `hyperparams` and
    `set_hyperparams`."""

    count: jax.Array
    """int32 scalar: updates made, the argument of schedules."""
    hyperparams: dict[str, jax.Array]
    """Each numeric argument of the chain by name, float32 (a schedule: its value at the last update)."""
    inner_state: optax.OptState
    """The state of the links."""
    given: dict[str, jax.Array] = {}  # noqa: RUF012 -- never written; states pickled without it load
    """float32: the arrays that the chain was last built with, each as `"given_" + name`; else empty."""


_GIVEN = "given_"  # not the bare name, which `optax.tree.get` would find twice
_DECAYS = {"weight_decay", "adam_weight_decay"}


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Real, np.ndarray, jax.Array)) and not isinstance(value, bool)


def live(
    *, static: tuple[str, ...] = ()
) -> Callable[
    [Callable[..., optax.GradientTransformation]],
    Callable[..., optax.GradientTransformationExtraArgs],
]:
    """Makes every numeric argument of a chain live: held in the state as float32, whatever the
    parameters' dtype.

    A number or array becomes an entry of `LiveState.hyperparams`; a callable is a schedule, called
    with the number of updates made before this one, and overrides the entry. A `jax.Array` is an
    entry too, which its caller may also change by building the chain anew with another array
    (`optax.inject_hyperparams` does at every update): whoever changed it last counts, the caller or
    `set_hyperparams`. Everything else (`None`, strings, booleans, and what `static` names) is
    structure, fixed at construction. The chain is built once at construction, so that its atoms
    check their bounds there, and again while tracing, with the arrays of the state for arguments.
    The final updates are cast to the dtype of the gradients.

    Where all arguments are given by name and every number as an array, as `optax.inject_hyperparams` gives them, they
    belong to the caller: `LiveState.hyperparams` is empty.

    A weight decay that is given as the number 0 asks for no parameters: an update without them
    leaves the decay out. If it is set to another number later, such an update is an error; under
    `jit`, where a number cannot be looked at, it goes on without the decay.

    Args:
      static: names of arguments that are structure although they are numbers or callables (a number
        of iterations, the length of a buffer, an inner chain, a predicate).

    Returns:
      A decorator for functions that return a gradient transformation.

    >>> @live(static=("nesterov",))
    ... def sgd(learning_rate=0.1, decay=0.9, nesterov=False):
    ...     return optax.chain(optax.trace(decay, nesterov), optax.scale_by_learning_rate(learning_rate))
    >>> state = sgd().init(jnp.ones(2))
    >>> sorted(state.hyperparams)
    ['decay', 'learning_rate']
    >>> set_hyperparams(state, learning_rate=1.0).hyperparams["learning_rate"].item()
    1.0
    """

    def decorate(
        factory: Callable[..., optax.GradientTransformation],
    ) -> Callable[..., optax.GradientTransformationExtraArgs]:
        signature, owner = inspect.signature(factory), factory.__name__
        unknown = set(static) - set(signature.parameters)
        assert not unknown, f"{owner} has no arguments {unknown}"

        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
            bound = bind(owner, signature, args, kwargs)
            bound.apply_defaults()
            numeric, schedules, structure = {}, {}, {}
            for name, value in bound.arguments.items():
                if name in static:
                    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.number):
                        raise TypeError(
                            f"{owner}: `{name}` is structure and cannot be an array, which "
                            f"`optax.inject_hyperparams` makes of it; the numbers of `{owner}` are live without it "
                            f"(`chainrule.set_hyperparams`), or give it static_args={static}"
                        )
                    structure[name] = value
                elif callable(value):
                    schedules[name] = value
                elif _is_number(value):
                    numeric[name] = value
                else:
                    structure[name] = value
            check_bounds(owner, **bound.arguments)
            if "inner" in bound.arguments:
                check_link(owner, "inner", bound.arguments["inner"])
            # So `optax.inject_hyperparams` calls it, whose own state holds the numbers; held here too, `optax.tree.get`
            # would find each twice.
            ruled = set(kwargs) == set(signature.parameters) and all(
                isinstance(value, jax.Array) for value in numeric.values()
            )
            # Built here once for the errors; a schedule is not evaluated until there is a count.
            factory(**structure, **numeric, **{name: jnp.float32(0.5) for name in schedules})

            def init(params: Tree) -> LiveState:
                check_params(owner, params, only_arrays=False)
                count = jnp.zeros((), jnp.int32)
                # Copies: a state may be donated, and an array is its caller's.
                values = {name: jnp.array(value, jnp.float32) for name, value in numeric.items()}
                given = {
                    _GIVEN + name: jnp.array(value, jnp.float32)
                    for name, value in numeric.items()
                    if isinstance(value, jax.Array)
                }
                values |= {
                    name: jnp.asarray(schedule(count), jnp.float32)
                    for name, schedule in schedules.items()
                }
                # The numbers as they were given, not as arrays: a default may derive a shape from one.
                links = factory(**structure, **(values | numeric))
                if ruled:
                    values, given = {}, {}
                return LiveState(count, values, links.init(params), given)

            def update(
                updates: Tree, state: LiveState, params: Tree = None, **extra_args: Any
            ) -> tuple[Tree, LiveState]:
                params = _matched(owner, updates, params)
                values, given = _latest(state, {} if ruled else numeric)
                for name, schedule in schedules.items():
                    values[name] = jnp.asarray(schedule(state.count), jnp.float32)
                taken = values if params is not None else _without_decay(owner, values, numeric)
                links = factory(**structure, **(numeric if ruled else taken))
                links = optax.with_extra_args_support(links)
                new, inner_state = links.update(updates, state.inner_state, params, **extra_args)
                new = jax.tree.map(lambda n, u: n.astype(jnp.result_type(u)), new, updates)
                inner_state = jax.tree.map(_in_dtype_of, state.inner_state, inner_state)
                return new, LiveState(increment(state.count), values, inner_state, given)

            return optax.GradientTransformationExtraArgs(*typed(init, update))

        return make

    return decorate


def _latest(state: LiveState, numeric: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The hyperparameters of this update, and the arrays to remember as given."""
    values, given = dict(state.hyperparams), dict(state.given)
    for name, value in numeric.items():
        if not isinstance(value, jax.Array):
            continue
        value, key = jnp.asarray(value, jnp.float32), _GIVEN + name
        if key in given:
            # The entry counts where it was set and the caller still gives the array that it gave before. Where both
            # agree the caller's is taken, so that gradients with respect to it are right.
            was_set = (value == given[key]) & (values[name] != given[key])
            values[name], given[key] = jnp.where(was_set, values[name], value), value
        else:  # built with a number and then with an array: a live chain around this one does that
            values[name] = value
    return values, given


def _without_decay(
    owner: str, values: dict[str, Any], numeric: Mapping[str, Any]
) -> dict[str, Any]:
    """`values` for an update without parameters: decays that were given as 0 are the number 0, of which links know that
    it needs none."""
    values = dict(values)
    for name in _DECAYS & values.keys():
        if isinstance(numeric.get(name), jax.Array) or numeric.get(name) != 0:
            continue
        if not isinstance(values[name], jax.core.Tracer) and jnp.any(values[name] != 0):
            raise ValueError(
                f"{owner}: `{name}` was set to {values[name]} and needs the parameters; call "
                "`update(updates, state, params)`"
            )
        values[name] = 0.0
    return values


def _in_dtype_of(old: Any, new: Any) -> Any:
    # Many of optax's links widen their state at the first update of a mix of dtypes, for a second compile. Keys of
    # `jax.random`, which have no `astype`, keep their dtype.
    return (
        new if jax.typeof(new).dtype == jax.typeof(old).dtype else new.astype(jax.typeof(old).dtype)
    )


def _matched(owner: str, updates: Any, params: Any) -> Any:
    """`params` where there are updates, which must be in their shapes."""
    if params is None:
        return None
    got, expected = jax.tree.structure(updates), jax.tree.structure(params)
    if got != expected:
        params = where_updated(updates, params)
    if got != jax.tree.structure(params):
        raise ValueError(
            f"{owner}: the gradients must have the structure of the parameters, {expected}, got {got}"
        )
    pairs = zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True)
    for (path, update), param in pairs:
        if jnp.shape(update) != jnp.shape(param):
            raise ValueError(
                f"{owner}: the gradient of {jax.tree_util.keystr(path) or 'the parameter'} has shape "
                f"{jnp.shape(update)}, the parameter has shape {jnp.shape(param)}"
            )
    return params


def _owners(state: Any, path: str = "") -> list[tuple[str, Mapping[str, Any]]]:
    """The states with a field `hyperparams` inside `state`, outermost first, each with its path."""
    found = []
    fields: Any = ()
    if is_state(state):
        fields = state._asdict().items()
        if has_hyperparams(state):
            found.append((path, state.hyperparams))
    elif isinstance(state, Mapping):
        fields = state.items()
    elif isinstance(state, (tuple, list)):
        fields = enumerate(state)
    for name, child in fields:
        found += _owners(child, f"{path}.{name}" if path else str(name))
    return found


def _names(state: Any) -> dict[str, tuple[str, str]]:
    """Public name of every live hyperparameter -> (path of its owner, its key there)."""
    owners = _owners(state)
    keys = [key for _, values in owners for key in values]
    return {
        (key if keys.count(key) == 1 or not path else f"{path}.{key}"): (path, key)
        for path, values in owners
        for key in values
    }


def hyperparams(state: optax.OptState) -> dict[str, jax.Array]:
    """The live hyperparameters in `state`, by name.

    Args:
      state: the state of any gradient transformation; those of `optax.inject_hyperparams` count
        too.

    Returns:
      A dict from name to scalar array. A name that two nested chains share is the outermost one's;
      the inner one's is
      preceded by the path of its state, as in `"inner_state.0.learning_rate"`.

    >>> import chainrule
    >>> state = chainrule.chains.adam(learning_rate=0.01).init(jnp.ones(2))
    >>> round(float(hyperparams(state)["learning_rate"]), 6)
    0.01
    """
    owners = dict(_owners(state))
    return {name: owners[path][key] for name, (path, key) in _names(state).items()}


def set_hyperparams(state: optax.OptState, **values: Any) -> Any:
    """A copy of `state` with live hyperparameters set; the compiled step is reused as it is.

    A hyperparameter that was given as a schedule is overwritten by it at the next update; one that was given as a
    `jax.Array`, when the chain is next built with another array.

    Args:
      state: the state of any gradient transformation.
      **values: numbers or scalar arrays by the names that `hyperparams` lists (`**{"0.b1": 0.8}`
        for a path).

    Returns:
      The new state, of the same structure, shapes and dtypes.

    Raises:
      KeyError: no hyperparameter has that name.
      ValueError: a number lies outside the bounds of its name, or has the wrong shape.

    >>> import chainrule
    >>> state = chainrule.chains.adam().init(jnp.ones(2))
    >>> set_hyperparams(state, b1=1.5)
    Traceback (most recent call last):
      ...
    ValueError: set_hyperparams: `b1` must be in [0, 1), got 1.5
    """
    names = _names(state)
    unknown = [name for name in values if name not in names]
    if unknown:
        raise KeyError(
            f"set_hyperparams: no hyperparameter {unknown[0]!r} in this state; it has {sorted(names)}"
        )
    check_bounds("set_hyperparams", **{names[name][1]: value for name, value in values.items()})
    for name, value in values.items():
        state = _replace(state, *names[name], name, value)
    return state


def _replace(state: Any, path: str, key: str, name: str, value: Any) -> Any:
    if path:
        kind = type(state)  # of anything: a checker then asks for no signature
        head, _, rest = path.partition(".")
        if is_state(state):
            child = _replace(getattr(state, head), rest, key, name, value)
            return state._replace(**{head: child})
        if isinstance(state, Mapping):
            index = next(k for k in state if str(k) == head)
            child = _replace(state[index], rest, key, name, value)
            return kind({**state, index: child})
        children = list(state)
        children[int(head)] = _replace(children[int(head)], rest, key, name, value)
        return kind(children)
    old = state.hyperparams[key]
    new = jnp.asarray(value, old.dtype)
    if new.shape != old.shape:
        raise ValueError(f"set_hyperparams: `{name}` has shape {old.shape}, got {new.shape}")
    return state._replace(hyperparams={**state.hyperparams, key: new})
