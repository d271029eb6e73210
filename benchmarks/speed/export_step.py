"""Step time of exported files against the bridge's, eager and compiled.

    python benchmarks/speed/export_step.py                                       # every chain
    python benchmarks/speed/export_step.py stam --lists small --rounds 5         # some of it

A file has no compiled kernel; the bridge has it, as users have it. Eager, where the kernel runs most of the bridge's
step, a file is also timed against a bridge without it, which does what torch alone can do. Another process writes the
file, since what tracing leaves behind in the C library's memory makes temporaries cost page faults. Contenders take
turns in one process on the same gradients; a ratio is the median over rounds of the file's time over the bridge's in
the same round. Muon is timed on matrices: a file knows no embedding by its name.
"""

import argparse
import importlib.util
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import optax
import torch

sys.path.insert(0, str(Path(__file__).parent))
from shapes import LISTS
from torch_step import RATE, Contender, bridge, show_steps

from chainrule import TorchBridge, chains, export
from chainrule.bridges.lowering.backends import foreach
from chainrule.bridges.lowering.passes import take_kernel_moves
from chainrule.bridges.lowering.rules import kernel

TARGET = 1.1
CHAINS: dict[str, Callable[[], Any]] = {
    "adamw": lambda: optax.adamw(RATE),
    "stam": lambda: chains.stam(RATE),
    "casmo": lambda: chains.casmo(RATE),
    "magma": lambda: chains.magma(chains.adam(RATE)),
    "cautious": lambda: chains.adam(RATE, caution="clamped_mean"),
    "lamb": lambda: optax.lamb(RATE),
    "muon": lambda: chains.muon(RATE),
}


def write(name: str, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Muon's file goes by shape alone
        export(CHAINS[name](), [torch.float32], path, "Exported")


def exported(folder: Path, name: str) -> Any:
    """The class of a chain's file."""
    path = folder / f"{name}.py"
    writer = multiprocessing.get_context("spawn").Process(target=write, args=(name, path))
    writer.start()
    writer.join()
    spec = importlib.util.spec_from_file_location(f"exported_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.Exported


def plain(chain: Any) -> Callable[[Any], Any]:
    """The eager bridge as it is where the compiled kernel was not built."""

    def make(params: Any) -> Any:
        with (
            mock.patch.object(kernel, "runs_in_kernel", lambda eqn, target: False),
            mock.patch.object(take_kernel_moves, "_kernel", None),
            mock.patch.object(foreach, "_kernel", None),
        ):
            optimizer = TorchBridge(chain, params, compile=False)
            optimizer.step()  # both lower parts of the chain
        return optimizer

    return make


def contenders(name: str, cls: Any, modes: Sequence[str]) -> list[Contender]:
    """The bridge and the file, eager and compiled."""
    found = []
    for mode in modes:
        compile = mode == "compiled"
        yardstick, without = f"bridge, {mode}", "bridge, eager, no kernel"
        file = Contender(f"file, {mode}", partial(cls, compile=compile), yardstick, TARGET)
        found.append(Contender(yardstick, bridge(CHAINS[name](), compile=compile), yardstick))
        if compile:
            found.append(file)
        else:
            found += [
                Contender(without, plain(CHAINS[name]()), without),
                file._replace(target=None),
                file._replace(yardstick=without),
            ]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chains", nargs="*", help=f"of {', '.join(CHAINS)}; default all")
    parser.add_argument("--lists", nargs="+", default=["gpt", "small"], choices=list(LISTS))
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--rounds", type=int, default=15, help="rounds counted (default 15)")
    parser.add_argument("--json", type=Path, help="also keep the rows there")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.chains or CHAINS:
            cls = exported(Path(folder), name)
            for listed in ["matrices"] if name == "muon" else args.lists:
                inner = 20 if listed == "small" else 1
                ours = contenders(name, cls, args.modes)
                table = f"export-{name}-{listed}"
                show_steps(table, LISTS[listed], ours, inner, args.rounds, args.json)


if __name__ == "__main__":
    main()
