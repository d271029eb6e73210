"""The state of one library's optimizer as that of another's: see `convert_state`."""

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any

from chainrule.bridges.hub.layouts import laid_out, matched, shapes_of
from chainrule.bridges.hub.quantities import FORMS, Form, Quantities, factors

__all__ = ["convert_state"]

_FILES = {
    **dict.fromkeys(("torch", "bitsandbytes", "heavyball", "lion_pytorch"), "in_torch"),
    "optax": "in_optax",
    "keras": "in_keras",
}


def convert_state(
    state: Any,
    from_: str,
    to: str,
    params: Any,
    *,
    source: Any = None,
    names: Mapping[str, str] | Callable[[str], str] | None = None,
    layout: Mapping[str, Any] | None = None,
    like: Any = None,
    learning_rate: float | None = None,
    momentum: float | None = None,
    count: int | None = None,
) -> Any:
    """Converts the state of an optimizer between torch.optim, optax and Keras, and from bitsandbytes and HeavyBall.

    | family | forms |
    |---|---|
    | Adam | `adam`, `adamw`, `nadam` of `torch`, `optax` and `keras`; `torch.radam`, `optax.radam`, `optax.nadamw` |
    | Adamax | `torch.adamax`, `optax.adamax`, `keras.adamax` |
    | SGD with momentum | `torch.sgd`, `optax.sgd`, `keras.sgd` |
    | RMSprop | `torch.rmsprop`, `optax.rmsprop`, `keras.rmsprop` |
    | Lion | `optax.lion`, `keras.lion`, `lion_pytorch.lion` |
    | Adafactor | `torch.adafactor`, `optax.adafactor`, `keras.adafactor` |
    | Muon | `torch.muon`, `optax.muon`, `keras.muon` |
    | only from | `bitsandbytes.adam`, `adamw`, `lion`, each also `...8bit`; `heavyball.adamw` |

    What is converted: which average is which, the step count, sums and averages that one of the libraries keeps times
    the learning rate, the axes of kernels, Adafactor's factored axes. What is not part of a state is not: set the
    hyperparameters in the target. Where they stand matters: Keras adds Adam's epsilon before the bias correction and
    RMSprop's under the root, as optax does unless `eps_in_sqrt=False`. optax's NAdam holds its first decay constant;
    torch's and Keras' let it grow, and Keras' is torch's with `momentum_decay=1`. torch has no Lion:
    `lion_pytorch.lion` is that of the package lion-pytorch, whose state timm's has too; to write one takes `like`.

    *State.* torch, bitsandbytes: a `state_dict`. optax: a state. Keras: a built optimizer, its `variables`, or what
    `save_own_variables` wrote; the result is for `load_own_variables`.

    *Layout.* A parameter whose name ends in `kernel` on one side only is (*window, in, out) there and
    (out, in, *window) on the other.

    Args:
      state: of the optimizer.
      from_: its form.
      to: the form that is wanted.
      params: the parameters of the target: a module, named parameters, variables of Keras, or a tree.
      source: those of the state, in its order; default `params`.
      names: name in the target -> in the source, where they differ.
      layout: name in the target -> the axes of the source's array in its order, where that is not the rule above.
      like: a state of the target, or its optimizer: what is not said by the state (hyperparameters of torch, links of a
        chain) is taken from it.
      learning_rate: where a library keeps something times it, or in its state; default that of the state.
      momentum: of `keras.muon`, which keeps a sum.
      count: the number of steps made, where the state does not say it.

    Returns:
      The state; `state` itself is not changed.

    Raises:
      ValueError: an unknown form; two families; a quantity, parameter or shape that has no equal; a number that is
        needed.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.ones(2)}
    >>> tx = optax.sgd(0.5, momentum=0.9)
    >>> _, state = tx.update({"w": jnp.array([1.0, 2.0])}, tx.init(params))
    >>> convert_state(state, "optax.sgd", "keras.sgd", params, learning_rate=0.5, count=1)["2"]
    array([-0.5, -1. ], dtype=float32)
    """
    one, other = _form(from_), _form(to)
    if one.family != other.family:
        raise ValueError(
            f"convert_state: {from_} is of the family {one.family}, {to} of {other.family}; they do not keep the same "
            "quantities"
        )
    target = shapes_of(params)
    shapes = target if source is None else shapes_of(source)
    found: Quantities = _file(from_).read(state, one, from_, shapes)
    if learning_rate is not None:
        found.rate = learning_rate
    found.count = count if found.count is None else found.count
    _scale(found, factors(from_, _kept(one, found), found.rate, momentum), inverse=True)
    of = {name for quantity in found.values.values() for name in quantity}
    pairs = matched(target, [name for name in shapes if name in of] or sorted(of), names)
    found = laid_out(found, target, pairs, layout or {})
    _scale(found, factors(to, _kept(other, found), found.rate, momentum), inverse=False)
    extra = {"params": params} if to.startswith("optax.") else {}
    return _file(to).write(found, other, to, target, like, **extra)


def _form(name: str) -> Form:
    if name not in FORMS:
        raise ValueError(f"convert_state: no form {name!r}; there are {', '.join(FORMS)}")
    return FORMS[name]


def _file(name: str) -> Any:
    return importlib.import_module(f"chainrule.bridges.hub.{_FILES[name.partition('.')[0]]}")


def _kept(form: Form, found: Quantities) -> Form:
    """The form without the scales of what is not there."""
    scaled = {quantity: by for quantity, by in form.scaled.items() if quantity in found.values}
    return dataclasses.replace(form, scaled=scaled)


def _scale(found: Quantities, by: Mapping[str, float], *, inverse: bool) -> None:
    for quantity, factor in by.items():
        of = found.values[quantity]
        factor = 1 / factor if inverse else factor
        found.values[quantity] = {n: (x * factor).astype(x.dtype) for n, x in of.items()}
