"""Everything about a CUDA device in one run: correctness, graphs, step times, in torch and in JAX.

    PYTHONPATH=src python benchmarks/gpu.py --json gpu.json         # all, at most eight minutes
    PYTHONPATH=src python benchmarks/gpu.py --only replay,muon      # some of the parts
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --quick    # what makes sense without one

It needs torch, JAX, optax and NumPy; neither the package nor its compiled kernel need be installed.
Parts, in this order, each in processes of its own, so that one that breaks the device spoils no other:

- replay: step times of four chains with `compile="reduce-overhead"` against torch's fused AdamW, and their kernels;
- correctness: every chain through the bridge, eager and with `compile="reduce-overhead"`, against the CPU;
- muon, large: step times of Muon, and on 1.3 billion parameters;
- torch: step times as a graph that the user captures, compiled, and op by op;
- jax: jitted chains against the CPU, and their step times against `optax.adamw`;
- graph: host synchronisations of a step, and its replay as a user's CUDA graph against the step itself;
- compile: step times of torch's own compiled AdamW, which may take a minute to compile.

A tolerance is OPERATIONS x (what the float64 result moves when every gradient and parameter moves by
one rounding + one rounding of each value at each step), for each tensor: no stable way to compute a
step does better than such a multiple, and a wrong one misses it by orders of magnitude. Step times are medians over
rounds in which contender and yardstick take turns; a ratio is the median of the rounds' ratios.
Exit status 1: something failed (a missed target does not count).
"""

import argparse
import collections
import functools
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).parent / "speed"))
from shapes import GPT, MATRICES, SMALL

from chainrule import TorchBridge, chain, chains, transforms

STAGES = {
    ("replay",): 100,
    ("correctness",): 70,
    ("muon", "large"): 100,
    ("torch",): 50,
    ("jax",): 40,
    ("graph", "jax checks"): 70,
    ("compile",): 50,
}
"""What runs at the same time, and its share of the time; what a stage leaves is for those behind it."""
SECTIONS = ("replay", "correctness", "muon", "large", "torch", "jax", "graph", "compile")
TIMED = ("replay", "muon", "large", "torch", "compile")
"""Parts in which the bridge is timed; one after the other, since the device is theirs alone."""
REPLAYED: dict[str, Any] = {"compile": "reduce-overhead"}
MARK = "\x1e"
RATE = 1e-3

Shape = tuple[int, ...]
TREE: list[Shape] = [(64, 48), (48,), (33, 17), (5, 3, 4), (1,), ()]
STEPS = 6
OPERATIONS = 64
"""Roundings that may add up in one element, in units of the change that one of them makes."""
SINGLE, HALF = 2.0**-24, 2.0**-8
"""Unit roundoff of float32 and of bfloat16."""
TIES = 1e-3
"""Share of the elements whose code may fall on the other side of a tie, by a rounding before it."""


def gpt(layers: int, width: int, vocabulary: int = 50257, context: int = 2048) -> Iterator[Shape]:
    """The shapes of a transformer with biases."""
    yield from [(vocabulary, width), (context, width)]
    for _ in range(layers):
        yield from [(width,), (width,), (width, 3 * width), (3 * width,)]
        yield from [(width, width), (width,), (width,), (width,)]
        yield from [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    yield from [(width,), (width,)]


LISTS: dict[str, list[Shape]] = {
    "gpt": GPT,
    "small": SMALL,
    "1.3B": list(gpt(24, 2048)),
    "matrices": MATRICES,
    "wide": 6 * [(2048, 2048), (2048, 8192), (8192, 2048)],
    "tiny": [*TREE, *12 * [(64, 64), (64,)]],
    "tiny matrices": 3 * [(64, 64), (64, 128)],
}


# ---- chains ------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A chain to be checked."""

    name: str
    make: Callable[[], Any]
    unit: float = SINGLE
    """Unit roundoff of what it makes of the gradients."""
    operations: float = OPERATIONS
    ties: float = 0.0
    """Share of the elements that need not keep to the tolerance."""
    wide: bool = True
    """Whether float64 computes the same; random draws of float64 are others."""
    on_host: str = ""
    """Why its step reads values on the host, if it does."""


def ours() -> Iterator[Case]:
    rate = 1e-2
    adamw = functools.partial(chains.adam, rate, weight_decay=0.1)
    yield Case("adam", adamw)
    yield Case("nadam", lambda: chains.nadam(rate, weight_decay=0.1))
    yield Case("stam", lambda: chains.stam(rate))
    yield Case("stam_lite", lambda: chains.stam_lite(rate, b1_update_interval=2))
    yield Case("casmo", lambda: chains.casmo(rate, tau_init_steps=3, weight_decay=0.1))
    by_tensor = {"tau_init_steps": 3, "granularity": "parameter", "agar_clamp_factor": 10.0}
    yield Case("casmo, by tensor", lambda: chains.casmo(rate, **by_tensor))
    yield Case("casmo_snr", lambda: chains.casmo_snr(rate, weight_decay=0.1))
    moves = "asks the count whether tensors may change tiers"
    gate = {"gate_warmup_steps": 0, "gate_update_interval": 1}
    yield Case("cosmic", lambda: chains.cosmic(rate, weight_decay=0.1, **gate), on_host=moves)
    yield Case("cosmic, one tier", lambda: chains.cosmic(rate, tiered=False))
    yield Case("cosmic, 8 bits", lambda: chains.cosmic(rate, tiered=False, bits=8), ties=TIES)
    yield Case("grokfast(adam)", lambda: chains.grokfast(adamw()))
    yield Case("orthograd(adam)", lambda: chains.orthograd(adamw()))
    yield Case("magma(adam)", lambda: chains.magma(adamw()), wide=False)
    direction = functools.partial(chains.magma, transforms.scale_by_adam(), learning_rate=rate)
    yield Case("magma(direction)", direction, wide=False)
    yield Case("muon", lambda: chains.muon(rate, weight_decay=0.1))
    half = functools.partial(chains.muon, rate, ns_dtype="bfloat16")
    yield Case("muon, bfloat16", half, unit=HALF, operations=8)  # five rounds, few roundings each
    yield Case(
        "quantized_state(adam, 8 bits)",
        lambda: chain(
            transforms.quantized_state(transforms.scale_by_adam(), 8, 256),
            transforms.decay_and_rate(rate, weight_decay=0.1),
        ),
        ties=TIES,
    )


def theirs() -> Iterator[Case]:
    rate, contrib = 1e-2, optax.contrib
    yield Case("optax.adamw", lambda: optax.adamw(rate))
    yield Case("optax.sgd", lambda: optax.sgd(rate, momentum=0.9, nesterov=True))
    yield Case("optax.lion", lambda: optax.lion(rate))
    yield Case("optax.lamb", lambda: optax.lamb(rate))
    yield Case("optax.adafactor", lambda: optax.adafactor(rate, min_dim_size_to_factor=4))
    yield Case("optax.adabelief", lambda: optax.adabelief(rate))
    yield Case("optax.rmsprop", lambda: optax.rmsprop(rate, momentum=0.9))
    # 1 - b2^t, which it squares and subtracts, has lost ten of its 24 bits at the first steps.
    yield Case("optax.radam", lambda: optax.radam(rate), operations=2.0**10)
    yield Case("optax.adan", lambda: optax.adan(rate))
    noisy = functools.partial(optax.noisy_sgd, rate, key=jax.random.key(3))
    yield Case("optax.noisy_sgd", noisy, wide=False)
    clipped = (optax.clip_by_global_norm(0.5), optax.adamw(rate))
    yield Case("clip, adamw", lambda: optax.chain(*clipped))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 2, 10)
    yield Case("adamw, schedule", lambda: optax.adamw(schedule))
    yield Case("optax.MultiSteps", lambda: optax.MultiSteps(optax.adamw(rate), 2))
    yield Case("apply_if_finite", lambda: optax.apply_if_finite(optax.adamw(rate), 3))
    yield Case("contrib.schedule_free", lambda: contrib.schedule_free_adamw(rate, warmup_steps=2))
    # Its rate is a quotient of two sums over all elements, a rounding a term at worst.
    terms = sum(math.prod(shape) for shape in TREE)
    prodigy = functools.partial(contrib.prodigy, 1.0, estim_lr0=1e-2)
    yield Case("contrib.prodigy", prodigy, operations=2.0 * terms)
    # Five rounds of three products, each a sum over the shorter side.
    yield Case("contrib.muon", lambda: contrib.muon(rate), operations=15.0 * 48)


def cases() -> list[Case]:
    return [*ours(), *theirs()]


def numbers(dtype: Any = np.float32, unit: float = 0.0) -> tuple[list[Any], list[list[Any]]]:
    """Parameters, and gradients for every step; moved by a rounding if there is a `unit`, the gradients' own."""
    rng, signs = np.random.default_rng(0), np.random.default_rng(1)

    def array(shape: Shape, scale: float, unit: float) -> Any:
        plain = np.asarray(scale * rng.standard_normal(shape), np.float32).astype(dtype)
        moved = plain * (1 + unit * signs.choice([-1.0, 1.0], shape)) if unit else plain
        return np.asarray(moved, dtype)

    params = [array(s, 0.5, min(unit, 2 * SINGLE)) for s in TREE]
    return params, [[array(s, 0.1, unit) for s in TREE] for _ in range(STEPS)]


def compared(
    found: Sequence[Any],
    exact: Sequence[Any],
    moved: Sequence[Any],
    *,
    stored: float = SINGLE,
    operations: float = OPERATIONS,
    ties: float = 0.0,
) -> dict[str, Any]:
    """The largest difference from `exact`, also in units of its tolerance, which it must keep to.

    Args:
      found: arrays of parameters and state.
      exact: what they should be.
      moved: what they become where all that goes in moves by a rounding.
      stored: unit roundoff of what they are stored in.
      operations: roundings that may add up.
      ties: share of the elements that do not count.
    """
    errors, largest = [], 0.0
    for x, y, z in zip(found, exact, moved, strict=True):
        sound = np.isfinite(y)
        if not np.array_equal(np.where(sound, 0.0, x), np.where(sound, 0.0, y), equal_nan=True):
            return {"ok": False, "of tolerance": math.inf, "error": math.inf}
        x, y, z = (a[sound] for a in (x, y, z))
        moves = np.abs(z - y).max(initial=0.0) + STEPS * stored * np.abs(y).max(initial=0.0)
        error = np.where(np.isfinite(x), np.abs(x - y), np.inf)
        errors.append(error / (operations * moves) if moves else np.where(error > 0, np.inf, 0.0))
        largest = max(largest, float(error.max(initial=0.0)))
    ordered = np.sort(np.concatenate(errors))
    worst = float(ordered[len(ordered) - 1 - int(ties * len(ordered))])
    return {"ok": worst <= 1, "of tolerance": worst, "error": largest}


# ---- the bridge --------------------------------------------------------------------------------


def bridge_of(make: Callable[[], Any], params: Sequence[Any], **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*compiled kernel is not installed")
        return TorchBridge(make, params, **options)


def torch_params(arrays: Sequence[Any], device: str, dtype: Any = None) -> list[Any]:
    import torch

    tensors = (torch.tensor(a, device=device) for a in arrays)
    return [torch.nn.Parameter(t.to(dtype) if dtype else t) for t in tensors]


def give(params: Sequence[Any], grads: Sequence[Any]) -> None:
    """Fills the gradients, in place where there are some."""
    import torch

    for p, g in zip(params, grads, strict=True):
        value = torch.as_tensor(g).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = value.clone()
        else:
            p.grad.copy_(value)


def tensors_of(optimizer: Any) -> list[Any]:
    """Parameters and state in a fixed order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    entries = (optimizer.state[p] for p in params)
    return [*params, *(state[name] for state in entries for name in sorted(state))]


def values_of(optimizer: Any, params_only: bool = False) -> list[Any]:
    import torch

    tensors = tensors_of(optimizer)
    if params_only:
        tensors = [t for t in tensors if isinstance(t, torch.nn.Parameter)]
    return [t.detach().cpu().double().numpy() for t in tensors]


def trajectory(
    case: Case, device: str, dtype: Any = np.float32, unit: float = 0.0, **options: Any
) -> Any:
    """The bridge after STEPS steps."""
    arrays, grads = numbers(dtype, unit)
    params = torch_params(arrays, device)
    optimizer = bridge_of(case.make, params, **options)
    for step in range(STEPS):
        give(params, grads[step])
        optimizer.step()
    return optimizer


def replays(optimizer: Any) -> int:
    """How many steps of a bridge were replayed as CUDA graphs."""
    return sum(map(int, re.findall(r"(\d+) replayed", optimizer.explain())))


def check_correctness(case: Case, device: str, report: Callable[..., None]) -> None:
    """The bridge on the device, eager and replayed, against float64 on the CPU."""
    coded = case.ties > 0  # codes are no numbers
    dtype = np.float64 if case.wide else np.float32
    unit = case.unit if case.wide else 2 * case.unit  # less would round to nothing
    exact = values_of(trajectory(case, "cpu", dtype), coded)
    moved = values_of(trajectory(case, "cpu", dtype, unit), coded)
    compare = functools.partial(compared, operations=case.operations, ties=case.ties)
    for how, where, options in (
        ("replayed", device, REPLAYED),  # its first steps are those of `compile=True`
        ("eager", device, {}),
        ("CPU", "cpu", {}),
    ):

        def measure(where: str = where, options: dict[str, Any] = options) -> dict[str, Any]:
            start = time.perf_counter()
            optimizer = trajectory(case, where, **options)
            seconds = time.perf_counter() - start
            found = compare(values_of(optimizer, coded), exact, moved)
            if options == REPLAYED and device == "cuda":
                found["replayed"] = replays(optimizer)
                found["ok"] &= found["replayed"] > 0 or bool(case.on_host)
            return {**found, "seconds": seconds}

        report(f"{case.name}, {how}", measure)


def check_special(device: str, report: Callable[..., None]) -> None:
    """What is not a chain of float32: other dtypes, rates that change, absent gradients, random rounding."""
    import torch

    def run(where: str, dtype: Any, change: Any = None, **options: Any) -> Any:
        arrays, grads = numbers()
        params = torch_params(arrays, where, dtype)
        optimizer = bridge_of(functools.partial(chains.adam, 1e-2), params, **options)
        for step in range(4 * STEPS):
            give(params, grads[step % STEPS])
            if change:
                change(optimizer, params, step)
            optimizer.step()
        return optimizer

    def a_rate(optimizer: Any, params: Any, step: int) -> None:
        rate = 1e-2 / (1 + step)
        inside = torch.tensor(rate, device=params[0].device)
        optimizer.param_groups[0]["lr"] = inside if step % 2 else rate

    def an_absence(optimizer: Any, params: Any, step: int) -> None:
        if step % 2:
            params[2].grad = None

    held: list[Any] = []

    def elsewhere(optimizer: Any, params: Any, step: int) -> None:
        held.extend(p.grad for p in params)  # so that no memory is used again
        for p in params:
            p.grad = p.grad.clone()

    def moved(optimizer: Any, params: Any, step: int) -> None:
        if step == 2 * STEPS:
            params[0].data = params[0].data.clone()
            optimizer.load_state_dict(optimizer.state_dict())

    def alike(name: str, dtype: Any, change: Any = None, allow: Any = None, **options: Any) -> None:
        def measure(compile: bool | str) -> dict[str, Any]:
            torch.manual_seed(7)
            expected = values_of(run("cpu", dtype, change, **options), params_only=True)
            torch.manual_seed(7)
            optimizer = run(device, dtype, change, compile=compile, **options)
            result = values_of(optimizer, params_only=True)
            found = compared(result, expected, expected, **(allow or {}))
            if compile and device == "cuda":
                found["replayed"] = replays(optimizer)
                found["ok"] &= found["replayed"] > 0
            return found

        for how, compile in (("replayed", "reduce-overhead"), ("eager", False)):
            report(f"{name}, {how}", functools.partial(measure, compile))

    # Rates and bias corrections are float32 whatever the parameters are, which are rounded once a step.
    rounded = {"operations": 1}
    alike("adam, a parameter that moved", torch.float32, moved)
    alike("adam, float64", torch.float64)
    alike("adam, bfloat16", torch.bfloat16, allow={"stored": HALF, **rounded})
    alike("adam, float16", torch.float16, allow={"stored": 2.0**-11, **rounded})
    # A rounding before it decides one in 2^16 of the random ones.
    ties = OPERATIONS * 4 * STEPS * 2.0**-16
    alike("adam, stochastic rounding", torch.bfloat16, allow={"ties": ties}, rounding="stochastic")
    alike("adam, rates that change", torch.float32, a_rate)
    alike("adam, absent gradients", torch.float32, an_absence)
    alike("adam, gradients elsewhere", torch.float32, elsewhere)
    alike(
        "adam, bfloat16, gradients elsewhere",
        torch.bfloat16,
        elsewhere,
        {"stored": HALF, **rounded},
    )


# ---- graphs and synchronisations ---------------------------------------------------------------


def synchronisations(make: Callable[[], Callable[[], Any]], device: str) -> tuple[int, str]:
    """How often a step makes the host wait for the device, and where first; a step that fails is not made again."""
    import torch

    step = make()
    if device != "cuda":
        step()
        return 0, ""
    torch.cuda.synchronize()
    where = ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        return 0, ""
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        where = tail(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step = make()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen), where


def captured(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """A step as a CUDA graph; three are made before. On a CPU the step itself."""
    import torch

    if device != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def check_graph(case: Case, device: str, report: Callable[..., None]) -> None:
    """Synchronisations, and three replays against three steps from the same state."""
    import torch

    def measure(compile: bool) -> dict[str, Any]:
        arrays, grads = numbers()

        def make() -> Any:
            params = torch_params(arrays, device)
            optimizer = bridge_of(case.make, params, compile=compile)
            give(params, grads[0])
            for _ in range(2):
                optimizer.step()
            return params, optimizer

        count, where = synchronisations(lambda: make()[1].step, device)
        if count:
            return {"ok": bool(case.on_host), "syncs": count, "where": case.on_host or where}
        params, optimizer = make()
        replay = captured(optimizer.step, device)
        tensors = tensors_of(optimizer)
        start = [t.detach().clone() for t in tensors]
        ends = []
        for step in (optimizer.step, replay):
            with torch.no_grad():
                for t, value in zip(tensors, start, strict=True):
                    t.copy_(value)
            for g in grads[1:4]:
                give(params, g)
                step()
            ends.append([t.detach().clone() for t in tensors])
        same = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(*ends, strict=True)]
        stays = all(torch.equal(a, b) for a, b in zip(start, ends[0], strict=True))
        return {"ok": all(same) and not stays, "syncs": 0, "unequal": same.count(False)}

    for compile in (False, True):
        how = "compiled" if compile else "eager"
        report(f"{case.name}, {how}", functools.partial(measure, compile))


def check_rate_in_graph(device: str, report: Callable[..., None]) -> None:
    """A learning rate in a tensor of the device takes effect in a graph that is there already."""
    import torch

    def measure(compile: bool) -> dict[str, Any]:
        params = torch_params(numbers()[0], device)
        optimizer = bridge_of(lambda: chains.adam(1e-2), params, compile=compile)
        rate = optimizer.param_groups[0]["lr"] = torch.tensor(1e-2, device=device)
        give(params, numbers()[1][0])
        replay = captured(optimizer.step, device)
        before = [p.detach().clone() for p in params]
        rate.zero_()
        replay()
        stay = all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        rate.fill_(1e-2)
        replay()
        move = not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        return {"ok": stay and move}

    for compile in (False, True):
        how = "compiled" if compile else "eager"
        report(f"a rate in a tensor, {how}", functools.partial(measure, compile))


# ---- step times --------------------------------------------------------------------------------


class Contender(NamedTuple):
    """An optimizer to be timed beside a yardstick."""

    name: str
    make: Callable[[list[Any]], Callable[[], Any]]
    """From parameters to a step."""
    target: float | None = None


def torch_lists(
    part: str, device: str, quick: bool
) -> Iterator[tuple[str, Contender, list[Contender]]]:
    """Of a part: name of a list, its yardstick, and what is timed against it."""
    import torch

    adamw = functools.partial(torch.optim.AdamW, lr=RATE)
    fused = Contender("torch fused", lambda p: adamw(p, fused=True).step)
    capturable = functools.partial(adamw, capturable=True)
    made: dict[str, tuple[Callable[[], Any], float]] = {
        "optax.adamw": (lambda: optax.adamw(RATE), 1.05),
        "chains.stam": (lambda: chains.stam(RATE), 1.4),
        "chains.casmo": (lambda: chains.casmo(RATE), 1.4),
        "chains.magma(adamw)": (lambda: chains.magma(optax.adamw(RATE)), 1.4),
    }

    def bridge(make: Callable[[], Any], graph: bool = False, **options: Any) -> Any:
        def step_of(params: list[Any]) -> Callable[[], Any]:
            step = bridge_of(make, params, **options).step
            return captured(step, device) if graph else step

        return step_of

    def contenders(*hows: str) -> Iterator[Contender]:
        for how in hows:
            options: dict[str, Any] = {"compile": "compiled" in how, "graph": "graph" in how}
            options |= REPLAYED if how == "replayed" else {}
            for name, (make, target) in made.items():
                yield Contender(f"{name}, {how}", bridge(make, **options), target)

    def elsewhere(make: Callable[[], Any]) -> Any:
        """Steps whose gradients never lie where they lay in the last nine."""

        def step_of(params: list[Any]) -> Callable[[], Any]:
            step = bridge_of(make, params, **REPLAYED).step
            sets = [[p.grad for p in params], *([p.grad.clone() for p in params] for _ in range(9))]
            at = 0

            def run() -> None:
                nonlocal at
                at = (at + 1) % len(sets)
                for p, grad in zip(params, sets[at], strict=True):
                    p.grad = grad
                step()

            for _ in range(len(sets)):  # until one graph copies them
                run()
            return run

        return step_of

    def compiled_torch(params: list[Any]) -> Callable[[], Any]:
        return torch.compile(adamw(params).step, fullgraph=False)

    foreach = Contender("torch foreach", lambda p: adamw(p, foreach=True).step)
    own_graph = Contender(
        "torch fused, graph", lambda p: captured(capturable(p, fused=True).step, device)
    )
    lists = ("tiny",) if quick else ("gpt", "small")
    if part == "replay":
        copied = Contender("optax.adamw, replayed, copies", elsewhere(made["optax.adamw"][0]))
        yield lists[0], fused, [*contenders("replayed"), own_graph, copied]
        for name in lists[1:]:
            yield name, fused, [*contenders("replayed"), own_graph]
    elif part == "muon":
        muon = Contender(
            "torch.optim.Muon", lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.0).step
        )

        def orthogonal(dtype: str | None) -> Callable[[], Any]:
            return lambda: chains.muon(0.02, ns_dtype=dtype)

        half = orthogonal("bfloat16")
        muons = [
            Contender("chains.muon, bf16, replayed", bridge(half, **REPLAYED), 0.7),
            Contender("chains.muon, bf16, eager", bridge(half), 0.7),
            Contender("chains.muon, f32, replayed", bridge(orthogonal(None), **REPLAYED)),
            Contender("chains.muon, bf16, compiled", bridge(half, compile=True), 0.7),
        ]
        names = ("tiny matrices",) if quick else ("matrices", "wide")
        for some in (muons[:2], muons[2:]):
            for name in names:
                yield name, muon, some
    elif part == "large":
        as_it_is = [*contenders("compiled")][:2]
        yield "tiny" if quick else "1.3B", fused, [*contenders("replayed"), foreach, *as_it_is]
    elif part == "compile":
        slow = Contender("torch.compile(AdamW.step)", compiled_torch)
        for name in lists:
            yield name, fused, [slow]
    else:
        hows = ("compiled",) if quick else ("compiled, graph", "compiled", "eager", "eager, graph")
        for how in hows:
            for name in lists:
                yield name, fused, [*contenders(how), *([foreach] if how == "compiled" else [])]


def torch_arrays(shapes: Sequence[Shape], device: str) -> list[Any]:
    """Parameters with gradients."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        p = torch.nn.Parameter(
            torch.empty(shape, device=device).normal_(0, 0.02, generator=generator)
        )
        p.grad = torch.empty(shape, device=device).normal_(0, 1e-2, generator=generator)
        params.append(p)
    return params


def alternate(
    mine: Callable[[], Any], other: Callable[[], Any], rounds: int, wait: Callable[[], Any]
) -> dict[str, float]:
    """Milliseconds of two steps that take turns, their ratio, and the host's part of the first."""

    def run(step: Callable[[], Any], times: int) -> tuple[float, float]:
        wait()
        start = time.perf_counter()
        for _ in range(times):
            step()
        launched = time.perf_counter() - start
        wait()
        return (time.perf_counter() - start) / times, launched / times

    inner = [min(50, max(1, round(0.02 / max(run(step, 3)[0], 1e-6)))) for step in (mine, other)]
    turns = [(run(mine, inner[0]), run(other, inner[1])) for _ in range(rounds)]
    return {
        "ms": statistics.median(m[0] for m, _ in turns) * 1e3,
        "host ms": statistics.median(m[1] for m, _ in turns) * 1e3,
        "yardstick ms": statistics.median(o[0] for _, o in turns) * 1e3,
        "ratio": statistics.median(m[0] / o[0] for m, o in turns),
    }


def kernels_of(step: Callable[[], Any]) -> dict[str, Any]:
    """What a step launches on a CUDA device, as the profiler sees it: how many kernels, their time, the longest."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    for event in profile.events() or ():
        if event.device_type.name == "CUDA":
            times = spent.setdefault(event.name[:60], [0, 0.0])
            times[0] += 1
            times[1] += event.time_range.elapsed_us()
    longest = sorted(spent.items(), key=lambda item: -item[1][1])[:8]
    return {
        "kernels": sum(int(count) for count, _ in spent.values()),
        "kernels ms": sum(us for _, us in spent.values()) / 1e3,
        "longest": {name: [int(count), round(us, 1)] for name, (count, us) in longest},
    }


def time_torch(part: str, device: str, quick: bool, report: Callable[..., None]) -> None:
    import torch

    cuda = device == "cuda"
    rounds = 3 if quick else 9
    wait = torch.cuda.synchronize if cuda else lambda: None

    def memory() -> int:
        return torch.cuda.memory_allocated() if cuda else 0

    def waits(contender: Contender, step: Callable[[], Any], params: list[Any]) -> Any:
        """Synchronisations of a step, and where."""
        if "replayed" in contender.name:
            return synchronisations(lambda: step, device)

        def warm() -> Callable[[], Any]:
            step = contender.make(params)
            step()
            step()
            return step

        return synchronisations(warm, device)

    def measure(contender: Contender, yardstick: Contender, params: list[Any]) -> dict[str, Any]:
        before = memory()
        start = time.perf_counter()
        step = contender.make(params)
        step()
        wait()
        first = time.perf_counter() - start
        for _ in range(3):
            step()
        state = memory() - before
        found: dict[str, Any] = {"first s": first, "state MB": state / 1e6}
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            step()
            found["peak MB"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        if "torch" not in contender.name and "graph" not in contender.name:
            found["syncs"], found["where"] = waits(contender, step, params)
        other = yardstick.make(params)
        for _ in range(3):
            other()
        found |= alternate(step, other, rounds, wait)
        if cuda and part in ("replay", "muon"):
            found |= kernels_of(step)
        return {"ok": not found.get("syncs"), "target": contender.target, **found}

    for name, yardstick, contenders in torch_lists(part, device, quick):
        params = torch_arrays(LISTS[name], device)
        for contender in contenders:
            run = functools.partial(measure, contender, yardstick, params)
            report(f"{name}: {contender.name}", run, yardstick=yardstick.name)
            gc.collect()
            if cuda:
                torch.cuda.empty_cache()
        del params


def jax_chains(quick: bool) -> Iterator[tuple[str, Contender, list[Contender]]]:
    made: dict[str, tuple[Callable[[], Any], float | None]] = {
        "adam": (lambda: chains.adam(RATE), 1.1),
        "stam": (lambda: chains.stam(RATE), 1.4),
        "casmo": (lambda: chains.casmo(RATE), 1.4),
        "magma(adamw)": (lambda: chains.magma(optax.adamw(RATE)), 1.4),
        "nadam": (lambda: chains.nadam(RATE), 1.1),
        "stam_lite": (lambda: chains.stam_lite(RATE), 1.1),
        "casmo_snr": (lambda: chains.casmo_snr(RATE), 1.4),
        "grokfast(adamw)": (lambda: chains.grokfast(optax.adamw(RATE)), None),
        "orthograd(adamw)": (lambda: chains.orthograd(optax.adamw(RATE)), None),
        "cosmic, one tier": (lambda: chains.cosmic(RATE, tiered=False), None),
    }
    muons = {
        "muon, bf16": lambda: chains.muon(0.02, ns_dtype="bfloat16"),
        "muon, f32": lambda: chains.muon(0.02),
    }

    def contender(name: str, make: Callable[[], Any], target: float | None = None) -> Contender:
        return Contender(name, lambda shapes: jax_step(make(), shapes), target)

    all_of = [contender(f"chains.{n}", make, target) for n, (make, target) in made.items()]
    adamw = contender("optax.adamw", lambda: optax.adamw(RATE))
    yield "tiny" if quick else "gpt", adamw, all_of[: 4 if quick else None]
    other = contender("optax.contrib.muon", lambda: optax.contrib.muon(0.02))
    mine = [contender(f"chains.{n}", make) for n, make in muons.items()]
    yield "tiny matrices" if quick else "matrices", other, mine
    if not quick:
        yield "small", adamw, all_of[:4]


def jax_step(tx: Any, shapes: Sequence[Shape]) -> Callable[[], Any]:
    """A jitted step, parameters and state donated; it returns what to wait for."""
    key = jax.random.key(0)

    @jax.jit
    def make() -> list[jax.Array]:
        keys = (jax.random.fold_in(key, i) for i in range(len(shapes)))
        return [0.02 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]

    params, grads = make(), make()
    state = jax.jit(tx.init)(params)
    update = optax.with_extra_args_support(tx).update

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def run() -> None:
        nonlocal params, state
        params, state = step(params, state, grads)
        pending.append(params[-1])

    return run


pending: collections.deque[Any] = collections.deque(maxlen=1)
"""The last result in JAX, which comes when all before it are there: a device runs in order."""


def time_jax(quick: bool, report: Callable[..., None]) -> None:
    def wait() -> None:
        jax.block_until_ready(list(pending))

    def measure(contender: Contender, yardstick: Contender, shapes: list[Any]) -> dict[str, Any]:
        start = time.perf_counter()
        step = contender.make(shapes)
        step()
        wait()
        first = time.perf_counter() - start
        other = yardstick.make(shapes)
        for _ in range(2):
            step()
            other()
        wait()
        found = alternate(step, other, 3 if quick else 9, wait)
        return {"ok": True, "target": contender.target, "first s": first, **found}

    for name, yardstick, contenders in jax_chains(quick):
        for contender in contenders:
            run = functools.partial(measure, contender, yardstick, LISTS[name])
            report(f"{name}: {contender.name}", run, yardstick=yardstick.name)


def check_jax(some: Sequence[Case], report: Callable[..., None]) -> None:
    """Jitted chains on the default device against float64 on the CPU."""
    cpu = jax.devices("cpu")[0]

    def run(case: Case, device: Any, dtype: Any = np.float32, unit: float = 0.0) -> list[Any]:
        with jax.default_device(device), jax.enable_x64(dtype == np.float64):
            arrays, grads = jax.tree.map(jnp.asarray, numbers(dtype, unit))
            tx = case.make()
            tx = tx.gradient_transformation() if hasattr(tx, "gradient_transformation") else tx
            update = optax.with_extra_args_support(tx).update

            @jax.jit
            def step(params: Any, state: Any, g: Any) -> Any:
                updates, state = update(g, state, params)
                return optax.apply_updates(params, updates), state

            state = tx.init(arrays)
            with jax.default_matmul_precision("highest"):
                for g in grads:
                    arrays, state = step(arrays, state, g)
            return [np.asarray(x, np.float64) for x in arrays]

    def measure(case: Case) -> dict[str, Any]:
        dtype = np.float64 if case.wide else np.float32
        exact = run(case, cpu, dtype)
        moved = run(case, cpu, dtype, case.unit if case.wide else 2 * case.unit)
        found = run(case, jax.devices()[0])
        return compared(found, exact, moved, operations=case.operations, ties=case.ties)

    for case in some:
        report(f"{case.name}, jitted", functools.partial(measure, case))


def check_beside_jax(device: str, report: Callable[..., None]) -> None:
    """The bridge where JAX, too, has the device: traced there, and run by XLA over DLPack."""

    def measure(case: Case, options: dict[str, Any]) -> dict[str, Any]:
        exact = values_of(trajectory(case, "cpu"), params_only=True)
        found = values_of(trajectory(case, device, **options), params_only=True)
        return compared(found, exact, exact)

    for case in ours():
        if case.name in ("adam", "magma(adam)"):
            for how, options in (("eager", {}), ("XLA", {"engine": "xla"})):
                report(f"{case.name}, {how}, beside JAX", functools.partial(measure, case, options))


# ---- processes and reports ---------------------------------------------------------------------


def tail(error: BaseException) -> str:
    """The end of a traceback: the last frames, and the message."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    places = "; ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)
    return f"{type(error).__name__}: {str(error).strip()[:400]} [{places}]"


class Reporter:
    """Runs measurements, and hands each result to the parent process as a line."""

    def __init__(self, section: str, deadline: float):
        self.section, self.deadline = section, deadline

    def __call__(self, name: str, measure: Callable[[], dict[str, Any]], **more: Any) -> None:
        record: dict[str, Any] = {"section": self.section, "name": name, **more}
        if time.time() > self.deadline:
            record["skipped"] = "no time left"
        else:
            try:
                record |= measure()
            except Exception as error:  # each failure is a result; the exit status tells
                record |= {"ok": False, "failure": tail(error)}
        print(MARK + json.dumps(record), flush=True)


def environment(section: str, device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.version.split()[0], "jax": jax.__version__}
    found |= {"optax": optax.__version__, "numpy": np.__version__}
    if section == "jax":
        return found | {"device": str(jax.devices()[0])}
    import torch

    from chainrule import native

    found |= {"torch": torch.__version__, "kernel": native._kernel is not None}
    if device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        found["copy GB/s"] = copy_rate()
    return found


def copy_rate() -> float:
    """Gigabytes a second that a copy reads and writes: what a step that moves memory can reach."""
    import torch

    x = torch.empty(1 << 28, device="cuda").normal_()
    y = torch.empty_like(x)
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        y.copy_(x)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * x.nbytes / min(times) / 1e9


def work(args: argparse.Namespace) -> None:
    """A section, in a process of its own."""
    section, device = args.work, args.device

    def reporter(name: str) -> Reporter:
        return Reporter(name, args.deadline)

    part, parts = args.part
    if part == 0:
        reporter(section)("environment", lambda: {"ok": True, **environment(section, device)})
    mine = cases()[part::parts][: 1 if args.quick else None]
    if section == "correctness":
        if part == parts - 1:  # it has the fewest chains
            check_special(device, reporter(section))
        for case in mine:
            check = functools.partial(check_correctness, case, device, reporter(section))
            guarded(check, case.name, reporter(section))
    elif section == "graph":
        for case in mine:
            check_graph(case, device, reporter(section))
        if part == 0:
            check_rate_in_graph(device, reporter(section))
    elif section in TIMED:
        time_torch(section, device, args.quick, reporter(section))
    elif section == "jax":
        time_jax(args.quick, reporter(section))
    elif section == "jax checks":
        check_jax(ours_of(args), reporter("jax"))
        if part == 0:
            check_beside_jax(device, reporter("jax"))


def ours_of(args: argparse.Namespace) -> list[Case]:
    """Our chains that this process checks."""
    part, parts = args.part
    return list(ours())[part::parts][: 1 if args.quick else None]


def guarded(check: Callable[[], None], name: str, report: Reporter) -> None:
    """Runs a check whose preparation may fail."""
    try:
        check()
    except Exception as error:  # a result as any other
        failure = tail(error)
        report(name, lambda: {"ok": False, "failure": failure})


class Parent:
    """Starts the sections' processes and keeps what they report, on disk after each record."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.records: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    def add(self, record: dict[str, Any]) -> None:
        with self.lock:
            self.records.append(record)
            print(shown(record), flush=True)
            if self.args.json:
                Path(self.args.json).write_text(json.dumps(self.records, indent=1))

    def run(self, sections: Sequence[str], seconds: float, workers: int) -> None:
        """A stage: checks side by side, each in so many processes; timings one after the other."""
        end = time.time() + seconds
        if sections[0] in (*TIMED, "jax"):
            for i, section in enumerate(sections):
                self.listen(section, (end - time.time()) / (len(sections) - i), 0, 1)
            return
        counts = {s: max(1, workers // 3) if s == "jax checks" else workers for s in sections}
        threads = [
            threading.Thread(target=self.listen, args=(section, seconds, part, count))
            for section, count in counts.items()
            for part in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def listen(self, section: str, seconds: float, part: int, parts: int) -> None:
        """One process, to its end; killed half a minute after it should have come to it."""
        args, start = self.args, time.time()
        command = [sys.executable, __file__, "--work", section, "--device", args.device]
        command += ["--deadline", str(start + seconds), "--part", str(part), str(parts)]
        command += ["--quick"] if args.quick else []
        with tempfile.TemporaryFile("w+") as errors:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=variables(section, args),
            )
            late: list[bool] = []
            timer = threading.Timer(seconds + 30, lambda: (late.append(True), process.kill()))
            timer.start()
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARK):
                    self.add(json.loads(line.removeprefix(MARK)))
            code = process.wait()
            timer.cancel()
            errors.seek(0)
            last = errors.read().strip()[-1500:]
        if late and section in TIMED:  # a check that hangs is a failure
            skipped = f"no time left, killed after {time.time() - start:.0f} s"
            self.add({"section": section, "name": "process", "skipped": skipped})
        elif code:
            failure = f"ended with status {code} after {time.time() - start:.0f} s: {last}"
            self.add({"section": section, "name": "process", "ok": False, "failure": failure})


def variables(section: str, args: argparse.Namespace) -> dict[str, str]:
    """JAX must leave the device's memory to torch, and but for its own section need not see it."""
    own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONUNBUFFERED": "1"}
    if not section.startswith("jax") or args.device == "cpu":
        own["JAX_PLATFORMS"] = "cpu"
    if section in ("correctness", "graph", "jax checks"):
        own["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
        own["OMP_NUM_THREADS"] = "2"
    return {**os.environ, **own}


def shown(record: dict[str, Any]) -> str:
    """A record as a line."""
    state = "skipped" if "skipped" in record else "ok" if record.get("ok") else "FAILED"
    line = f"{state:8}{record['section']:12}{record['name']:42}"
    if "ratio" in record:
        target = record.get("target")
        line += f"{record['ms']:9.3f} ms{record['host ms']:9.3f} host{record['ratio']:7.2f} of "
        line += f"{record['yardstick']}" + (f" (target {target})" if target else "")
        line += f", first {record['first s']:.1f} s"
        if "state MB" in record:
            line += f", state {record['state MB']:.0f} MB"
        if "peak MB" in record:
            line += f", peak {record['peak MB']:.0f} MB"
    hidden = {"section", "name", "ok", "ratio", "ms", "host ms", "yardstick", "target", "first s"}
    hidden |= {"state MB", "peak MB", "yardstick ms", "longest"}
    rest = {k: v for k, v in record.items() if k not in hidden and v != ""}
    return line + "".join(
        f"  {k}: {v:.3g}" if isinstance(v, float) else f"  {k}: {v}" for k, v in rest.items()
    )


def show_table(records: Sequence[dict[str, Any]]) -> None:
    print("\nstep times, ms: of the device and the host together, of the host alone")
    columns = ("ms", "host", "ratio", "target", "syncs", "state MB", "peak MB", "first s")
    print(f"{'':46}" + "".join(f"{c:>9}" for c in columns) + "  to")
    for r in records:
        if "ratio" in r:
            target = "" if r.get("target") is None else f"{r['target']:.2f}"
            cells = [f"{r['ms']:.3f}", f"{r['host ms']:.3f}", f"{r['ratio']:.2f}", target]
            cells += [str(r.get("syncs", ""))]
            cells += [f"{r[k]:.0f}" if k in r else "" for k in ("state MB", "peak MB")]
            cells += [f"{r['first s']:.1f}"]
            print(
                f"{r['section']}, {r['name']:40}"[:46].ljust(46)
                + "".join(f"{c:>9}" for c in cells)
                + f"  {r['yardstick']}"
            )
    done = [r for r in records if "ok" in r]
    failed = [r for r in done if not r["ok"]]
    missed = [r for r in records if r.get("target") and r.get("ratio", 0) > r["target"]]
    skipped = sum("skipped" in r for r in records)
    print(
        f"\n{len(done) - len(failed)} ok, {len(failed)} failed, {skipped} skipped; "
        f"{len(missed)} targets missed"
    )
    for r in failed:
        print(shown(r))


def sections(text: str) -> list[str]:
    chosen = text.split(",")
    unknown = set(chosen) - set(SECTIONS)
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown {sorted(unknown)}; they are {', '.join(SECTIONS)}"
        )
    return chosen


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--only",
        type=sections,
        default=list(SECTIONS),
        help=f"of {','.join(SECTIONS)}; default all",
    )
    parser.add_argument("--quick", action="store_true", help="few chains and small lists")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--budget", type=float, default=480, help="seconds in all (default 480)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes of the checks (default by CPUs)"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args)
        return
    parent = Parent(args)
    workers = args.workers or min(6, max(1, (os.cpu_count() or 1) // 2))
    chosen = {*args.only, *(["jax checks"] if "jax" in args.only else [])}
    stages = [
        (mine, share)
        for all_of, share in STAGES.items()
        if (mine := [s for s in all_of if s in chosen])
    ]
    end = time.time() + args.budget
    for i, (names, share) in enumerate(stages):
        left = share / sum(other for _, other in stages[i:]) * (end - time.time())
        parent.run(names, left, workers)
    show_table(parent.records)
    sys.exit(any(not r.get("ok", True) for r in parent.records))


if __name__ == "__main__":
    main()
