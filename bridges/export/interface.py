"""What users of an exported class see: its docstring, its constructor, its hyperparameters and their bounds."""

import inspect
from typing import Any

import jax
import torch

from chainrule.bridges.export.functions import identifier
from chainrule.bridges.hyperparameters import key_of, shortest
from chainrule.bridges.lowering import to_torch, torch_dtype
from chainrule.bridges.step.description import Description
from chainrule.bridges.step.function import as_transformation
from chainrule.transforms._checks import BOUNDS


def documentation(chain: Any) -> str:
    """The docstring of the function that made the chain, up to its arguments."""
    function = getattr(chain, "func", chain)
    if not inspect.isfunction(function):
        variables = inspect.getclosurevars(as_transformation(chain).update).nonlocals
        function = variables.get("factory")
    text = inspect.getdoc(function) if callable(function) else None
    return (text or "A chain of gradient transformations.").partition("\n\nArgs:")[0]


def docstring(chain: Any) -> str:
    """What stands between the quotes of the class's docstring."""
    text = documentation(chain).replace("\\", "\\\\").replace('"""', "'''")
    lines = [
        line if not line or i == 0 else f"    {line}" for i, line in enumerate(text.splitlines())
    ]
    return "\n".join(lines) + ("\n    " if len(lines) > 1 else "")


def live_tables(described: Description) -> str:
    """The dtypes and the bounds of the hyperparameters, by key."""
    leaves = jax.tree.leaves(described.state)
    live: dict[str, torch.dtype] = {
        key_of(n): torch_dtype(leaves[k].dtype) for n, k in described.live.items()
    }
    if described.function.multiplier:
        live["lr"] = torch.float32
    bounds = {
        key: BOUNDS[name]
        for key in live
        if (name := "learning_rate" if key == "lr" else key.rpartition(".")[2]) in BOUNDS
    }
    entries = ", ".join(f'"{k}": {d}' for k, d in live.items())
    intervals = "".join(
        f'    "{k}": ({_number(b[0])}, {_number(b[1])}, {b[2]}, {b[3]}),\n'
        for k, b in bounds.items()
    )
    return "\n".join([
        f"_LIVE: Mapping[str, torch.dtype] = {{{entries}}}",
        "_BOUNDS: Mapping[str, tuple[float, float, bool, bool]] = {",
        intervals + "}",
    ])  # fmt: skip


def constructor(described: Description) -> str:
    """`__init__`, with the hyperparameters by name and their defaults."""
    live = described.live
    values = described.init().constants(live.values())
    defaults = {key_of(n): shortest(to_torch(v)) for n, v in zip(live, values, strict=True)}
    if described.function.multiplier:
        defaults.setdefault("lr", 1.0)
    order = sorted(defaults, key=lambda key: key != "lr")
    named = [key for key in order if identifier(key) == key]
    arguments = [f"        {key}: float | Tensor = {_number(defaults[key])},\n" for key in named]
    arguments.insert(int("lr" in named), "        *,\n")
    pairs = ", ".join(
        f'"{key}": {key if key in named else _number(defaults[key])}' for key in order
    )
    pair = (
        '        if "betas" in others:\n'
        '            b1, b2 = _pair(others["betas"], type(self).__name__)\n'
    )
    return (
        "    def __init__(\n        self,\n        params: Iterable[Any],\n"
        f"{''.join(arguments)}        compile: bool = False,\n        **others: Any,\n    ):\n"
        '        """`compile`: run steps through Inductor. `others`: other keys of the groups."""\n'
        "        self._choose(compile)\n"
        f"{pair if {'b1', 'b2'} <= {*named} else ''}"
        f"        super().__init__(params, {{{pairs}, **others}})\n"
    )


def _number(x: Any) -> str:
    if isinstance(x, float) and x in (float("inf"), float("-inf")):
        return "math.inf" if x > 0 else "-math.inf"
    return repr(x)
