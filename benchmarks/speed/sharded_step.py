"""Step time of `TorchBridge` on DTensors of two ranks, against the same chain on bare shards and torch's optimizers.

    python benchmarks/speed/sharded_step.py                # every table
    python benchmarks/speed/sharded_step.py stam muon      # some of them

Two processes of one thread each, over gloo on this machine, hold the halves of every tensor, as
`fully_shard` leaves them. "bare" is the chain on the halves as plain tensors: it communicates nothing,
and what it computes of a whole tensor is wrong. Contenders take turns on the same gradients; a turn
begins when both ranks are there and lasts until the slower one is done. A ratio is the median over
rounds of the time against the yardstick's in the same round.
"""

import argparse
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

import optax
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

sys.path.insert(0, str(Path(__file__).parent))
from shapes import LISTS, MATRICES, SMALL

from chainrule import TorchBridge, chains

RATE, RANKS = 1e-3, 2


class Contender(NamedTuple):
    name: str
    make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    yardstick: str
    target: float | None = None
    sharded: bool = True
    """Whether it gets DTensors, else this rank's part of each."""


def pair(name: str, chain: Any, target: float) -> list[Contender]:
    """A chain on DTensors and on bare shards, eager and compiled."""
    return [
        Contender(
            f"{name}, {how}{bare}",
            partial(bridge, chain, compile),
            f"{name}, {how}, bare",
            limit,
            not bare,
        )
        for compile, how in ((False, "eager"), (True, "compiled"))
        for bare, limit in ((", bare", None), ("", target))
    ]


def bridge(chain: Any, compile: bool, params: list[torch.nn.Parameter]) -> TorchBridge:
    return TorchBridge(chain, params, compile=compile)


def tables() -> dict[str, list[Contender]]:
    fused = partial(torch.optim.AdamW, lr=RATE, fused=True)
    own = "optax.adamw, eager, bare"
    beside = [Contender("torch fused AdamW", fused, own)]
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
    return found


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


def show(
    title: str,
    shapes: Sequence[tuple[int, ...]],
    contenders: Sequence[Contender],
    rounds: int,
    inner: int,
) -> None:
    """Times `rounds` turns of `inner` steps each; the first rank prints."""
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    generator = torch.Generator().manual_seed(dist.get_rank())
    grads = [torch.empty(half(shape)).normal_(0, 1e-2, generator=generator) for shape in shapes]
    steps = {
        c.name: c.make(parameters(shapes, grads, mesh if c.sharded else None)).step
        for c in contenders
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            seconds = turn(step, inner)
            if round_ >= 2:  # compiled, and the memory touched
                times[name].append(seconds)
    if dist.get_rank() > 0:
        return
    count = sum(map(math.prod, shapes))
    print(f"\n{title}: {len(shapes)} tensors, {count / 1e6:.2f}M parameters, {rounds} rounds")
    print(f"{'':34}{'ms':>9}{'ratio':>8}  {'to':30}{'target':>8}")
    for c in contenders:
        pairs = zip(times[c.name], times[c.yardstick], strict=True)
        ratio = statistics.median(mine / other for mine, other in pairs)
        ms = statistics.median(times[c.name]) * 1e3
        target = "" if c.target is None else f"{c.target:.2f}"
        print(f"{c.name:34}{ms:9.2f}{ratio:8.2f}  {c.yardstick:30}{target:>8}", flush=True)


def of_rank(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")  # DTensor warns of what it does itself
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{args.file}", rank=args.rank, world_size=RANKS
    )
    for name, contenders in tables().items():
        if args.tables and name not in args.tables:
            continue
        if name == "muon":
            show("muon", MATRICES, contenders, min(args.rounds, 9), 1)
            continue
        for listed in args.lists:
            inner = 20 if LISTS[listed] is SMALL else 1
            show(f"{name}, {listed}", LISTS[listed], contenders, args.rounds, inner)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", help="adamw, stam, casmo, magma, muon; default all")
    parser.add_argument("--lists", nargs="*", choices=LISTS, default=["gpt", "small"])
    parser.add_argument("--rounds", type=int, default=15, help="rounds counted (default 15)")
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
