"""The jitted Muon chain against optax.contrib.muon and torch.optim.Muon on 12 matrices of a transformer.

    python benchmarks/speed/muon_step.py

The contenders take turns; a ratio is the median over rounds of the time of `chains.muon`, which iterates
in float32, or in bfloat16 as torch does, against the other's in the same round. Two tables follow that
say what the fast form costs: how far its matrices are from orthonormal, and how far it is from the
iteration in float64, on gradients of four spectra, beside the plain iteration (`gram=False`), which is
the references' form in float32.
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
from shapes import MATRICES

from chainrule import chains
from chainrule.transforms import newton_schulz

LIMITS = {"optax.contrib.muon": 0.35, "torch.optim.Muon": 1.0}
KELLER_JORDAN = (3.4445, -4.7750, 2.0315)


def jax_stepper(tx, grads):
    """A jitted step with its own parameters and state, both donated."""
    params = [jnp.asarray(0.02 * g) for g in grads]
    state = tx.init(params)
    grads = [jnp.asarray(g) for g in grads]

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))

    def run():
        nonlocal params, state
        params, state = jax.block_until_ready(step(params, state))

    return run


def torch_stepper(grads):
    import torch

    params = [torch.nn.Parameter(torch.from_numpy(0.02 * g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = torch.from_numpy(g)
    optimizer = torch.optim.Muon(params, lr=0.02, weight_decay=0.0)
    return optimizer.step


def contenders(grads):
    yield "chains.muon", jax_stepper(chains.muon(0.02), grads)
    yield "chains.muon, bfloat16", jax_stepper(chains.muon(0.02, ns_dtype="bfloat16"), grads)
    yield "chains.muon(gram=False)", jax_stepper(chains.muon(0.02, gram=False), grads)
    yield "optax.contrib.muon", jax_stepper(optax.contrib.muon(0.02), grads)
    if importlib.util.find_spec("torch") is not None:
        yield "torch.optim.Muon", torch_stepper(grads)


def times(steppers, rounds):
    seen = {name: [] for name in steppers}
    for round_ in range(rounds + 2):
        for name, run in steppers.items():
            start, cpu = time.perf_counter(), time.process_time()
            run()
            if round_ >= 2:  # compiled, and the memory touched
                seen[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return seen


def spectra(rows, cols):
    """Gradients: independent entries, and singular values that fall as 1/k, 1/k^2, and by six decades."""
    rng = np.random.default_rng(0)
    side = min(rows, cols)
    left = np.linalg.qr(rng.normal(size=(rows, side)))[0]
    right = np.linalg.qr(rng.normal(size=(cols, side)))[0]
    k = np.arange(1.0, side + 1)
    yield "independent", rng.normal(size=(rows, cols))
    for name, s in (("1/k", 1 / k), ("1/k^2", k**-2), ("10^-6", np.logspace(0, -6, side))):
        yield name, (left * s) @ right.T


def in_float64(g):
    a, b, c = KELLER_JORDAN
    x = g / (np.linalg.norm(g) + 1e-7)
    x = x.T if (tall := x.shape[0] > x.shape[1]) else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def orthogonality(o):
    """The largest entry of |O O^T - I|, in the smaller side."""
    o = np.asarray(o, np.float64)
    gram = o @ o.T if o.shape[0] <= o.shape[1] else o.T @ o
    return np.abs(gram - np.eye(len(gram))).max()


def show_accuracy():
    forms = {
        f"{dtype or 'float32'}, gram={gram!r}": jax.jit(
            newton_schulz(scale=None, gram=gram, dtype=dtype).update
        )
        for dtype, grams in ((None, (False, "auto", True)), ("bfloat16", (False, "auto")))
        for gram in grams
    }
    print(f"\n{'':30}" + "".join(f"{name:>26}" for name in forms))
    print(f"{'':30}" + "".join(f"{'|OO^T-I|':>14}{'error':>12}" for _ in forms))
    for shape in sorted(set(MATRICES)):
        for name, g in spectra(*shape):
            g = g.astype(np.float32)
            exact = in_float64(g.astype(np.float64))
            cells = []
            for form in forms.values():
                o = np.asarray(form(g, optax.EmptyState())[0])
                error = np.abs(o - exact).max() / np.abs(exact).max()
                cells.append(f"{orthogonality(o):14.4f}{error:12.1e}")
            label = f"{shape[0]} x {shape[1]}, {name}"
            print(f"{label:30}" + "".join(cells), flush=True)
    print("error: largest difference from float64, over the largest entry")


def show_times(rounds, json_path):
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(shape, np.float32) for shape in MATRICES]
    seen = times(dict(contenders(grads)), rounds)
    ours = [seen[name] for name in ("chains.muon", "chains.muon, bfloat16")]
    title = f"{len(MATRICES)} matrices, {rounds} rounds"
    print(f"{title}, {jax.default_backend()}")
    rows = []
    print(f"{'':26}{'ms':>8}{'CPU ms':>8}{'float32 / it':>14}{'bfloat16 / it':>15}{'target':>8}")
    for name, its in seen.items():
        wall, cpu = (statistics.median(t[i] for t in its) * 1e3 for i in (0, 1))
        full, half = (
            statistics.median(a[0] / b[0] for a, b in zip(our, its, strict=True)) for our in ours
        )
        target = f"{LIMITS[name]:.2f}" if name in LIMITS else ""
        print(f"{name:26}{wall:8.0f}{cpu:8.0f}{full:14.2f}{half:15.2f}{target:>8}")
        for our, ratio in (("chains.muon", full), ("chains.muon, bfloat16", half)):
            rows.append(row(our, statistics.median(t[0] for t in seen[our]) * 1e3, ratio, name))
    keep(json_path, "muon", title, rows)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="rounds counted (default 9)")
    parser.add_argument("--json", type=Path, help="also keep the times there")
    parser.add_argument("--no-accuracy", action="store_true", help="times only")
    parser.add_argument("--no-times", action="store_true", help="accuracy only")
    args = parser.parse_args(argv)

    if not args.no_times:
        show_times(args.rounds, args.json)
    if not args.no_accuracy:
        show_accuracy()


if __name__ == "__main__":
    main()
