"""Jitted step time of each chain against `optax.adamw`, and against the original where it is installed.

    python benchmarks/speed/jax_step.py --list gpt

Every step is jitted with parameters and state donated, gradients fixed; the contenders take turns
and the ratio is the
median over rounds of (contender / adamw in the same round).
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
from shapes import LISTS

from chainrule import chains


def original_stam():
    """The STAM repository's own optimizer, or `None` where it is not installed."""
    if importlib.util.find_spec("stam_optimizer") is None:
        return None
    from stam_optimizer import stam

    return stam(1e-3)


LIMITS = {"adam": 1.1, "nadam": 1.1, "stam_lite": 1.1, "stam": 1.4, "casmo": 1.7, "casmo_snr": 1.7}


def contenders():
    # The yardstick is first. Limits are the project's own targets; None: shown without a target.
    yield "optax.adamw", optax.adamw(1e-3), None
    for name, limit in LIMITS.items():
        if hasattr(chains, name):
            yield f"chains.{name}", getattr(chains, name)(1e-3), limit
    if hasattr(chains, "magma"):
        yield "chains.magma(adamw)", chains.magma(optax.adamw(1e-3)), 1.4
    if (tx := original_stam()) is not None:
        yield "original STAM", tx, None


class Stepper:
    """One contender's jitted step with its own parameters and state."""

    def __init__(self, tx, shapes):
        key = jax.random.key(0)
        self.params = [
            jax.random.normal(jax.random.fold_in(key, i), s) * 0.02 for i, s in enumerate(shapes)
        ]
        self.state = jax.jit(tx.init)(self.params)
        tx = optax.with_extra_args_support(tx)

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = jax.jit(step, donate_argnums=(0, 1))

    def __call__(self, grads) -> float:
        start = time.perf_counter()
        self.params, self.state = jax.block_until_ready(self.step(self.params, self.state, grads))
        return time.perf_counter() - start


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", choices=["gpt", "small"], default="gpt", help="parameter list (default gpt)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds counted (default 15)")
    parser.add_argument("--only", nargs="*", help="names of contenders to time beside optax.adamw")
    args = parser.parse_args(argv)

    shapes = LISTS[args.list]
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(s, np.float32) * 1e-2) for s in shapes]
    rows = [
        (name, Stepper(tx, shapes), limit)
        for name, tx, limit in contenders()
        if limit is None or not args.only or name.removeprefix("chains.") in args.only
    ]
    times = {name: [] for name, _, _ in rows}
    for round_ in range(args.rounds + 2):
        for name, stepper, _ in rows:
            seconds = stepper(grads)
            if round_ >= 2:  # compiled, and the memory touched
                times[name].append(seconds)
    base = times[rows[0][0]]
    count = sum(int(np.prod(s)) for s in shapes)
    print(
        f"{args.list}: {len(shapes)} tensors, {count / 1e6:.2f}M parameters, "
        f"{jax.default_backend()}, {args.rounds} rounds"
    )
    print(f"{'':24}{'ms':>9}{'ratio':>8}{'target':>8}")
    for name, _, limit in rows:
        ratio = statistics.median(t / b for t, b in zip(times[name], base, strict=True))
        target = "" if limit is None else f"{limit:.2f}"
        print(f"{name:24}{statistics.median(times[name]) * 1e3:9.2f}{ratio:8.2f}{target:>8}")


if __name__ == "__main__":
    main()
