"""Wrong words: a call that does not fit a chain or atom gets an error that says what to write instead.

`inspect` knows the names of a function's arguments, not what another library calls them. So its errors are replaced
here by ones that name the chain, the word, and the argument that was probably meant.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_BETAS = (("b1", "b2"), ("b1_base", "b2"), ("b1_base",), ("adam_b1", "adam_b2"))
_FIRST = (("b1",), ("b1_base",), ("beta",), ("decay",), ("momentum_beta",))
_EXCLUDE = (("exclude",), ("routing",))

OTHER_WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("lr", "rate", "step_size", "stepsize", "eta"), (("learning_rate",),)),
    "betas": _BETAS,
    **dict.fromkeys(("beta1", "beta_1", "b1", "momentum", "mu", "beta"), _FIRST),
    **dict.fromkeys(("beta2", "beta_2", "b2", "rho"), (("b2",), ("adam_b2",))),
    "adam_betas": (("adam_b1", "adam_b2"),),
    **dict.fromkeys(("epsilon", "delta"), (("eps",),)),
    **dict.fromkeys(("wd", "l2", "decay", "decay_rate", "weight_decay_rate"), (("weight_decay",),)),
    **dict.fromkeys(("wd_mask", "weight_decay_mask"), (("mask",), ("decay_mask",))),
    **dict.fromkeys(
        ("exclude", "exclude_layers", "exclude_params", "exclude_embeddings"), _EXCLUDE
    ),
    **dict.fromkeys(("ns_coeffs", "ns_coefficients"), (("coefficients",),)),
    **dict.fromkeys(("optimizer", "base_optimizer", "base", "inner_optimizer"), (("inner",),)),
    **dict.fromkeys(("exp_avg_dtype", "momentum_dtype"), (("mu_dtype",), ("state_dtype",))),
    "exp_avg_sq_dtype": (("nu_dtype",),),
    "use_nesterov": (("nesterov",),),
    "muon_beta": (("beta",),),
    "adam_lr": (("adam_lr_ratio",),),
}
"""What torch, Keras, optax and the reference repositories call an argument -> what it may be called here. Each choice
is a tuple of names; the first whose names the function has is suggested."""

_HINTS = {"routing": " (a `Routing(exclude=...)`)"}


Words = Mapping[str, tuple[tuple[str, ...], ...]]


def suggestion(word: str, names: list[str], words: Words = OTHER_WORDS) -> tuple[str, ...]:
    """The arguments among `names` that `word` probably means, or none.

    >>> suggestion("betas", ["learning_rate", "b1", "b2"]), suggestion("learning_rat", ["learning_rate"])
    (('b1', 'b2'), ('learning_rate',))
    >>> suggestion("fused", ["learning_rate", "b1", "b2"])
    ()
    """
    for choice in words.get(word.lower(), ()):
        if set(choice) <= set(names):
            return choice
    return tuple(difflib.get_close_matches(word.lower(), names, 1, 0.7))


def _quoted(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)


def bind(
    owner: str,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    words: Words = OTHER_WORDS,
) -> inspect.BoundArguments:
    """`signature.bind`, whose errors say what to write instead.

    Args:
      owner: the chain or atom that is called, for the messages.
      signature: what it takes.
      args: what it was given by position.
      kwargs: what it was given by name.
      words: what others call an argument.

    Raises:
      TypeError: a name that it does not have, too much by position, an argument given twice or not at all.

    >>> bind("adam", inspect.signature(lambda learning_rate=1e-3, *, eps=1e-8: None), (), {"lr": 0.1})
    Traceback (most recent call last):
      ...
    TypeError: adam: no argument `lr`; did you mean `learning_rate`?
    """
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        mistake = _mistake(signature, args, kwargs, words) or str(error)
    raise TypeError(f"{owner}: {mistake}") from None


def _mistake(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any], words: Words
) -> str:
    parameters = signature.parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    for word in kwargs:
        if word not in names:
            meant = suggestion(word, names, words)
            if not meant:
                return f"no argument `{word}`; it takes {_quoted(names)}"
            named = " and ".join(f"`{name}`{_HINTS.get(name, '')}" for name in meant)
            return f"no argument `{word}`; did you mean {named}?"
    if len(args) > len(places):
        rest = _quoted(name for name in names if name not in places)
        taken = _quoted(places) or "nothing"
        return f"takes {taken} by position, got {len(args)} arguments; give by name what is meant of {rest}"
    for name in places[: len(args)]:
        if name in kwargs:
            return f"`{name}` is given twice, by position and by name"
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in kwargs]
    missing = [name for name in missing if name not in places[: len(args)]]
    return f"needs {_quoted(missing)}" if missing else ""


def checked_words(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates an atom: a call that does not fit it raises the errors of `bind`.

    >>> @checked_words
    ... def atom(b1=0.9, *, eps=1e-8):
    ...     return b1, eps
    >>> atom(0.5, epsilon=1e-6)
    Traceback (most recent call last):
      ...
    TypeError: atom: no argument `epsilon`; did you mean `eps`?
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except TypeError:
            bind(function.__name__, signature, args, kwargs)
            raise

    return checked
