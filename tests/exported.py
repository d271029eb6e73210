"""Exported files as modules, and the bridge that they are compared with: one that has no compiled kernel either."""

import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from chainrule import TorchBridge
from chainrule.bridges.export import export
from chainrule.bridges.lowering.backends import foreach
from chainrule.bridges.lowering.passes import take_kernel_moves
from chainrule.bridges.lowering.rules import kernel

SHAPES = ((5,), (8, 4), (4, 6), (), (3, 2, 2, 4), (6, 6), (1,), (12, 5))
OTHER_SHAPES = ((7, 9), (3,), (2, 5), (), (2, 3, 3, 3))
ALIKE = ((4, 6), (5,), (4, 6), (), (5,), (4, 6), (), (2, 3, 3, 3), (2, 3, 3, 3))
"""Parameters of one shape run together."""
_number = itertools.count()


def without_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bridge computes what a file can: the kernel's sums add in another order, and torch contracts products."""
    monkeypatch.setattr(kernel, "runs_in_kernel", lambda eqn, target: False)
    for module in (take_kernel_moves, foreach):
        monkeypatch.setattr(module, "_kernel", None)


def load(path: Path) -> ModuleType:
    name = f"exported_{next(_number)}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def exported(chain: Any, folder: Path, dtypes: Any = "float32", *, parts: bool = True) -> Any:
    """The class of a file; `parts`: it takes even these small tensors part by part, unless it sums them."""
    path = export(chain, dtypes, folder / "exported.py", "Exported")
    module = load(path)
    if parts and "results = _total(" not in path.read_text():
        module._PART = 5
    return module.Exported


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(params: Sequence[torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    for group in optimizer.param_groups:
        set_gradients(group["params"], seed)
    optimizer.step(lambda: torch.tensor(2.0 * 0.8**seed + 0.1))


def state_of(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {(i, name): x for i, p in enumerate(params) for name, x in optimizer.state[p].items()}


def assert_same(ours: torch.optim.Optimizer, bridge: torch.optim.Optimizer) -> None:
    """Parameters and state are equal to the bit."""
    for own, theirs in zip(ours.param_groups, bridge.param_groups, strict=True):
        for p, q in zip(own["params"], theirs["params"], strict=True):
            assert _equal(p.detach(), q.detach()), (tuple(p.shape), (p - q).abs().max())
    own, theirs = state_of(ours), state_of(bridge)
    assert own.keys() == theirs.keys()
    for key, x in own.items():
        assert x.dtype == theirs[key].dtype and _equal(x, theirs[key]), key


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all())


def check(
    chain: Any, cls: Any, shapes: Sequence[tuple[int, ...]], steps: int = 4, **keys: Any
) -> None:
    """The class goes the way of the bridge for some steps."""
    ours, bridge = cls(parameters(shapes), **keys), TorchBridge(chain, parameters(shapes), **keys)
    assert_same(ours, bridge)
    for index in range(steps):
        step(ours, index)
        step(bridge, index)
        assert_same(ours, bridge)


def check_style(path: Path) -> None:
    """Ruff and pyright find nothing in an exported file, or in those of a folder."""
    for command in (["ruff", "check", "--isolated"], ["pyright", "--pythonpath", sys.executable]):
        done = subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:], str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
