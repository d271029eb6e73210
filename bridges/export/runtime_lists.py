"""How an exported optimizer takes many small tensors at once, and large ones in parts."""

# pyright: reportUnusedClass=false, reportUnusedFunction=false
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# ------------------------------------------------------------------------------------------------


class _Leaf:
    """A parameter in a step: its gradient, its state, and what is computed of them on the way."""

    def __init__(self, param: Tensor, grad: Tensor, state: dict[str, Any], kind: int):
        self.param, self.grad, self.state, self.kind = param, grad, state, kind
        self.values: dict[str, Any] = {}
        self.places: dict[int, int] = {}
        self.offsets: dict[int, int] = {}


def _placed(leaves: Sequence[_Leaf], kinds: Sequence[int], number: int) -> list[_Leaf]:
    """The parameters of some kinds, which learn their place among them."""
    found = [leaf for leaf in leaves if leaf.kind in kinds]
    offset = 0
    for place, leaf in enumerate(found):
        leaf.places[number], leaf.offsets[number] = place, offset
        offset += leaf.param.numel()
    return found


_PART = 1 << 18


def _parts(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Tensors of one size in parts that a cache holds, numbers whole; small ones, and views with gaps, as they are."""
    if any(isinstance(x, _Each) or _is_traced(x) for x in tensors):
        return iter([tensors])
    arrays = [x for x in tensors if x.ndim]
    alike = len({x.stride() for x in arrays}) == 1 or all(x.is_contiguous() for x in arrays)
    small = not arrays or arrays[0].device.type != "cpu" or arrays[0].numel() <= _PART
    flat = [x if not x.ndim else _flat(x) for x in tensors]
    if small or not alike or any(x is None for x in flat):
        return iter([tensors])
    cut = (x.split(_PART) if x.ndim else itertools.repeat(x) for x in flat if x is not None)
    return zip(*cut, strict=False)


def _is_traced(x: Any) -> bool:
    """Whether a step is traced for the compiler, which batches and divides by itself."""
    is_functional = torch._is_functional_tensor  # pyright: ignore
    return isinstance(x, FakeTensor) or (isinstance(x, Tensor) and is_functional(x))


class _Entries(list[Any]):
    """Numbers that are the entries of a vector."""

    def __init__(self, vector: Tensor):
        super().__init__(vector.unbind())
        self.vector = vector


def _flat(x: Tensor) -> Tensor | None:
    """A tensor as a vector in the order of its memory; None if it has gaps."""
    ordered = x.permute(sorted(range(x.ndim), key=x.stride, reverse=True))
    return ordered.view(-1) if ordered.is_contiguous() else None


def _total(results: Iterable[Any]) -> Any:
    """The sums over whole tensors, given those over their parts."""
    found = list(results)
    if len(found) == 1 or isinstance(found[0], Tensor):
        return functools.reduce(operator.add, found)
    return tuple(functools.reduce(operator.add, own) for own in zip(*found, strict=True))


class _Each:
    """A tensor, or number, of each of some parameters: what is done with it is done with each of them.

    Where torch has the operation for lists (`torch._foreach_...`) it is one call, else a loop.
    """

    def __init__(self, entries: list[Any]):
        self.entries = entries

    @property
    def shape(self) -> torch.Size:
        return self.entries[0].shape

    def __getattr__(self, name: str) -> Any:
        return functools.partial(_apply, getattr(Tensor, name), self)

    def __neg__(self) -> Any:
        return _apply(operator.neg, self)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        del types
        return _apply(function, *args, **(kwargs or {}))


def _operator(function: Any, name: str) -> None:
    setattr(_Each, f"__{name}__", lambda x, y: _apply(function, x, y))
    setattr(_Each, f"__r{name}__", lambda x, y: _apply(function, y, x))


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "and_",
    "or_",
    "xor",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "getitem",
):
    _operator(getattr(operator, _name), _name.strip("_"))

_NUMBERS = ("add", "sub", "mul", "div", "lerp")
_FOREACH = (
    *_NUMBERS, "abs", "exp", "expm1", "log", "log1p", "neg", "reciprocal", "rsqrt", "sigmoid", "sqrt", "tanh",
    "maximum", "minimum", "clamp_min", "clamp_max", "addcmul", "addcdiv",
)  # fmt: skip
"""What torch does with lists, of tensors alone or with one number; those of `_NUMBERS` with a number for each, too."""


def _apply(function: Any, *args: Any, **kwargs: Any) -> Any:
    """What a function makes of each entry of its arguments."""
    count = next(len(x.entries) for x in (*args, *kwargs.values()) if isinstance(x, _Each))
    name = function.__name__.replace("truediv", "div")
    plain = name.rstrip("_")
    if plain in _FOREACH and kwargs.keys() <= {"alpha", "value"}:
        given = [_listed(x, count, plain in _NUMBERS and not kwargs) for x in args]
        scale = {key: _listed(x, count, key == "value") for key, x in kwargs.items()}
        if isinstance(scale.get("value"), list):
            given.append(scale.pop("value"))
        if isinstance(given[0], list) and not any(x is None for x in (*given, *scale.values())):
            made = getattr(torch, f"_foreach_{name}")(*given, **scale)
            return args[0] if name.endswith("_") else _Each(list(made))
    many = [x.entries if isinstance(x, _Each) else itertools.repeat(x) for x in args]
    if any(isinstance(x, _Each) for x in kwargs.values()):
        named = [{key: _entry(x, k) for key, x in kwargs.items()} for k in range(count)]
        return _Each([function(*own, **ours) for *own, ours in zip(*many, named, strict=False)])
    return _Each(list(map(functools.partial(function, **kwargs) if kwargs else function, *many)))


def _listed(x: Any, count: int, numbers: bool) -> Any:
    """An operand as torch's functions for lists take it; None if they do not."""
    if isinstance(x, _Each):
        return x.entries if numbers or isinstance(x.entries[0], Tensor) else None
    if isinstance(x, Tensor):
        return [x] * count
    return x if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def _entry(x: Any, k: int) -> Any:
    return x.entries[k] if isinstance(x, _Each) else x


def _each(entries: Iterable[Any]) -> Any:
    """A value of each parameter of a batch; of a single one itself."""
    found = list(entries)
    return found[0] if len(found) == 1 else _Each(found)


def _batches(leaves: Sequence[Any]) -> Iterator[list[Any]]:
    """Parameters of one dtype and shape together; on a CPU no more of them than a cache holds; traced, each alone."""
    if any(_is_traced(leaf.param) for leaf in leaves[:1]):
        yield from ([leaf] for leaf in leaves)
        return
    alike: dict[Any, list[Any]] = {}
    for leaf in leaves:
        alike.setdefault((leaf.param.dtype, leaf.param.shape), []).append(leaf)
    for own in alike.values():
        param = own[0].param
        many = max(1, _PART // max(1, param.numel())) if param.device.type == "cpu" else len(own)
        for start in range(0, len(own), many):
            yield own[start : start + many]


def _keep(batch: Sequence[Any], names: Sequence[str], results: Any) -> None:
    """Notes what was computed for a batch with each of its parameters."""
    for name, x in zip(names, results if len(names) > 1 else [results], strict=True):
        for k, leaf in enumerate(batch):
            leaf.values[name] = _entry(x, k)
