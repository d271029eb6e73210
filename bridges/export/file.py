"""`export`: a chain as a file of torch code that needs neither JAX nor this package."""

import inspect
import keyword
import pathlib
import re
import types
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax

import chainrule
from chainrule.bridges.export import (
    runtime,
    runtime_checks,
    runtime_compiled,
    runtime_functions,
    runtime_launches,
    runtime_lists,
    runtime_record,
)
from chainrule.bridges.export.driver import Driver
from chainrule.bridges.export.dtypes import dtypes_of
from chainrule.bridges.export.errors import CannotExport
from chainrule.bridges.export.functions import Functions
from chainrule.bridges.export.generic import Value, is_computed, is_pick
from chainrule.bridges.export.interface import constructor, docstring, documentation, live_tables
from chainrule.bridges.export.kinds import Found, goes_by_name, kinds_of
from chainrule.bridges.export.render import helpers, is_own
from chainrule.bridges.export.sorts import kind_of
from chainrule.bridges.export.text import FunctionText
from chainrule.bridges.lowering import torch_dtype
from chainrule.bridges.lowering.backends import early_copies, launches
from chainrule.bridges.lowering.errors import LoweringError
from chainrule.bridges.lowering.nodes import function_of, value_of
from chainrule.bridges.lowering.op_info import info
from chainrule.bridges.step.function import as_transformation

_MODULES = [
    "copy",
    "ctypes",
    "functools",
    "itertools",
    "math",
    "numbers",
    "operator",
    "struct",
    "types",
]
_LINE = r"\n# -{20,}\n"
"""What is below it in a module of the runtime is in every file."""
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
    that the parts stay in the cache. With `compile=True` steps run through Inductor: the same within rounding.

    Args:
      chain: a gradient transformation, or a function without arguments that makes one.
      params: parameters of the dtypes that the file is for, or dtypes: a model, `named_parameters()`, or any tree of
        arrays, tensors, `jax.ShapeDtypeStruct`s or dtypes.
      path: the file, in a folder that exists.
      name: of the class.

    Returns:
      The path.

    Raises:
      CannotExport: the chain's program is not one of torch code for any list of parameters; nothing is written.
      ValueError: `name` is no name of a class, or there are no parameters.
      TypeError: a parameter is no array of floats.
      FileNotFoundError: there is no folder for the file.
    """
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"export: `name` must be the name of a class, got {name!r}")
    path = pathlib.Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"export: `path` is in {path.parent}, which is no folder; make it")
    path.write_text(source(chain, params, name))
    return path


def source(chain: Any, params: Any, name: str) -> str:
    """The text of the file that `export` writes."""
    transformation = as_transformation(chain)
    dtypes = dtypes_of(params)
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
            for slot, aval in zip(
                self.described.slots, jax.tree.leaves(self.described.state), strict=True
            )
        }

    def text(self) -> str:
        sections = [
            _below(runtime_lists),
            self.tables(),
            kind_of(self.dtypes, self.found.sorting, self.found.kinds, self.found.limit),
            *(
                "\n".join(FunctionText(fs, f).lines())
                for fs in (self.init, self.step)
                for f in fs.functions
            ),
            "\n".join(self.driver("_start", self.init)),
            "\n".join(self.driver("_step", self.step)),
            _below(early_copies),
            _below(runtime_compiled),
            _below(launches),
            _below(runtime_launches),
            _below(runtime_record),
            _below(runtime_functions),
            self.optimizer(_below(runtime)),
            _below(runtime_checks),
        ]
        used = [
            v
            for fs in (self.init, self.step)
            for f in fs.functions
            for v in f.values
            if is_computed(v)
        ]
        called = {function_of(v.node) for v in used if v.node.op == "call_function"}
        own = sorted(filter(is_own, called), key=lambda f: f.__name__)
        body = "\n\n\n".join([*([helpers(own)] if own else []), *sections]) + "\n"
        return self.header(body) + body

    def header(self, body: str) -> str:
        modules = [m for m in _MODULES if f"{m}." in body]
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
            "from typing import Any, NamedTuple",
            "",
            "import torch",
            "from torch import Tensor",
            "from torch._subclasses.fake_tensor import FakeTensor",
            "from torch.overrides import TorchFunctionMode",
            "from torch.utils._python_dispatch import TorchDispatchMode",
            # After imports isort wants two empty lines before a function or class, and one before a constant.
            *([""] if re.match(r"_?[A-Z]", body) else ["", ""]),
            "",
        ])  # fmt: skip

    def summary(self) -> str:
        lines = documentation(self.chain).splitlines()
        return lines[0] if lines else "a chain of gradient transformations as a torch optimizer."

    def tables(self) -> str:
        starts = self.found.generic.init
        group = tuple(name for kind, name in starts if kind is None)
        of_kinds = tuple(tuple(n for kind, n in starts if kind == k) for k in self.kinds)
        return "\n".join([
            live_tables(self.described),
            f"_GROUP_STATE: Sequence[str] = {group!r}",
            f"_LEAF_STATE: Sequence[Sequence[str]] = {of_kinds!r}",
            f"_READS_LOSS = {self.described.reads_value}",
            "_FLAT: Mapping[str, bool] = {",
            *(f'    "{f.name}": {f.flat},' for f in self.step.functions),
            "}",
            '"""The functions of a step, and whether they take tensors of any shape as vectors."""',
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
            "DOCSTRING", docstring(self.chain)
        )
        return text.replace("    _filled:", constructor(self.described) + "\n    _filled:", 1)


def _below(module: types.ModuleType) -> str:
    return re.split(_LINE, inspect.getsource(module))[1].strip()
