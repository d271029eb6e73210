"""Bounds of hyperparameters and checks of trees, shared by every atom and chain.

A hyperparameter's bounds belong to its name, not to the atom that takes it: `b1` is an EMA decay
everywhere. So the
bounds are one table, used at construction, by `set_hyperparams` and by the bridges' parameter groups.
"""

import math
import numbers
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.transforms._sharding import alike

_T = TypeVar("_T")


class Interval(NamedTuple):
    """The values from `low` to `high`; an end that is open is not itself a value."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, (int, float))
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        high = "inf" if math.isinf(self.high) else f"{self.high:g}"
        low = "-inf" if math.isinf(self.low) else f"{self.low:g}"
        return f"{'(' if self.open_low else '['}{low}, {high}{')' if self.open_high else ']'}"


_DECAY = Interval(0.0, 1.0, open_high=True)
_FRACTION = Interval(0.0, 1.0)
_NON_NEGATIVE = Interval(0.0, math.inf, open_high=True)
_POSITIVE = Interval(0.0, math.inf, open_low=True, open_high=True)
_AT_LEAST_ONE = Interval(1, math.inf, open_high=True)

BOUNDS: dict[str, Interval] = {
    "learning_rate": _NON_NEGATIVE,
    "adam_lr_ratio": _NON_NEGATIVE,
    "adam_b1": _DECAY,
    "adam_b2": _DECAY,
    "adam_eps": _NON_NEGATIVE,
    "adam_weight_decay": _NON_NEGATIVE,
    "b1": _DECAY,
    "b1_long": _DECAY,
    "b2": _DECAY,
    "blend": _FRACTION,
    "gate_min_scale": Interval(0.0, 1.0, open_low=True),
    "gate_tier_max": Interval(-1, math.inf, open_high=True),
    "gate_update_interval": _AT_LEAST_ONE,
    "gate_warmup_steps": _NON_NEGATIVE,
    "min_lr_scale": _FRACTION,
    "min_scale": Interval(0.0, 1.0, open_low=True),
    "tier_max": Interval(-1, math.inf, open_high=True),
    "tier_scale": _NON_NEGATIVE,
    "update_interval": _AT_LEAST_ONE,
    "warmup_steps": _NON_NEGATIVE,
    "b1_base": Interval(0.5, 1.0, open_high=True),
    "beta": _DECAY,
    "decay": _DECAY,
    "eps": _NON_NEGATIVE,
    "eps_root": _NON_NEGATIVE,
    "debias_eps": _NON_NEGATIVE,
    "max_abs": _POSITIVE,
    "mean_floor": Interval(0.0, 1.0, open_low=True),
    "ns_eps": _NON_NEGATIVE,
    "ns_steps": Interval(1, 100, open_high=True),
    "scale_factor": _POSITIVE,
    "steps": Interval(1, 100, open_high=True),
    "weight_decay": _NON_NEGATIVE,
    "alpha": _DECAY,
    "lamb": _NON_NEGATIVE,
    "window_size": _AT_LEAST_ONE,
    "rtol": _NON_NEGATIVE,
    "mask_prob": _FRACTION,
    "tau": _POSITIVE,
    "alignment_ema": _DECAY,
    "momentum_beta": _DECAY,
    "init_alignment": _FRACTION,
    "adapt_strength": Interval(0.0, 0.5),
    "tau_decay": _DECAY,
    "moment_decay": _DECAY,
    "fallback_threshold": _POSITIVE,
    "b1_update_interval": _AT_LEAST_ONE,
    "tau_init_steps": _AT_LEAST_ONE,
    "c_min": _FRACTION,
    "clamp_factor": _POSITIVE,
    "agar_clamp_factor": _POSITIVE,
    "agar_eps": _NON_NEGATIVE,
    "robustness": _NON_NEGATIVE,
    "rel_floor": _FRACTION,
}
"""Bounds by hyperparameter name. A name that is absent here takes any finite number."""


def check_bounds(owner: str, **values: Any) -> None:
    """Raises `ValueError` if a Python or NumPy number lies outside the bounds of its name.

    Arrays of JAX and tracers pass: looking at their value would wait for the device or fail under `jit`.

    Args:
      owner: the atom, chain or function that took the arguments, for the message.
      **values: the arguments by name; `None`, strings, callables, JAX arrays pass.

    >>> check_bounds("scale_by_adam", b1=0.9, eps=1e-8)
    >>> check_bounds("scale_by_adam", b1=1.5)
    Traceback (most recent call last):
      ...
    ValueError: scale_by_adam: `b1` must be in [0, 1), got 1.5
    """
    for name, value in values.items():
        if isinstance(value, np.ndarray) and value.ndim == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            continue
        bounds = BOUNDS.get(name, Interval(-math.inf, math.inf, True, True))
        if float(value) not in bounds:
            raise ValueError(f"{owner}: `{name}` must be in {bounds}, got {value}")


def check_choice(owner: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises `ValueError` if `value` is none of `choices`.

    >>> check_choice("cautious", "normalizer", "max", ("mean", "count"))
    Traceback (most recent call last):
      ...
    ValueError: cautious: `normalizer` must be one of 'mean', 'count', got 'max'
    """
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{owner}: `{name}` must be one of {listed}, got {value!r}")


def check_link(owner: str, argument: str, link: Any) -> None:
    """Raises `TypeError`, which says what to write, if `link` is no gradient transformation.

    >>> check_link("chain", "links[0]", optax.scale(0.1))
    >>> check_link("chain", "links[0]", optax.scale_by_adam)
    Traceback (most recent call last):
      ...
    TypeError: chain: `links[0]` must be a gradient transformation, got the function `scale_by_adam` itself; call it:
    `scale_by_adam(...)`
    """
    if hasattr(link, "init") and hasattr(link, "update"):
        return
    kind = type(link)
    if isinstance(link, (list, tuple)) or hasattr(link, "__next__"):
        got = f"a {kind.__name__}; make one of its links: `chainrule.chain(*links)`"
    elif hasattr(link, "param_groups"):
        got = (
            f"the torch optimizer {kind.__name__}; give a chain, such as `chainrule.chains.adam()` or "
            "`optax.sgd(0.1)`, and drive the parameters with `chainrule.TorchBridge(chain, model.parameters())`"
        )
    elif callable(link):
        name = getattr(link, "__name__", kind.__name__)
        got = f"the function `{name}` itself; call it: `{name}(...)`"
    elif link is None:
        got = "None; the link that does nothing is `optax.identity()`"
    else:
        got = f"{link!r}; give an atom, a chain or any transformation of optax"
    raise TypeError(f"{owner}: `{argument}` must be a gradient transformation, got {got}")


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (numbers.Number, np.generic)) or hasattr(leaf, "dtype")


def check_arrays(owner: str, params: optax.Params) -> None:
    """Raises `TypeError` if a leaf of `params` is no array: a model may hold functions among its leaves."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not _is_array(leaf):
            raise TypeError(
                f"{owner}: parameter {jax.tree_util.keystr(path) or 'tree'} is no array, got {leaf!r}; leave out what "
                "is not trained, as `equinox.filter(model, equinox.is_inexact_array)` or `optax.masked` do"
            )


def check_params(
    owner: str, params: optax.Params, *, real: bool = False, only_arrays: bool = True
) -> None:
    """Raises `TypeError` if a leaf of `params` is not floating point or complex (`real`: not
    floating point); what is no array passes without `only_arrays`."""
    allowed = jnp.floating if real else jnp.inexact
    if only_arrays:
        check_arrays(owner, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not _is_array(leaf):
            continue
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, allowed):
            raise TypeError(
                f"{owner}: parameter {jax.tree_util.keystr(path) or 'tree'} has dtype {dtype}, expected "
                f"{'a real' if real else 'a'} floating-point dtype; leave it out with `optax.masked` or "
                "`optax.partition`"
            )


def zeros_like(owner: str, params: optax.Params, dtype: Any = None) -> Any:
    """Zeros in the shapes of `params` and on their devices, in their dtypes or in `dtype`; integer leaves raise
    `TypeError`."""
    check_params(owner, params)
    return jax.tree.map(lambda p: alike(p, jnp.zeros_like(p, dtype=dtype)), params)


def require(owner: str, name: str, value: _T | None, remedy: str) -> _T:
    """Returns `value`, or raises `ValueError` naming the missing input and the remedies if it is `None`."""
    if value is None:
        raise ValueError(
            f"{owner}: needs `{name}`, which no earlier link of this chain provides; {remedy}"
        )
    return value


def require_params(owner: str, params: optax.Params | None) -> optax.Params:
    """Returns `params`, or raises `ValueError` if `update` was called without them."""
    if params is None:
        raise ValueError(f"{owner}: needs the parameters; call `update(updates, state, params)`")
    return params
