"""Step time of `TorchBridge` on DTensors of two ranks, against the same chain on bare shards and torch's optimizers.

    python benchmarks/speed/sharded_step.py                # every table
    python benchmarks/speed/sharded_step.py stam muon      # some of them
    python benchmarks/speed/sharded_step.py --json results/sharded.json    # and keeps their rows

Two processes of one thread each, over gloo on this machine, hold the halves of every tensor, as `fully_shard`
leaves them. "bare" is the chain on the halves as plain tensors: it communicates nothing, and what it computes
of a whole tensor is wrong. "bare + all-reduces" is that step, then the all-reduces of the one on DTensors, on
as many bytes: the least that it can take, and what "to least" compares with; they are timed alone, too.
Contenders take turns on the same gradients; a turn begins when both ranks are there and lasts until the slower
one is done. A ratio is the median over rounds of the time against the yardstick's in the same round. Where the
package `dion` is installed (from its repository, microsoft/dion), its Muon takes part.
"""

import argparse
import importlib.util
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import optax
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).parent))
from results import keep, row
from shapes import LISTS, SMALL

from chainrule import TorchBridge, chains

RATE, RANKS = 1e-3, 2
ALONE, THEN = "all-reduces alone", " + all-reduces"


class Contender(NamedTuple):
    name: str
    make: Callable[[list[torch.nn.Parameter]], Any]
    """Of parameters something with a `step`."""
    yardstick: str
    target: float | None = None
    sharded: bool = True
    """Whether it gets DTensors, else this rank's part of each."""


def pair(name: str, chain: Any, target: float) -> list[Contender]:
    """A chain on DTensors and on bare shards, eager and compiled."""
    rows = []
    for compile, how in ((False, "eager"), (True, "compiled")):
        own = f"{name}, {how}"
        make = partial(bridge, chain, compile)
        rows.append(Contender(f"{own}, bare", make, f"{own}, bare", sharded=False))
        if name != "optax.adamw":  # which tells nobody anything
            floor = partial(AllReduces, chain, compile)
            rows.append(Contender(f"{own}, bare{THEN}", floor, f"{own}, bare"))
        rows.append(Contender(own, make, f"{own}, bare", target))
    if len(rows) > 4:
        rows.append(Contender(ALONE, partial(AllReduces, chain, None), rows[0].name))
    return rows


class AllReduces:
    """The all-reduces of a chain's step, on as many bytes, each behind a step on bare shards; or alone."""

    def __init__(self, chain: Any, compile: bool | None, params: list[torch.nn.Parameter]) -> None:
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as seen:
            TorchBridge(chain, params).step()
        self.sent = [torch.zeros_like(call.args[0]) for call in seen.call_args_list]
        self.bare = None
        if compile is not None:
            own = [torch.nn.Parameter(local(p)) for p in params]
            for p, like in zip(own, params, strict=True):
                p.grad = local(like.grad)
            self.bare = TorchBridge(chain, own, compile=compile)

    def step(self) -> None:
        if self.bare is not None:
            self.bare.step()
        for x in self.sent:
            dist.all_reduce(x)


def local(tensor: Any) -> torch.Tensor:
    return tensor.detach().to_local()


def bridge(chain: Any, compile: bool, params: list[torch.nn.Parameter]) -> TorchBridge:
    return TorchBridge(chain, params, compile=compile)


def tables() -> dict[str, list[Contender]]:
    fused = partial(torch.optim.AdamW, lr=RATE, fused=True)
    beside = [Contender("torch fused AdamW", fused, "optax.adamw, compiled")]
    made: dict[str, tuple[Any, float]] = {
        "optax.adamw": (optax.adamw(RATE), 1.05),
        "stam": (chains.stam(RATE), 1.3),
        "casmo": (chains.casmo(RATE), 1.3),
        "magma(adamw)": (chains.magma(optax.adamw(RATE)), 1.3),
    }
    found = {
        name.partition("(")[0].rpartition(".")[2]: pair(name, chain, target)
        for name, (chain, target) in made.items()
    }
    found["adamw"] += beside
    theirs = partial(torch.optim.Muon, lr=0.02, weight_decay=0.0)
    muon = chains.muon(0.02, ns_dtype="bfloat16")
    found["muon"] = [
        Contender("torch.optim.Muon", theirs, "torch.optim.Muon"),
        *(
            Contender(
                f"chains.muon, bf16, {how}", partial(bridge, muon, compile), "torch.optim.Muon", 0.7
            )
            for compile, how in ((False, "eager"), (True, "compiled"))
        ),
    ]
    if importlib.util.find_spec("dion"):
        found["muon"].append(Contender("dion.Muon", _dion, "torch.optim.Muon"))
    return found


def _dion(params: list[torch.nn.Parameter]) -> Any:
    from dion import Muon  # pyright: ignore[reportMissingImports]

    return Muon(params, params[0].device_mesh, lr=0.02, weight_decay=0.0, nesterov=True)  # pyright: ignore


def half(shape: tuple[int, ...]) -> tuple[int, ...]:
    """What this rank has of a tensor."""
    part = -(-shape[0] // RANKS)
    start = min(dist.get_rank() * part, shape[0])
    return (min(part, shape[0] - start), *shape[1:])


def parameters(
    shapes: Sequence[tuple[int, ...]], grads: Sequence[torch.Tensor], mesh: Any
) -> list[torch.nn.Parameter]:
    """Parameters with gradients: DTensors if there is a mesh."""

    def laid(own: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if mesh is None:
            return own
        stride = torch.empty(shape, device="meta").stride()
        size = torch.Size(shape)
        return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=size, stride=stride)

    generator = torch.Generator().manual_seed(dist.get_rank() + 1)
    params = []
    for shape, grad in zip(shapes, grads, strict=True):
        own = torch.empty(grad.shape).normal_(0, 0.02, generator=generator)
        p = torch.nn.Parameter(laid(own, shape))
        # Of the parameter's own layout, as `fully_shard` makes gradients.
        p.grad = DTensor(grad, p._spec, requires_grad=False) if isinstance(p, DTensor) else grad
        params.append(p)
    return params


def turn(step: Callable[[], Any], inner: int) -> float:
    """Seconds that a step takes on the slower rank."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(inner):
        step()
    seconds = torch.tensor((time.perf_counter() - start) / inner, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.item()


def show(table: str, name: str, contenders: Sequence[Contender], args: argparse.Namespace) -> None:
    """Times rounds of turns; the first rank prints."""
    shapes = LISTS[name]
    inner = 20 if shapes is SMALL else 1
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    generator = torch.Generator().manual_seed(dist.get_rank())
    grads = [torch.empty(half(shape)).normal_(0, 1e-2, generator=generator) for shape in shapes]
    steps = {
        c.name: c.make(parameters(shapes, grads, mesh if c.sharded else None)).step
        for c in contenders
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(args.rounds + 2):
        for contender, step in steps.items():
            seconds = turn(step, inner)
            if round_ >= 2:  # compiled, and the memory touched
                times[contender].append(seconds)
    if dist.get_rank() > 0:
        return
    count = sum(map(math.prod, shapes))
    title = (
        f"{len(shapes)} tensors, {count / 1e6:.2f}M parameters, {RANKS} ranks, {args.rounds} rounds"
    )
    print(f"\n{table}, {name}: {title}")
    print(f"{'':42}{'ms':>9}{'ratio':>8}{'to least':>10}  {'to':30}{'target':>8}")
    rows = []
    for c in contenders:
        ratio, ms = median_ratio(times, c.name, c.yardstick), statistics.median(times[c.name]) * 1e3
        least = f"{c.yardstick}{THEN}"
        to_least = (
            f"{median_ratio(times, c.name, least):.2f}" if c.target and least in times else ""
        )
        target = "" if c.target is None else f"{c.target:.2f}"
        print(
            f"{c.name:42}{ms:9.2f}{ratio:8.2f}{to_least:>10}  {c.yardstick:30}{target:>8}",
            flush=True,
        )
        rows.append(row(c.name, ms, ratio, c.yardstick))
    keep(args.json, f"{table}-{name}", title, rows)


def median_ratio(times: dict[str, list[float]], own: str, other: str) -> float:
    return statistics.median(x / y for x, y in zip(times[own], times[other], strict=True))


def of_rank(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")  # DTensor warns of what it does itself
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{args.file}", rank=args.rank, world_size=RANKS
    )
    for table, contenders in tables().items():
        if table in args.tables or not args.tables:
            for listed in ["matrices"] if table == "muon" else args.lists:
                show(table, listed, contenders, args)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help="adamw, stam, casmo, magma, muon; default all")
    parser.add_argument("--lists", nargs="*", choices=LISTS, default=["gpt", "small"])
    parser.add_argument("--rounds", type=int, default=15, help="rounds counted (default 15)")
    parser.add_argument("--json", type=Path, help="also keep the rows there")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        of_rank(args)
        return
    print(f"torch {torch.__version__}, {RANKS} ranks of one thread, gloo, CPU", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        own = [sys.executable, __file__, *sys.argv[1:], "--file", f"{folder}/ranks"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*own, "--rank", str(rank)], env=environment) for rank in range(RANKS)
        ]
        try:
            failed = [process.wait() for process in ranks]
        finally:
            for process in ranks:
                process.kill()
    sys.exit(any(failed))


if __name__ == "__main__":
    main()
