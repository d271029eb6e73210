"""Step time of exported files against the bridge's eager step.

    python benchmarks/speed/export_step.py               # every chain
    python benchmarks/speed/export_step.py adam stam     # some of them

A file has no compiled kernel; the bridge has it, as users have it.
Contenders take turns in one process on the same gradients; a ratio is the median over rounds of
the file's time over the bridge's in the same round.
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from shapes import LISTS

from chainrule import TorchBridge, chains
from chainrule.bridges.export import export

RATE, ROUNDS, TARGET = 1e-3, 15, 1.1
CHAINS: dict[str, Callable[[], Any]] = {
    "adam": lambda: chains.adam(RATE),
    "stam": lambda: chains.stam(RATE),
    "casmo": lambda: chains.casmo(RATE),
    "magma": lambda: chains.magma(chains.adam(RATE)),
    "muon": lambda: chains.muon(RATE),
}


def exported(chain: Any, folder: Path, name: str) -> Any:
    """The class of a chain's file."""
    path = export(chain, [torch.float32], folder / f"{name}.py", "Exported")
    spec = importlib.util.spec_from_file_location(f"exported_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Exported


def parameters(shapes: Any) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def ratio(ours: torch.optim.Optimizer, bridge: torch.optim.Optimizer) -> tuple[float, float]:
    """Milliseconds of the file's step, and the median ratio to the bridge's."""
    times: list[tuple[float, float]] = []
    for _ in range(ROUNDS + 2):
        taken = []
        for optimizer in (ours, bridge):
            start = time.perf_counter()
            optimizer.step()
            taken.append(time.perf_counter() - start)
        times.append((taken[0], taken[1]))
    measured = times[2:]
    return (
        1e3 * statistics.median(x for x, _ in measured),
        statistics.median(x / y for x, y in measured),
    )


def main() -> None:
    names = sys.argv[1:] or list(CHAINS)
    print(f"{'chain':10}{'parameters':>22}{'file, ms':>12}{'to bridge':>12}   target {TARGET}")
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            cls = exported(CHAINS[name](), Path(folder), name)
            for size, shapes in LISTS.items():
                bridge = TorchBridge(CHAINS[name](), parameters(shapes))
                try:
                    ours = cls(parameters(shapes))
                except ValueError as error:  # an embedding, which Muon knows by its length
                    print(f"{name:10}{size:>22}  refused: {error}")
                    continue
                took, found = ratio(ours, bridge)
                print(f"{name:10}{size:>22}{took:12.2f}{found:12.2f}")


if __name__ == "__main__":
    main()
