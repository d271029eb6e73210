"""Bytes a second of the native kernel against torch's fused AdamW, and of the same step in XLA.

    python benchmarks/speed/native.py            # everything
    python benchmarks/speed/native.py --quick    # smaller and fewer rounds: a look, not a measurement

Contenders take turns in one process; a ratio is the median over rounds of (contender / yardstick in
the same round). All memory is torch's own, so pages are alike. Bytes an element in float32: AdamW and
tier 2 read p, g and two moments and write all but g, 28; tier 1 reads g twice, once for its mean, 16,
or 12 where the mean is known; tier 0 reads p and g and writes p, 12; with codes in the place of the
first moment, tier 2 is timed against tier 2 without.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

sys.path.insert(0, str(Path(__file__).parent))
from shapes import GPT

from chainrule import native
from chainrule.native import _kernel, xla

MILLION = 1_000_000
BLOCK = 256
STEP = {"learning_rate": 1e-3, "weight_decay": 0.01}
MOMENTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "mu_correction": 0.5, "nu_correction": 0.5}


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            if round_ >= 2:  # compiled, and the memory touched
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: list[float], yardstick: list[float]) -> float:
    return statistics.median(t / y for t, y in zip(times, yardstick, strict=True))


def role(tensors: list[torch.Tensor], name: str):
    dtypes = {torch.float32: "float32", torch.uint8: "uint8"}
    return _kernel.Buffers([(t.data_ptr(), t.numel(), dtypes[t.dtype]) for t in tensors], name)


def kernel_against_torch(title: str, sizes: list[int], rounds: int) -> None:
    """Tiers 2, 1 and 0 against `torch.optim.AdamW(fused=True)`, in bytes a second."""
    generator = torch.Generator().manual_seed(0)
    memory: list[list[torch.Tensor]] = []  # what the raw pointers point to

    def new(name: str, scale: float = 0.0, dtype: torch.dtype = torch.float32, lengths=sizes):
        tensors = [torch.zeros(n, dtype=dtype) for n in lengths]
        if scale:
            for t in tensors:
                t.normal_(0, scale, generator=generator)
        memory.append(tensors)
        return role(tensors, name)

    gradients = new("gradients", 1e-2)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in sizes]
    for p, g in zip(parameters, memory[0], strict=True):
        p.grad = g
    adamw = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, fused=True)

    p, mu, nu = new("parameters", 2e-2), new("mu"), new("nu")
    codes = new("codes", dtype=torch.uint8, lengths=[(n + 1) // 2 for n in sizes])
    scales = new("scales", lengths=[-(-n // BLOCK) for n in sizes])
    magnitudes = new("magnitudes", lengths=[1] * len(sizes))
    tier1 = partial(_kernel.tier1, p, gradients, magnitudes, decay=0.99, **STEP)
    coded = partial(_kernel.tier2_quantized, p, gradients, codes, scales, nu, block=BLOCK)
    contenders = {
        "torch AdamW fused": (adamw.step, 28, None),
        "tier 2": (partial(_kernel.tier2, p, gradients, mu, nu, **STEP, **MOMENTS), 28, 0.95),
        "tier 1": (tier1, 16, 0.85),
        "tier 1, mean known": (partial(tier1, mean_magnitude=1e-2), 12, 0.85),
        "tier 0": (partial(_kernel.tier0, p, gradients, **STEP), 12, 0.85),
        "statistics": (partial(_kernel.statistics, gradients), 4, None),
        "tier 2, 4-bit": (partial(coded, **STEP, **MOMENTS), None, None),
    }
    times = alternate({name: call for name, (call, _, _) in contenders.items()}, rounds)
    count = sum(sizes)
    print(f"\n{title}: {len(sizes)} tensors, {count / MILLION:.1f}M float32, {rounds} rounds")
    print(f"{'':22}{'ms':>9}{'GB/s':>8}{'bytes/s against AdamW':>24}{'at least':>10}")
    for name, (_, width, target) in contenders.items():
        ms = statistics.median(times[name]) * 1e3
        line = f"{name:22}{ms:9.2f}"
        if width is not None:
            share = width / 28 / ratio(times[name], times["torch AdamW fused"])
            line += f"{width * count / ms / 1e6:8.1f}{share:24.2f}"
        print(line + (f"{target:10.2f}" if target else ""))
    slower = ratio(times["tier 2, 4-bit"], times["tier 2"])
    print(f"{'4-bit against tier 2':22}{slower:9.2f}x of the time (at most 3)")


def native_direction(g, mu, nu, count):
    results = xla.tier2([g], [mu], [nu], b1=0.9, b2=0.999, eps=1e-8, nu_correction=1 - 0.999**count)
    assert results.nu is not None
    return results.updates[0], results.mu[0], results.nu[0]


def xla_direction(g, mu, nu, count):
    mu = 0.9 * mu + (1 - 0.9) * g
    nu = 0.999 * nu + (1 - 0.999) * g**2
    return mu / (jnp.sqrt(nu / (1 - 0.999**count)) + 1e-8), mu, nu


def scale_by(direction) -> optax.GradientTransformation:
    def init(params):
        return jnp.zeros([], jnp.int32), jnp.zeros_like(params), jnp.zeros_like(params)

    def update(updates, state, params=None):
        del params
        count, mu, nu = state
        direction_, mu, nu = direction(updates, mu, nu, (count + 1).astype(jnp.float32))
        return direction_, (count + 1, mu, nu)

    return optax.GradientTransformation(init, update)


def chain_in_jit(count: int, rounds: int) -> None:
    """Tier 2 with decay and learning rate in one jitted step, native against the same in XLA."""
    grads = jnp.asarray(np.random.default_rng(0).standard_normal(count, np.float32) * 1e-2)

    def stepper(direction, apply: bool) -> Callable[[], object]:
        tx = optax.chain(
            scale_by(direction), optax.add_decayed_weights(0.01), optax.scale_by_learning_rate(1e-3)
        )

        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            if apply:
                return optax.apply_updates(params, updates), state, None
            return params, state, updates

        jitted = jax.jit(step, donate_argnums=(0, 1))
        held = [jnp.full(count, 0.02), jax.jit(tx.init)(grads)]

        def call() -> None:
            held[0], held[1], _ = jax.block_until_ready(jitted(held[0], held[1], grads))

        return call

    print(
        f"\nIn jit: {count / MILLION:.0f}M float32, parameters and state donated, {rounds} rounds"
    )
    print(f"{'':34}{'native ms':>11}{'XLA ms':>9}{'ratio':>8}")
    for name, apply in (("parameters moved", True), ("updates handed out", False)):
        times = alternate(
            {
                "native": stepper(native_direction, apply),
                "xla": stepper(xla_direction, apply),
            },
            rounds,
        )
        ms = [statistics.median(times[k]) * 1e3 for k in ("native", "xla")]
        share = ratio(times["native"], times["xla"])
        print(f"{name:34}{ms[0]:11.2f}{ms[1]:9.2f}{share:8.2f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the sizes, 3 rounds")
    parser.add_argument("--rounds", type=int, help="rounds counted (default 15, 3 with --quick)")
    args = parser.parse_args(argv)
    rounds = args.rounds or (3 if args.quick else 15)
    share = 4 if args.quick else 1
    sizes = [int(np.prod(shape)) for shape in GPT]

    print(native.info())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; jax {jax.__version__}")
    kernel_against_torch("flat", [40 * MILLION // share], rounds)
    kernel_against_torch("gpt", sizes[2:] if args.quick else sizes, rounds)
    chain_in_jit(20 * MILLION // share, rounds)


if __name__ == "__main__":
    main()
