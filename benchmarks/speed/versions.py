"""Steps of this version of chainrule against those of another one, which another environment has.

    git worktree add /tmp/other COMMIT, and an environment with it installed
    python benchmarks/speed/versions.py /tmp/other/.venv/bin/python [--lists gpt small] [--rounds 15]

Each version runs in a process of its own; the two take turns, one at a time, on the same shapes. Where a process lies
in memory changes its speed by some per cent, and the one that started first is slower by 3 %: so there are several
pairs of processes, an even number, and every second pair is started and asked in the other order. A ratio is the
geometric mean over pairs of the median over rounds of (this / other in the same round), with the least and the largest
pair in brackets. The last line of a list is the other version against itself: how much of a ratio is noise.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

STEPS = {"gpt": 1, "small": 20}  # of a round


def contenders() -> dict[str, tuple[Callable[[], Any], bool]]:
    """Name -> (chain, whether compiled)."""
    import optax

    from chainrule import chains

    made: dict[str, tuple[Callable[[], Any], bool]] = {}
    for compiled in (True, False):
        how = "compiled" if compiled else "eager"
        made |= {
            f"adamw, {how}": (lambda: optax.adamw(1e-3), compiled),
            f"stam, {how}": (chains.stam, compiled),
            f"casmo, {how}": (chains.casmo, compiled),
            f"magma, {how}": (lambda: chains.magma(optax.adamw(1e-3)), compiled),
        }
    return made | {"cosmic, eager": (chains.cosmic, False)}


def work(listed: str, name: str) -> None:
    """Answers every line of its input with the seconds that a round of steps took."""
    import torch
    from shapes import LISTS

    from chainrule import TorchBridge

    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in LISTS[listed]:
        params.append(torch.nn.Parameter(torch.empty(shape).normal_(0, 0.02, generator=generator)))
        params[-1].grad = torch.empty(shape).normal_(0, 1e-2, generator=generator)
    chain, compiled = contenders()[name]
    optimizer = TorchBridge(chain(), params, compile=compiled)
    for _ in range(3):
        optimizer.step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range(STEPS[listed]):
            optimizer.step()
        print(time.perf_counter() - start, flush=True)


class Worker:
    def __init__(self, python: str, listed: str, name: str):
        command = [python, __file__, "--work", listed, name]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin and self.process.stdout
        self.ask, self.answers = self.process.stdin, self.process.stdout
        if self.answers.readline().strip() != "ready":
            raise SystemExit(f"{python}: {name} did not start")

    def round(self) -> float:
        self.ask.write("\n")
        self.ask.flush()
        return float(self.answers.readline())

    def stop(self) -> None:
        self.ask.close()
        self.process.wait()


def compare(pythons: list[str], listed: str, name: str, pairs: int, rounds: int) -> None:
    """Prints a line."""
    ratios, least = [], []
    for pair in range(pairs):
        order = slice(None, None, -1 if pair % 2 else 1)  # its own inverse
        workers = [Worker(python, listed, name) for python in pythons[order]]
        times = [[worker.round() for worker in workers][order] for _ in range(rounds)]
        for worker in workers:
            worker.stop()
        ratios.append(statistics.median(this / other for this, other in times))
        least.append([min(seconds) for seconds in zip(*times, strict=True)])
    this, other = (1e3 * min(seconds) / STEPS[listed] for seconds in zip(*least, strict=True))
    print(
        f"{listed:7}{name:20}{this:10.2f} ms{other:10.2f} ms{statistics.geometric_mean(ratios):8.3f}"
        f"  [{min(ratios):.3f}, {max(ratios):.3f}]",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", nargs="?", help="the Python that has the other version")
    parser.add_argument("--lists", nargs="+", default=["gpt", "small"])
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(*args.work)
    if args.other is None:
        parser.error("give the Python of another version")
    print(f"{'list':7}{'chain':20}{'this':>13}{'other':>13}{'ratio':>8}  [pairs]")
    for listed in args.lists:
        for name in [n for n in contenders() if args.only in n]:
            compare([sys.executable, args.other], listed, name, args.pairs, args.rounds)
        compare([args.other, args.other], listed, "stam, compiled", args.pairs, args.rounds)
    return None


if __name__ == "__main__":
    main()
