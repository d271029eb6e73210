"""`export`: a chain as a file of torch code that needs neither JAX nor this package."""

import inspect
import pathlib
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

import chainrule
from chainrule.bridges.export import runtime, runtime_checks, runtime_lists
from chainrule.bridges.export.driver import Driver
from chainrule.bridges.export.errors import CannotExport
from chainrule.bridges.export.functions import Functions, identifier
from chainrule.bridges.export.generic import Value, is_computed, is_pick
from chainrule.bridges.export.kinds import Found, goes_by_name, kinds_of
from chainrule.bridges.export.render import helpers
from chainrule.bridges.export.sorts import kind_of
from chainrule.bridges.export.text import FunctionText
from chainrule.bridges.hyperparameters import key_of, shortest
from chainrule.bridges.lowering import ops, to_torch, torch_dtype
from chainrule.bridges.lowering.errors import LoweringError
from chainrule.bridges.lowering.nodes import function_of, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.step.function import as_transformation
from chainrule.transforms._checks import BOUNDS

_LINE = r"\n# -{20,}\n"
"""Divides `runtime`."""
_BY_SHAPE = (
    "this chain tells parameters apart by name, the file by shape alone; "
    "give parameters that names would exclude, such as embeddings, to another optimizer"
)


def export(
    chain: Any, params: Any, path: str | pathlib.Path, name: str = "Exported"
) -> pathlib.Path:
    """Writes a chain as a Python file with one `torch.optim.Optimizer`, which imports torch and nothing else.

    The file knows no names of parameters: a chain that tells them apart by name (Muon: embeddings and output layers)
    tells them apart by shape alone there, as in a `TorchBridge` that was given none. A `UserWarning` and the file say
    so.

    A step of the class has the bits of an eager `TorchBridge` step without the compiled kernel, but for sums over
    whole tensors of more than 262,144 elements on a CPU: these are added part by part, as the kernel adds them, so
    that the parts stay in the cache.

    Args:
      chain: a gradient transformation, or a function without arguments that makes one.
      params: parameters of the dtypes that the file is for, or dtypes.
      path: the file.
      name: of the class.

    Returns:
      The path.

    Raises:
      CannotExport: the chain's program is not one of torch code for any list of parameters; nothing is written.
      ValueError: `name` is no name of a class.
    """
    if not name.isidentifier():
        raise ValueError(f"export: `name` must be the name of a class, got {name!r}")
    text = source(chain, params, name)
    path = pathlib.Path(path)
    path.write_text(text)
    return path


def source(chain: Any, params: Any, name: str) -> str:
    """The text of the file that `export` writes."""
    transformation = as_transformation(chain)
    dtypes = _dtypes(params)
    try:
        found = kinds_of(transformation, dtypes)
    except CannotExport:
        raise
    except (TypeError, ValueError, LoweringError) as error:
        raise CannotExport(f"export: {error}") from error
    by_name = goes_by_name(transformation, dtypes[0])
    if by_name:
        warnings.warn(f"export: {_BY_SHAPE}", UserWarning, stacklevel=3)
    return _File(chain, found, dtypes, name, by_name).text()


def _dtypes(params: Any) -> list[str]:
    """The names of the dtypes of parameters."""
    if isinstance(params, (str, torch.dtype)):
        params = [params]
    given = [p[1] if isinstance(p, tuple) else p for p in params]
    names = [
        str(p if isinstance(p, (str, torch.dtype)) else p.dtype).removeprefix("torch.")
        for p in given
    ]
    found = sorted(dict.fromkeys(names))
    if not found:
        raise ValueError("export: `params` is empty; give the parameters, or their dtypes")
    return found


class _File:
    def __init__(self, chain: Any, found: Found, dtypes: Sequence[str], name: str, by_name: bool):
        self.chain, self.found, self.dtypes, self.name = chain, found, dtypes, name
        self.by_name = by_name
        self.described = found.example.described
        self.kinds = sorted(set(found.kinds.values()))
        words = {"leaf": "_update", "early": "_measure", "shared": "_shared"}
        self.step = Functions(found.generic.step, words, update=True)
        words = {"leaf": "_start_one", "early": "_start_early", "shared": "_start_shared"}
        self.init = Functions(found.generic.init, words, update=False)
        kinds = [found.kinds[found.sorting(str(s.dtype), s.shape)] for s in found.example.structs]
        self.dtype_of = {
            (None if slot.owner is None else kinds[slot.owner], slot.name): torch_dtype(aval.dtype)
            for slot, aval in zip(self.described.slots, _leaves(self.described.state), strict=True)
        }

    def text(self) -> str:
        parts = re.split(_LINE, inspect.getsource(runtime))
        sections = [
            parts[1].strip(),
            re.split(_LINE, inspect.getsource(runtime_lists))[1].strip(),
            self.tables(),
            kind_of(self.dtypes, self.found.sorting, self.found.kinds, self.found.limit),
            *(
                "\n".join(FunctionText(fs, f).lines())
                for fs in (self.init, self.step)
                for f in fs.functions
            ),
            "\n".join(self.driver("_start", self.init)),
            "\n".join(self.driver("_step", self.step)),
            self.optimizer(parts[2].strip()),
            re.split(_LINE, inspect.getsource(runtime_checks))[1].strip(),
        ]
        used = [
            v
            for fs in (self.init, self.step)
            for f in fs.functions
            for v in f.values
            if is_computed(v)
        ]
        called = {function_of(v.node) for v in used if v.node.op == "call_function"}
        own = sorted((f for f in called if f in vars(ops).values()), key=lambda f: f.__name__)
        body = "\n\n\n".join([*([helpers(own)] if own else []), *sections]) + "\n"
        return self.header(body) + body

    def header(self, body: str) -> str:
        modules = [
            m
            for m in ("copy", "functools", "itertools", "math", "numbers", "operator", "struct")
            if f"{m}." in body
        ]
        return "\n".join([
            f'"""{self.name}: {self.summary()}',
            "",
            *([f"Note: {_BY_SHAPE}.".replace("; ", ";\n"), ""] if self.by_name else []),
            f"Exported by chainrule {chainrule.__version__}; needs torch alone. MIT License,",
            'Copyright (c) 2026 chainrule contributors."""',
            "",
            "# pyright: basic",
            *(f"import {m}" for m in modules),
            "from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence",
            "from typing import Any",
            "",
            "import torch",
            "from torch import Tensor",
            "",
            "",
            "",
        ])  # fmt: skip

    def summary(self) -> str:
        lines = self.documentation().splitlines()
        return lines[0] if lines else "a chain of gradient transformations as a torch optimizer."

    def documentation(self) -> str:
        """The docstring of the function that made the chain, up to its arguments."""
        function = getattr(self.chain, "func", self.chain)
        if not inspect.isfunction(function):
            variables = inspect.getclosurevars(as_transformation(self.chain).update).nonlocals
            function = variables.get("factory")
        text = inspect.getdoc(function) if callable(function) else None
        return (text or "A chain of gradient transformations.").partition("\n\nArgs:")[0]

    def tables(self) -> str:
        live = {
            key_of(n): torch_dtype(_leaves(self.described.state)[k].dtype)
            for n, k in self.described.live.items()
        }
        if self.described.function.multiplier:
            live["lr"] = torch.float32
        bounds = {
            key: BOUNDS[name]
            for key in live
            if (name := "learning_rate" if key == "lr" else key.rpartition(".")[2]) in BOUNDS
        }
        group = [name for kind, name in self.found.generic.init if kind is None]
        of_kinds = [
            tuple(n for kind, n in self.found.generic.init if kind == k) for k in self.kinds
        ]
        entries = ", ".join(f'"{k}": {d}' for k, d in live.items())
        intervals = "".join(
            f'    "{k}": ({_number(b[0])}, {_number(b[1])}, {b[2]}, {b[3]}),\n'
            for k, b in bounds.items()
        )
        return "\n".join([
            f"_LIVE: Mapping[str, torch.dtype] = {{{entries}}}",
            "_BOUNDS: Mapping[str, tuple[float, float, bool, bool]] = {",
            intervals + "}",
            f"_GROUP_STATE: Sequence[str] = {tuple(group)!r}",
            f"_LEAF_STATE: Sequence[Sequence[str]] = {tuple(of_kinds)!r}",
            f"_READS_LOSS = {self.described.reads_value}",
        ])  # fmt: skip

    def driver(self, name: str, functions: Functions) -> list[str]:
        uses = Counter(functions.results.values())

        def is_own(value: Value) -> bool:
            borrowed = value.role is not None or value.kind is None or is_pick(value)
            return not borrowed and uses[value] == 1 and not info(value.node).view

        def begins(kind: int | None, slot: str, value: Value, text: str) -> str:
            dtype = self.dtype_of[kind, slot]
            own = value_of(value.node)
            if own.dtype != dtype:
                text = f"{text}.to({dtype})"
            elif not is_own(value):
                text = f"{text}.clone(memory_format=torch.contiguous_format)"
            target = f'group["{slot}"]' if kind is None else f'leaf.state["{slot}"]'
            return f"{target} = {text}"

        def writes(kind: int | None, slot: str, value: Value, text: str) -> str:
            del value
            target = (
                f'group["{slot}"]'
                if kind is None
                else f'leaf.state["{slot}"]'
                if slot
                else "leaf.param"
            )
            return f"{target}.copy_({text})"

        driver = Driver(functions, self.found.generic.sets, self.kinds)
        return driver.lines(name, begins if name == "_start" else writes)

    def optimizer(self, text: str) -> str:
        text = text.replace("class Exported", f"class {self.name}").replace(
            "DOCSTRING", self.docstring()
        )
        return text.replace("    _filled:", self.constructor() + "\n    _filled:", 1)

    def docstring(self) -> str:
        text = self.documentation().replace("\\", "\\\\").replace('"""', "'''")
        lines = [
            line if not line or i == 0 else f"    {line}"
            for i, line in enumerate(text.splitlines())
        ]
        return "\n".join(lines) + ("\n    " if len(lines) > 1 else "")

    def constructor(self) -> str:
        live = self.described.live
        values = self.described.init().constants(live.values())
        defaults = {key_of(n): shortest(to_torch(v)) for n, v in zip(live, values, strict=True)}
        if self.described.function.multiplier:
            defaults.setdefault("lr", 1.0)
        order = sorted(defaults, key=lambda key: key != "lr")
        named = {key: key for key in order if identifier(key) == key}
        arguments = "".join(
            f"        {key}: float | Tensor = {_number(defaults[key])},\n" for key in named
        )
        pairs = ", ".join(
            f'"{key}": {key if key in named else _number(defaults[key])}' for key in order
        )
        star = "        *,\n" if named else ""
        if "lr" in named:
            first, _, rest = arguments.partition("\n")
            arguments, star = f"{first}\n" + (f"        *,\n{rest}" if rest else ""), ""
        pair = (
            '        if "betas" in others:\n'
            '            b1, b2 = _pair(others["betas"], type(self).__name__)\n'
        )
        return (
            "    def __init__(\n        self,\n        params: Iterable[Any],\n"
            f"{star}{arguments}        **others: Any,\n    ):\n"
            '        """`others`: keys of the groups whose names are no names of Python, and flags of torch."""\n'
            f"{pair if {'b1', 'b2'} <= named.keys() else ''}"
            f"        super().__init__(params, {{{pairs}, **others}})\n"
        )


def _number(x: Any) -> str:
    if isinstance(x, float) and x in (float("inf"), float("-inf")):
        return "math.inf" if x > 0 else "-math.inf"
    return repr(x)


def _leaves(tree: Any) -> list[Any]:
    import jax

    return jax.tree.leaves(tree)
