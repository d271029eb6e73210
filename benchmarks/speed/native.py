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
from results import keep, row
from shapes import GPT

import chainrule
from chainrule import chains, native
from chainrule.native import _kernel

MILLION = 1_000_000
BLOCK = 256
STEP = {"learning_rate": 1e-3, "weight_decay": 0.01}
MOMENTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "mu_correction": 0.5, "nu_correction": 0.5}


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, call in contenders.items():
            time.sleep(
                0.01
            )  # torch's threads wait for work in a loop for some milliseconds, on the other's core
            start = time.perf_counter()
            result = call()
            seconds = time.perf_counter() - start
            del result
            if round_ >= 2:  # compiled, and the memory touched
                times[name].append(seconds)
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


def chain_in_jit(title: str, sizes: list[int], rounds: int) -> None:
    """`chains.cosmic` with every tensor in tier 2, in a jitted step: in the kernel against in XLA.

    With float32 moments the step in XLA is bound by memory, as the kernel is, and the kernel hands out updates that
    are then added in a pass of their own.
    """
    rng = np.random.default_rng(0)
    grads = [jnp.asarray(rng.standard_normal(n, np.float32) * 1e-2) for n in sizes]

    def stepper(kernel: str, apply: bool, bits: int | None) -> Callable[[], object]:
        policy = chainrule.transforms.TierPolicy(fractions={2: 1.0})
        tx = chains.cosmic(1e-3, weight_decay=0.01, policy=policy, bits=bits, kernel=kernel)

        def step(state, params, grads):
            updates, state = tx.update(grads, state, params)
            # What is donated comes first, in its order: so XLA finds the memory it is to go to.
            return state, optax.apply_updates(params, updates) if apply else updates

        jitted = jax.jit(step, donate_argnums=(0, 1) if apply else (0,))
        params = [jnp.full(g.shape, 0.02) for g in grads]
        state = chainrule.retier(jax.jit(tx.init)(params), grads, params)
        held = [state, params]

        def call() -> object:
            held[0], result = jax.block_until_ready(jitted(*held, grads))
            if apply:
                held[1] = result
            return result  # freed when its time has been taken

        return call

    count = sum(sizes)
    print(
        f"\nIn jit, {title}: {len(sizes)} tensors, {count / MILLION:.1f}M float32, {rounds} rounds"
    )
    print(f"{'state donated':44}{'kernel ms':>11}{'XLA ms':>9}{'ratio':>8}{'at most':>9}")
    for bits in (None, 8, 4):
        for name, apply in (("parameters moved, donated too", True), ("updates handed out", False)):
            times = alternate({k: stepper(k, apply, bits) for k in ("native", "xla")}, rounds)
            ms = [statistics.median(times[k]) * 1e3 for k in ("native", "xla")]
            share = ratio(times["native"], times["xla"])
            label = f"{name}, {'float32' if bits is None else f'{bits}-bit'}"
            print(f"{label:44}{ms[0]:11.2f}{ms[1]:9.2f}{share:8.2f}{0.3:9.2f}")


def bridge_against_torch(
    rounds: int, shapes: list[tuple[int, ...]], json_path: Path | None
) -> None:
    """`TorchBridge(chains.cosmic(...))` against `torch.optim.AdamW(fused=True)`, a whole step."""
    torch.manual_seed(0)
    # A vector's gradient sums over every token, a matrix's is spread over its rows: so tiers fall in training.
    gradients = [torch.randn(s) * (1e-2 if len(s) < 2 else 1e-4) for s in shapes]

    def optimizer(make: Callable[..., torch.optim.Optimizer]) -> torch.optim.Optimizer:
        params = [torch.nn.Parameter(torch.randn(s) * 0.02) for s in shapes]
        for p, g in zip(params, gradients, strict=True):
            p.grad = g
        return make(params)

    def cosmic(**settings: object) -> Callable[..., torch.optim.Optimizer]:
        return lambda params: chainrule.TorchBridge(chains.cosmic(**settings), params)  # pyright: ignore

    full = chainrule.TierPolicy({2: 1.0})
    made = {
        "torch AdamW fused": partial(torch.optim.AdamW, lr=1e-3, fused=True),
        "all in tier 2": cosmic(policy=full),
        "default tiers": cosmic(),
        "all in tier 2, 4-bit": cosmic(policy=full, bits=4),
    }
    optimizers = {name: optimizer(make) for name, make in made.items()}
    times = alternate({name: o.step for name, o in optimizers.items()}, rounds)
    count = sum(map(torch.Size.numel, map(torch.Size, shapes)))
    print(
        f"\nTorchBridge(chains.cosmic(...)), gpt: {len(shapes)} tensors, {count / MILLION:.1f}M float32"
    )
    print(f"{'':22}{'ms':>9}{'against':>20}{'ratio':>8}{'at most':>9}")
    rows = []
    for name, yardstick, target in (
        ("torch AdamW fused", None, None),
        ("all in tier 2", "torch AdamW fused", 1.5),
        ("default tiers", "torch AdamW fused", 0.5),
        ("all in tier 2, 4-bit", "all in tier 2", 3.0),
    ):
        line = f"{name:22}{statistics.median(times[name]) * 1e3:9.2f}"
        if yardstick is not None:
            share = ratio(times[name], times[yardstick])
            line += f"{yardstick:>20}{share:8.2f}{target:9.2f}"
            rows.append(row(name, statistics.median(times[name]) * 1e3, share, yardstick))
        print(line)
    keep(json_path, "cosmic", f"{len(shapes)} tensors, {count / MILLION:.1f}M parameters", rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the sizes, 3 rounds")
    parser.add_argument("--rounds", type=int, help="rounds counted (default 15, 3 with --quick)")
    parser.add_argument("--json", type=Path, help="also keep the last table there")
    args = parser.parse_args(argv)
    rounds = args.rounds or (3 if args.quick else 15)
    share = 4 if args.quick else 1
    sizes = [int(np.prod(shape)) for shape in GPT]

    print(native.info())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; jax {jax.__version__}")
    kernel_against_torch("flat", [40 * MILLION // share], rounds)
    kernel_against_torch("gpt", sizes[2:] if args.quick else sizes, rounds)
    chain_in_jit("flat", [20 * MILLION // share], rounds)
    chain_in_jit("gpt", sizes[2:] if args.quick else sizes, rounds)
    bridge_against_torch(2 * rounds, GPT[2:] if args.quick else GPT, args.json)


if __name__ == "__main__":
    main()
