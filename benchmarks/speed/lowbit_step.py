"""Step time of `quantized_state` around any chain in `TorchBridge`, its state, and the first compiled step.

    python benchmarks/speed/lowbit_step.py                 # every table
    python benchmarks/speed/lowbit_step.py adam            # step times of Adam
    python benchmarks/speed/lowbit_step.py chains          # of other chains in 8 and 4 bits

Against torch's fused AdamW, and the low-bit AdamW of torchao and bitsandbytes where they are installed.
"""

import argparse
import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import optax
import torch

sys.path.insert(0, str(Path(__file__).parent))
from results import keep, row
from shapes import LISTS
from torch_step import RATE, Contender, bridge, parameters, show_steps

import chainrule as cr
from chainrule import TorchBridge
from chainrule import transforms as ct

LISTED = "blocks"
FUSED = "torch fused"
TARGETS = {True: 1.3, False: 3.0}


def lowbit(inner: optax.GradientTransformation, bits: int | None) -> Any:
    """The links of AdamW around a transform in codes."""
    return cr.chain(
        ct.quantized_state(inner, bits, 256),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(RATE),
    )


def fused() -> Contender:
    return Contender(FUSED, partial(torch.optim.AdamW, lr=RATE, fused=True), FUSED)


def peers() -> Iterator[Contender]:
    """Low-bit AdamW of other packages, as a user would call it."""
    for module, names in (
        ("torchao.optim", ("AdamW8bit", "AdamW4bit")),
        ("bitsandbytes.optim", ("AdamW8bit",)),
    ):
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            for name in names:
                found = getattr(importlib.import_module(module), name)
                yield Contender(
                    f"{module.partition('.')[0]}.{name}", partial(found, lr=RATE), FUSED
                )


def adam() -> list[Contender]:
    return [
        fused(),
        *(
            Contender(
                f"adam in {bits} bits, {'compiled' if compile else 'eager'}",
                bridge(lowbit(ct.scale_by_adam(), bits), compile=compile),
                FUSED,
                TARGETS[compile],
            )
            for compile in (True, False)
            for bits in (8, 4)
        ),
        *peers(),
    ]


INNERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "lion": optax.scale_by_lion,
    "stam": lambda: cr.chain(ct.adaptive_beta1(), ct.scale_by_adam(b1=None)),
    "casmo": lambda: cr.chain(ct.scale_by_adam(), ct.agar_confidence()),
    "magma": lambda: cr.chain(ct.scale_by_adam(), ct.momentum_alignment_mask()),
}


def chains() -> list[Contender]:
    return [
        fused(),
        *(
            Contender(f"{name} in {bits or 32} bits", bridge(lowbit(make(), bits)), FUSED)
            for name, make in INNERS.items()
            for bits in (None, 8, 4)
        ),
    ]


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        x.nbytes for own in optimizer.state.values() for x in own.values() if torch.is_tensor(x)
    )


def show_state() -> None:
    """Bytes of the state, over those of AdamW."""
    shapes = LISTS[LISTED]
    params = parameters(shapes, [torch.zeros(shape) for shape in shapes])
    full = 8 * sum(map(math.prod, shapes))
    print(f"\nstate over AdamW's {full / 1e6:.0f} MB")
    for bits in (8, 4):
        held = state_bytes(TorchBridge(lowbit(ct.scale_by_adam(), bits), params))
        print(f"adam in {bits} bits {held / full:8.3f}")


def first_step(bits: int) -> None:
    """Prints as JSON how long this process took to make a compiled bridge and to take a first step."""
    params = parameters(LISTS[LISTED], [torch.zeros(shape) for shape in LISTS[LISTED]])
    importlib.import_module("torch._dynamo")  # as the first torch optimizer of a process does
    importlib.import_module("torch._inductor.compile_fx")
    start = time.perf_counter()
    TorchBridge(lowbit(ct.scale_by_adam(), bits), params, compile=True).step()
    print(json.dumps(time.perf_counter() - start))


def show_compilation(path: Path | None) -> None:
    rows = []
    print("\nFrom the constructor to the end of the first compiled step, seconds")
    for bits in (8, 4):
        with tempfile.TemporaryDirectory() as cache:
            for name in ("cold", "warm"):
                script = [sys.executable, __file__, "--first-step", str(bits)]
                env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
                found = subprocess.run(script, env=env, stdout=subprocess.PIPE, check=True)
                label, seconds = f"adam in {bits} bits, {name}", json.loads(found.stdout)
                print(f"{label:24}{seconds:7.2f}", flush=True)
                rows.append(row(label, 1e3 * seconds))
    keep(path, "lowbit-compilation", "the first compiled step of Adam in codes", rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = ("adam", "chains", "state", "compilation")
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(tables)}; default all")
    parser.add_argument("--rounds", type=int, default=9, help="rounds counted (default 9)")
    parser.add_argument("--json", type=Path, help="also keep the rows there")
    parser.add_argument("--first-step", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.first_step:
        first_step(args.first_step)
        return
    if unknown := set(args.tables) - {*tables}:
        parser.error(f"no table {sorted(unknown)}; they are {', '.join(tables)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU")
    wanted = set(args.tables or tables)
    for name, made in (("adam", adam), ("chains", chains)):
        if name in wanted:
            show_steps(f"lowbit-{name}", LISTS[LISTED], made(), 1, args.rounds, args.json)
    if "state" in wanted:
        show_state()
    if "compilation" in wanted:
        show_compilation(args.json)


if __name__ == "__main__":
    main()
