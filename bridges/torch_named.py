"""Chains as classes of torch: torch's names for arguments, values that a configuration file can hold, pickles.

A class keeps nothing of its own: its chain is a `functools.partial` of public functions, so that copies, pickles and
state dicts are those of `TorchBridge`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import optax
import torch
from torch import Tensor

from chainrule import chains
from chainrule.bridges.checks import FLAGS
from chainrule.bridges.described import described
from chainrule.bridges.hyperparameters import pair
from chainrule.bridges.step.function import as_transformation
from chainrule.bridges.torch_docs import documented
from chainrule.bridges.torch_optim import TorchBridge
from chainrule.transforms._words import OTHER_WORDS, bind

PAIRS = {("b1", "b2"): "betas", ("b1_base", "b2"): "betas", ("adam_b1", "adam_b2"): "adam_betas"}
"""Two arguments of a chain -> what torch calls the pair."""
NAMES = {"learning_rate": "lr", "beta": "momentum", "rounding": "state_rounding"}
"""A chain's name for an argument -> torch's."""
FIRST = ("lr", "betas", "weight_decay")
"""What may be given by position, in this order, as to `torch.optim.AdamW`."""

_WRAP = "to put links around an optimizer of torch write `chainrule.TorchWrap(optimizer, before=..., after=...)`"

Maker = Callable[[], optax.GradientTransformation]
_Parameter = inspect.Parameter
_OF_BRIDGE = {
    "compile": _Parameter("compile", _Parameter.KEYWORD_ONLY, default=False, annotation=bool | str),
    "engine": _Parameter("engine", _Parameter.KEYWORD_ONLY, default="torch", annotation=str),
    "rounding": _Parameter("rounding", _Parameter.KEYWORD_ONLY, default=None, annotation=str | None),
}  # fmt: skip
_WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    **OTHER_WORDS,
    **dict.fromkeys(("learning_rate", "rate", "step_size", "eta"), (("lr",),)),
    **dict.fromkeys(("b1", "b2", "beta1", "beta2", "beta_1", "beta_2"), (("betas",), ("momentum",))),
    **dict.fromkeys(("beta", "mu", "muon_beta"), (("momentum",),)),
    **dict.fromkeys(("adam_b1", "adam_b2"), (("adam_betas",),)),
    **dict.fromkeys(("inner", "optimizer", "base_optimizer", "inner_optimizer"), (("base",),)),
    **dict.fromkeys(("routing", "exclude_layers", "exclude_params"), (("exclude",),)),
}  # fmt: skip


def _of_chain(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """A chain's arguments by torch's names."""
    rest = dict(inspect.signature(factory).parameters)
    found: dict[str, inspect.Parameter] = {}
    for (one, other), name in PAIRS.items():
        if {one, other} <= rest.keys():
            default = rest.pop(one).default, rest.pop(other).default
            kind = tuple[float, float | None] if name == "betas" else tuple[float, float]
            found[name] = _Parameter(
                name, _Parameter.KEYWORD_ONLY, default=default, annotation=kind
            )
    for old, parameter in rest.items():
        name = NAMES.get(old, old)
        kind = float | Callable[..., Any] if name == "lr" else parameter.annotation
        found[name] = parameter.replace(name=name, kind=_Parameter.KEYWORD_ONLY, annotation=kind)
    return found


class Named(TorchBridge):
    """A chain as a class; see `chainrule.torch_optimizers`."""

    chain_name: ClassVar[str]
    """Of `chainrule.chains`."""
    defaults: ClassVar[dict[str, Any]] = {}
    """What differs from the chain's own, by torch's names."""
    left_out: ClassVar[frozenset[str]] = frozenset()
    """The chain's arguments that the class decides."""
    added: ClassVar[dict[str, inspect.Parameter]] = {}
    """The class' own arguments."""
    told: ClassVar[dict[str, str]] = {}
    """What the docstring says of them."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "chain_name" not in cls.__dict__:
            return
        CLASSES[_plain_name(cls.__name__)] = cls

        def start(self: Any, *args: Any, **kwargs: Any) -> None:
            Named.__init__(self, *args, **kwargs)

        # Configuration tools read the signature of `__init__`, not of the class.
        own = _Parameter("self", _Parameter.POSITIONAL_OR_KEYWORD)
        signature = cls._signature()
        start.__signature__ = inspect.Signature([own, *signature.parameters.values()])  # pyright: ignore[reportFunctionMemberAccess]
        start.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        start.__name__, start.__qualname__ = "__init__", f"{cls.__qualname__}.__init__"
        cls.__init__ = start
        cls.__doc__ = documented(cls.__doc__ or "", cls.chain(), signature, cls.told, PAIRS, NAMES)

    def __init__(self, *args: Any, **kwargs: Any):
        cls = type(self)
        flags = {name: kwargs.pop(name) for name in FLAGS if name in kwargs}
        given = cls.bound(args, kwargs)
        if isinstance(given["params"], torch.optim.Optimizer):
            kind = type(given["params"]).__name__
            raise TypeError(
                f"{cls.__name__}: `params` must be parameters, got the optimizer {kind}; {_WRAP}"
            )
        of_bridge = {name: given.pop(name) for name in _OF_BRIDGE if name in given}
        params, given = cls.prepared(given.pop("params"), given)
        super().__init__(cls.maker(given), params, **of_bridge, **flags)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `TorchBridge.add_param_group`; the group's keys may have torch's names."""
        if isinstance(param_group, dict):
            known = _names_in(self._options.chain)
            for names, together in PAIRS.items():
                if names != ("b1", "b2") and known.issuperset(names) and together in param_group:
                    param_group |= dict(zip(names, pair(param_group.pop(together)), strict=True))
            if "beta" in known and "momentum" in param_group:
                param_group["beta"] = param_group.pop("momentum")
        super().add_param_group(param_group)

    @classmethod
    def chain(cls) -> Callable[..., Any]:
        """The function of `chainrule.chains` that makes the chain."""
        return getattr(chains, cls.chain_name)

    @classmethod
    def own(cls) -> dict[str, inspect.Parameter]:
        """The arguments beside `params` and the bridge's."""
        own = {n: p for n, p in _of_chain(cls.chain()).items() if n not in cls.left_out}
        own = {n: p.replace(default=cls.defaults.get(n, p.default)) for n, p in own.items()}
        first = {n: p for n, p in {**own, **cls.added}.items() if n in FIRST}
        first = {
            n: first[n].replace(kind=_Parameter.POSITIONAL_OR_KEYWORD) for n in FIRST if n in first
        }
        return {**first, **{n: p for n, p in {**cls.added, **own}.items() if n not in first}}

    @classmethod
    def _signature(cls) -> inspect.Signature:
        params = _Parameter("params", _Parameter.POSITIONAL_OR_KEYWORD, annotation=Any)
        return inspect.Signature([params, *{**cls.own(), **_OF_BRIDGE}.values()])

    @classmethod
    def bound(cls, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that were given, by name."""
        return bind(cls.__name__, cls._signature(), args, kwargs, _WORDS).arguments

    @classmethod
    def prepared(cls, params: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Parameters and arguments, after those that are no arguments of the chain are used up."""
        return params, given

    @classmethod
    def maker(cls, given: Mapping[str, Any]) -> Maker:
        """What makes the chain, from the arguments that were given."""
        return functools.partial(cls.chain(), **cls.chain_arguments({**cls.defaults, **given}))

    @classmethod
    def chain_arguments(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The chain's arguments, by its own names, from those of the class."""
        known, back = (
            set(inspect.signature(cls.chain()).parameters),
            {v: k for k, v in NAMES.items()},
        )
        found = {back.get(name, name): _value(value) for name, value in given.items()}
        for names, together in PAIRS.items():
            if together in found and known.issuperset(names):
                found |= zip(names, pair(found.pop(together), cls.__name__), strict=True)
        return found


def _value(value: Any) -> Any:
    """What a chain takes for what torch's optimizers take."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


CLASSES: dict[str, type[Named]] = {}
"""The classes by their names as `_plain_name` has them."""


def _plain_name(name: str) -> str:
    return name.lower().replace("_", "")


def _optional(name: str, annotation: Any) -> inspect.Parameter:
    return _Parameter(name, _Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


class NamedAround(Named):
    """The links of a chain around another one, as a class; see `chainrule.torch_optimizers`."""

    left_out = frozenset(("inner", "lr", "weight_decay", "decay_mask"))
    added: ClassVar[dict[str, inspect.Parameter]] = {
        "lr": _optional("lr", float | Callable[..., Any] | None),
        "betas": _optional("betas", tuple[float, float | None] | None),
        "weight_decay": _optional("weight_decay", float | None),
        "base": _Parameter("base", _Parameter.KEYWORD_ONLY, default="Adam", annotation=Any),
        "base_arguments": _optional("base_arguments", dict[str, Any] | None),
    }
    told: ClassVar[dict[str, str]] = {
        **dict.fromkeys(FIRST, "of the base; default its own."),
        "base": "what is inside: a class of this module or its name, a description of a chain"
        ' (`{"factory": "optax:sgd", "arguments": {"learning_rate": 0.1}}`), or a chain.',
        "base_arguments": "more arguments of a base that is a class, by name.",
    }

    @classmethod
    def prepared(cls, params: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Parameters as the base takes them, and the arguments with what makes the base."""
        own = {name: value for name, value in given.items() if name not in cls.added}
        base, arguments = given.get("base", "Adam"), dict(given.get("base_arguments") or {})
        for name in FIRST:
            if given.get(name) is not None:
                if name in arguments:
                    raise TypeError(
                        f"{cls.__name__}: `{name}` is given twice, also in `base_arguments`"
                    )
                arguments[name] = given[name]
        params, inner = _inside(cls.__name__, base, params, arguments)
        return params, {**own, "inner": inner}

    @classmethod
    def maker(cls, given: Mapping[str, Any]) -> Maker:
        """What makes the chain: the links around that of the base."""
        own = {name: value for name, value in given.items() if name != "inner"}
        return functools.partial(around, cls.chain(), given["inner"], cls.chain_arguments(own))


def around(factory: Callable[..., Any], inner: Maker, arguments: dict[str, Any]) -> Any:
    """A chain around the one that `inner` makes; in pickles by its name."""
    return factory(as_transformation(inner), **arguments)


def from_description(description: dict[str, Any]) -> Any:
    """The chain that a description makes; in pickles by its name."""
    return described(description).chain


def _inside(owner: str, base: Any, params: Any, arguments: dict[str, Any]) -> tuple[Any, Maker]:
    """Parameters and what makes the chain inside, from its name, its class, its description or itself."""
    if isinstance(base, str):
        found = CLASSES.get(_plain_name(base))
        if found is None:
            names = ", ".join(sorted(cls.__name__ for cls in CLASSES.values()))
            raise ValueError(f"{owner}: `base` must be one of {names}, or a chain, got {base!r}")
        base = found
    if isinstance(base, type) and issubclass(base, Named):
        misplaced = sorted(arguments.keys() & {"params", *_OF_BRIDGE})
        if misplaced:
            raise TypeError(f"{owner}: give `{misplaced[0]}` to {owner}, not in `base_arguments`")
        given = base.bound((params,), arguments)
        params, own = base.prepared(given.pop("params"), given)
        return params, base.maker(own)
    if isinstance(base, torch.optim.Optimizer):
        raise TypeError(f"{owner}: `base` is the optimizer {type(base).__name__}; {_WRAP}")
    if arguments:
        names = ", ".join(f"`{name}`" for name in arguments)
        raise TypeError(
            f"{owner}: {names} cannot be given to a `base` that is a chain; make it with them"
        )
    if isinstance(base, Mapping):
        return params, functools.partial(from_description, dict(base))
    return params, base


def _names_in(maker: Any) -> set[str]:
    """The arguments of the chains that a maker is made of."""
    if not isinstance(maker, functools.partial):
        return set()
    if maker.func is around:
        return set(inspect.signature(maker.args[0]).parameters) | _names_in(maker.args[1])
    return set(inspect.signature(maker.func).parameters)
