"""Writes `src/chainrule/torch_optimizers.pyi`, the types of classes whose signatures are made from their chains.

python -m tests.bridges.stub    # from the root, after the arguments of a chain changed
"""

import inspect
import re
from pathlib import Path

from chainrule import torch_optimizers

FILE = Path(__file__).parents[2] / "src" / "chainrule" / "torch_optimizers.pyi"
HEAD = '''"""Made by tests/bridges/stub.py."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.nn import Module

from chainrule.bridges.registries import register_timm
from chainrule.bridges.torch_named import Named, NamedAround
from chainrule.transforms import TierPolicy
from chainrule.transforms.routing import RoutingPlan

'''


def _annotated(parameter: inspect.Parameter) -> str:
    text = inspect.formatannotation(parameter.annotation)
    text = re.sub(r"\b(?:\w+\.)+([A-Z]\w*)", r"\1", text)  # the names that the stub imports
    return f"{parameter.name}: {text}" + ("" if parameter.default is parameter.empty else " = ...")


def stub() -> str:
    """The text of the file, before it is formatted."""
    names = torch_optimizers.__all__
    parts = [HEAD, f"__all__ = {names!r}\n"]
    for name in names:
        cls = getattr(torch_optimizers, name)
        if not inspect.isclass(cls):
            continue
        parameters = list(inspect.signature(cls).parameters.values())
        first = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        rest = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        arguments = ["self", *map(_annotated, first), "*", *map(_annotated, rest)]
        parts.append(f"class {name}({cls.__bases__[0].__name__}):")
        parts.append(f"    def __init__({', '.join(arguments)}) -> None: ...")
        if hasattr(cls, "plan"):
            parts.append("    def plan(self) -> RoutingPlan: ...")
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(stub())
