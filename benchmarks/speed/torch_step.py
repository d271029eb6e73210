"""Step time of `TorchBridge` against torch's own optimizers, time to compile, and time to lower.

    python benchmarks/speed/torch_step.py                # every table
    python benchmarks/speed/torch_step.py adamw muon     # some of them

Contenders take turns in one process on the same gradients; a ratio is the median over rounds of the
time against the yardstick's in the same round. Other libraries are timed where they are installed:
heavyball, optimi (`torch-optimi`), pytorch_optimizer. Compile times are of fresh processes: cold with
an empty cache on disk, warm with the one that the first process left.
"""

import argparse
import importlib
import importlib.util
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import optax
import torch

sys.path.insert(0, str(Path(__file__).parent))
from results import keep, row
from shapes import LISTS, MATRICES

from chainrule import TorchBridge, chains

RATE = 1e-3


class Contender(NamedTuple):
    name: str
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    yardstick: str
    target: float | None = None


def bridge(chain: Any, *, compile: bool = True) -> Callable[..., torch.optim.Optimizer]:
    return lambda params: TorchBridge(chain, params, compile=compile)


def peers() -> Iterator[Contender]:
    """AdamW of other libraries, as a user would call it."""
    for module, name in (
        ("heavyball", "ForeachAdamW"),
        ("optimi", "AdamW"),
        ("pytorch_optimizer", "AdamW"),
    ):
        if importlib.util.find_spec(module) is not None:
            found = getattr(importlib.import_module(module), name, None)
            if found is not None:
                yield Contender(f"{module}.{name}", partial(found, lr=RATE), "torch fused")


def adamw(listed: str) -> list[Contender]:
    torch_adamw = partial(torch.optim.AdamW, lr=RATE)
    return [
        Contender("torch fused", partial(torch_adamw, fused=True), "torch fused"),
        Contender("torch foreach", partial(torch_adamw, foreach=True), "torch foreach"),
        Contender("torch loop", partial(torch_adamw, foreach=False), "torch fused"),
        Contender(
            "optax.adamw, compiled",
            bridge(optax.adamw(RATE)),
            "torch fused",
            {"gpt": 1.1, "small": 1.6}[listed],
        ),
        Contender(
            "optax.adamw, eager", bridge(optax.adamw(RATE), compile=False), "torch foreach", 1.6
        ),
        *peers(),
    ]


def ours(listed: str) -> list[Contender]:
    fused = Contender("torch fused", partial(torch.optim.AdamW, lr=RATE, fused=True), "torch fused")
    limits = {"casmo": 2.2, "stam": 1.8, "magma(adamw)": 1.8} if listed == "gpt" else {}
    made: dict[str, Any] = {
        "adam": chains.adam(RATE),
        "casmo": chains.casmo(RATE),
        "stam": chains.stam(RATE),
        "magma(adamw)": chains.magma(optax.adamw(RATE)),
    }
    return [
        fused,
        *(
            Contender(f"chains.{name}, compiled", bridge(chain), "torch fused", limits.get(name))
            for name, chain in made.items()
        ),
        *(
            Contender(f"chains.{name}, eager", bridge(chain, compile=False), "torch fused")
            for name, chain in made.items()
        ),
    ]


def scaled(_: str) -> list[Contender]:
    """Chains that sum what they are about to apply, and scale it."""
    made: dict[str, Any] = {
        "optax.lamb": optax.lamb(RATE),
        "chains.adam, cautious": chains.adam(RATE, caution="clamped_mean"),
    }
    ways = {"compiled": True, "eager": False}
    return [
        Contender("torch fused", partial(torch.optim.AdamW, lr=RATE, fused=True), "torch fused"),
        *(
            Contender(f"{name}, {way}", bridge(chain, compile=compile), "torch fused")
            for way, compile in ways.items()
            for name, chain in made.items()
        ),
    ]


def muon() -> list[Contender]:
    return [
        Contender(
            "torch.optim.Muon",
            partial(torch.optim.Muon, lr=0.02, weight_decay=0.0),
            "torch.optim.Muon",
        ),
        *(
            Contender(
                f"chains.muon, bf16, {'compiled' if compile else 'eager'}",
                bridge(chains.muon(0.02, ns_dtype="bfloat16"), compile=compile),
                "torch.optim.Muon",
                0.75,
            )
            for compile in (True, False)
        ),
    ]


def parameters(shapes: Sequence[tuple[int, ...]], grads: list[torch.Tensor]):
    generator = torch.Generator().manual_seed(1)
    params = []
    for shape, grad in zip(shapes, grads, strict=True):
        p = torch.nn.Parameter(torch.empty(shape).normal_(0, 0.02, generator=generator))
        p.grad = grad
        params.append(p)
    return params


def show_steps(
    table: str, shapes, contenders: list[Contender], inner: int, rounds: int, json_path: Path | None
) -> None:
    """Times `rounds` turns of `inner` steps each; a name that comes again has another yardstick."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.empty(shape).normal_(0, 1e-2, generator=generator) for shape in shapes]
    makers = {c.name: c.make for c in contenders}
    steps = {name: make(parameters(shapes, grads)).step for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(inner):
                step()
            if round_ >= 2:  # compiled, and the memory touched
                times[name].append((time.perf_counter() - start) / inner)
    count = sum(map(math.prod, shapes))
    title = f"{len(shapes)} tensors, {count / 1e6:.2f}M parameters, {rounds} rounds"
    print(f"\n{table}: {title}")
    rows = []
    print(f"{'':34}{'ms':>9}{'ratio':>8}{'to':>26}{'target':>8}")
    for c in contenders:
        pairs = zip(times[c.name], times[c.yardstick], strict=True)
        ratio = statistics.median(mine / other for mine, other in pairs)
        ms = statistics.median(times[c.name]) * 1e3
        target = "" if c.target is None else f"{c.target:.2f}"
        print(f"{c.name:34}{ms:9.2f}{ratio:8.2f}{c.yardstick:>26}{target:>8}", flush=True)
        rows.append(row(c.name, ms, ratio, c.yardstick))
    keep(json_path, table, title, rows)


FIRST: dict[str, Callable[[float], Any]] = {"optax.adamw": optax.adamw, "chains.stam": chains.stam}
"""Chains of which the first step is timed."""


def first_step(name: str, listed: str) -> None:
    """Prints as JSON how long this process took to make a compiled bridge and to take a first step."""
    grads = [torch.zeros(shape) for shape in LISTS[listed]]
    params = parameters(LISTS[listed], grads)
    times = [time.perf_counter()]
    importlib.import_module("torch._dynamo")  # as the first torch optimizer of a process does
    importlib.import_module("torch._inductor.compile_fx")
    times.append(time.perf_counter())
    optimizer = TorchBridge(FIRST[name](RATE), params, compile=True)
    times.append(time.perf_counter())
    optimizer.step()
    times.append(time.perf_counter())
    names = ("imports", "lowering", "compiling")
    print(json.dumps({n: b - a for n, a, b in zip(names, times, times[1:], strict=False)}))


def show_compilation(json_path: Path | None) -> None:
    rows = []
    print("\nFrom the constructor to the end of the first compiled step, seconds")
    print("imports: of torch's own compiler, which any `torch.compile` pays; not in the sum")
    print(f"{'':28}{'imports':>9}{'lowering':>10}{'compiling':>11}{'sum':>7}{'target':>8}")
    for name, listed in itertools.product(FIRST, ("gpt", "small")):
        with tempfile.TemporaryDirectory() as cache:
            for disk, target in (("cold", 4), ("warm", 1.2)):
                script = [sys.executable, __file__, "--first-step", name, listed]
                env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                found = subprocess.run(script, env=env, capture_output=True, text=True, check=True)
                seconds = json.loads(found.stdout)
                total = seconds["lowering"] + seconds["compiling"]
                label = f"{name}, {listed}, {disk}"
                print(
                    f"{label:28}{seconds['imports']:9.2f}{seconds['lowering']:10.2f}"
                    f"{seconds['compiling']:11.2f}{total:7.2f}{target:8}",
                    flush=True,
                )
                rows.append(row(label, 1e3 * total))
    keep(json_path, "compilation", "the first compiled step", rows)


def show_lowering() -> None:
    """Tracing and lowering, the time before any compiler, on lists of 10, 100 and 1000 tensors."""
    print("\nTracing and lowering of optax.adamw, eager bridge")
    print(f"{'tensors':>8}{'seconds':>9}{'ms a tensor':>13}")
    for count in (10, 100, 1000):
        seen = []
        for _ in range(3):
            params = [torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(count)]
            start = time.perf_counter()
            TorchBridge(optax.adamw(RATE), params)
            seen.append(time.perf_counter() - start)
        seconds = statistics.median(seen)
        print(f"{count:8}{seconds:9.2f}{seconds / count * 1e3:13.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    def steps(table: str, contenders: Callable[[str], list[Contender]], listed: str, *how: Any):
        inner = 20 if listed == "small" else 1
        show_steps(table, LISTS[listed], contenders(listed), inner, *how)

    tables: dict[str, Callable[[int, Path | None], None]] = {
        f"{title}-{listed}": partial(steps, f"{title}-{listed}", contenders, listed)
        for title, contenders in (("adamw", adamw), ("chains", ours), ("scaled", scaled))
        for listed in ("gpt", "small")
    }
    tables["muon"] = lambda rounds, path: show_steps(
        "muon", MATRICES, muon(), 1, min(rounds, 9), path
    )
    tables["compilation"] = lambda rounds, path: show_compilation(path)
    tables["lowering"] = lambda rounds, path: show_lowering()

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(tables)}; default all")
    parser.add_argument("--rounds", type=int, default=15, help="rounds counted (default 15)")
    parser.add_argument("--json", type=Path, help="also keep the rows of step times there")
    parser.add_argument("--first-step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.first_step:
        first_step(*args.first_step)
        return
    known = {*tables, *(name.split("-")[0] for name in tables)}
    if unknown := set(args.tables) - known:
        parser.error(f"no table {sorted(unknown)}; they are {', '.join(tables)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    for name, show in tables.items():
        if not args.tables or name in args.tables or name.split("-")[0] in args.tables:
            show(args.rounds, args.json)


if __name__ == "__main__":
    main()
