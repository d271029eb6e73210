"""Jitted step time of each chain against `optax.adamw`, and of the originals that are installed.

    python benchmarks/speed/jax_step.py --list gpt
    python benchmarks/speed/jax_step.py --list gpt --fused

Every step is jitted with parameters and state donated, gradients fixed (an original that is a torch
optimizer: eager); the contenders take turns and the ratio is the median over rounds of (contender /
adamw in the same round). The originals: `pip install stam-optimizer magma-optimizer`. `--fused`: steps by XLA and
by `chainrule.fused`, against torch's own fused AdamW.
"""

import argparse
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parent))
from results import keep, row
from shapes import LISTS

from chainrule import chains, fused

LIMITS = {"adam": 1.1, "nadam": 1.1, "stam_lite": 1.1, "stam": 1.4, "casmo": 1.7, "casmo_snr": 1.7}


def contenders():
    # The yardstick is first. Limits are the project's own targets; None: shown without a target.
    yield "optax.adamw", optax.adamw(1e-3), None
    for name, limit in LIMITS.items():
        if hasattr(chains, name):
            yield f"chains.{name}", getattr(chains, name)(1e-3), limit
    if hasattr(chains, "magma"):
        yield "chains.magma(adamw)", chains.magma(optax.adamw(1e-3)), 1.4


def originals():
    """The published optimizers that are installed, each with what makes a stepper of shapes."""
    if importlib.util.find_spec("stam_optimizer") is not None:
        from stam_optimizer import stam, stam_lite

        yield "original STAM", lambda shapes: Stepper(stam(1e-3), shapes)
        yield "original STAMLite", lambda shapes: Stepper(stam_lite(1e-3), shapes)
    if importlib.util.find_spec("magma") is not None:
        import torch
        from magma import Magma

        yield (
            "original Magma (torch)",
            lambda shapes: TorchStepper(lambda p: Magma(torch.optim.AdamW(p, 1e-3)), shapes),
        )


def by_loops(shapes):
    """Steps by XLA and the same by `chainrule.fused`; torch's fused AdamW, the yardstick, is first."""
    import torch

    yield (
        "torch fused",
        TorchStepper(lambda p: torch.optim.AdamW(p, 1e-3, fused=True), shapes),
        None,
    )
    found = {"optax.adamw": optax.adamw, "optax.nadamw": optax.nadamw}
    found |= {f"chains.{name}": getattr(chains, name) for name in ("stam_lite", "stam", "casmo")}
    for name, make in found.items():
        yield name, Stepper(make(1e-3), shapes), None
        limit = 1.3 if name == "optax.adamw" else None
        yield f"{name}, fused", Stepper(make(1e-3), shapes, fused), limit


def by_xla(tx):
    """The step of a chain as optax's users write it."""
    tx = optax.with_extra_args_support(tx)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def by_chain(shapes, only):
    for name, tx, limit in contenders():
        if limit is None or not only or name.removeprefix("chains.").split("(")[0] in only:
            yield name, Stepper(tx, shapes), limit
    for name, make in originals():
        yield name, make(shapes), None


class Stepper:
    """One contender's jitted step with its own parameters and state."""

    def __init__(self, tx, shapes, step=by_xla):
        key = jax.random.key(0)
        self.params = [
            jax.random.normal(jax.random.fold_in(key, i), s) * 0.02 for i, s in enumerate(shapes)
        ]
        self.state = jax.jit(tx.init)(self.params)
        self.step = jax.jit(step(tx), donate_argnums=(0, 1))

    def __call__(self, grads) -> float:
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state, grads))
        return time.perf_counter() - start


class TorchStepper:
    """The step of a torch optimizer, eager, with its own parameters."""

    def __init__(self, make, shapes):
        import torch

        self.params = [torch.nn.Parameter(torch.randn(s) * 0.02) for s in shapes]
        self.optimizer = make(self.params)

    def __call__(self, grads) -> float:
        import torch

        for p, g in zip(self.params, grads, strict=True):
            if p.grad is None:
                p.grad = torch.tensor(np.asarray(g))
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", choices=["gpt", "small"], default="gpt", help="parameter list (default gpt)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds counted (default 15)")
    parser.add_argument("--json", type=Path, help="also keep the rows there")
    parser.add_argument("--only", nargs="*", help="names of contenders to time beside optax.adamw")
    parser.add_argument(
        "--fused", action="store_true", help="steps by `chainrule.fused` beside XLA's"
    )
    args = parser.parse_args(argv)

    shapes = LISTS[args.list]
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(s, np.float32) * 1e-2) for s in shapes]
    rows = list(by_loops(shapes) if args.fused else by_chain(shapes, args.only))
    times = {name: [] for name, _, _ in rows}
    for round_ in range(args.rounds + 2):
        for name, stepper, _ in rows:
            seconds = stepper(grads)
            if round_ >= 2:  # compiled, and the memory touched
                times[name].append(seconds)
    base = times[rows[0][0]]
    count = sum(int(np.prod(s)) for s in shapes)
    title = f"{len(shapes)} tensors, {count / 1e6:.2f}M parameters, {args.rounds} rounds"
    print(f"{args.list}: {title}, {jax.default_backend()}")
    kept = []
    print(f"{'':24}{'ms':>9}{'ratio':>8}{'target':>8}")
    for name, _, limit in rows:
        ratio = statistics.median(t / b for t, b in zip(times[name], base, strict=True))
        target = "" if limit is None else f"{limit:.2f}"
        ms = statistics.median(times[name]) * 1e3
        print(f"{name:24}{ms:9.2f}{ratio:8.2f}{target:>8}")
        kept.append(row(name, ms, ratio, rows[0][0]))
    keep(args.json, f"fused-{args.list}" if args.fused else args.list, title, kept)


if __name__ == "__main__":
    main()
