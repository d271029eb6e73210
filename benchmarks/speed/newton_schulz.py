"""How near to orthonormal the presets of `newton_schulz` bring a matrix, against steps and against time.

    python benchmarks/speed/newton_schulz.py
    chainrule bench newton_schulz --figure docs/_static/newton_schulz.png --json benchmarks/newton_schulz.json

The matrices have known singular vectors and singular values that fall as 1/k, as 1/k^2, or as 1/k over half of the
directions with none in the other half; and one has independent entries. Two errors, both over the directions that the
matrix has: *orthogonality*, the root mean square of s^2 - 1 over the singular values s of the result; *polar*, its
distance from the polar factor U V^T of the matrix, |O - U V^T|_F / sqrt(rank), which also sees that a preconditioner
turns singular vectors. Times are medians over rounds in which the contenders take turns, of jitted calls.
"""

import argparse
import io
import json
import math
import pathlib
import platform
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule.transforms import newton_schulz

MOST_STEPS = 8
PRESETS: dict[str, dict[str, Any]] = {
    "keller_jordan": {},
    "dion": {"coefficients": "dion"},
    "polar_express": {"coefficients": "polar_express"},
    "polar_express, schatten": {"coefficients": "polar_express", "preconditioning": "schatten"},
    "cans": {"coefficients": "cans"},
    "aol": {"coefficients": "aol"},
    "cubic": {"coefficients": "cubic"},
    "classical": {"coefficients": "classical"},
}
USUAL = {name: 4 if name == "aol" else 5 for name in PRESETS}


class Matrix(NamedTuple):
    name: str
    entries: np.ndarray
    polar: np.ndarray
    """U V^T."""
    rank: int


def matrices(rows: int, cols: int) -> Iterator[Matrix]:
    rng = np.random.default_rng(0)
    side = min(rows, cols)
    left = np.linalg.qr(rng.normal(size=(rows, side)))[0]
    right = np.linalg.qr(rng.normal(size=(cols, side)))[0].T
    k = np.arange(1.0, side + 1)
    half = np.where(k <= side // 2, 1 / k, 0)
    for name, s in (("1/k", 1 / k), ("1/k^2", k**-2), ("1/k, half the rank", half)):
        kept = (s > 0).astype(float)
        yield Matrix(name, (left * s) @ right, (left * kept) @ right, int(kept.sum()))
    noise = rng.normal(size=(rows, cols))
    u, _, v = np.linalg.svd(noise, full_matrices=False)
    yield Matrix("independent entries", noise, u @ v, side)


def errors(o: np.ndarray, matrix: Matrix) -> tuple[float, float]:
    """Orthogonality and polar; infinite where the steps have diverged."""
    o = np.asarray(o, np.float64)
    if not np.isfinite(o).all() or np.abs(o).max() > 1e9:
        return math.inf, math.inf
    gram = o @ o.T if o.shape[0] <= o.shape[1] else o.T @ o
    squares = np.linalg.eigvalsh(gram)[-matrix.rank :]
    polar = np.linalg.norm(o - matrix.polar) / matrix.rank**0.5
    return float(np.sqrt(np.mean((squares - 1) ** 2))), float(polar)


def compiled(dtype: str) -> dict[tuple[str, int], Any]:
    """Jitted orthogonalisations by preset and number of steps."""
    return {
        (name, steps): jax.jit(
            newton_schulz(steps=steps, scale=None, dtype=dtype, **settings).update
        )
        for name, settings in PRESETS.items()
        for steps in range(1, MOST_STEPS + 1)
    }


def measured(shape: tuple[int, int], dtype: str, rounds: int) -> dict[str, Any]:
    """Errors by matrix and preset, and milliseconds by preset, each a list over the steps."""
    forms = compiled(dtype)
    found: dict[str, Any] = {"errors": {}, "milliseconds": {}}
    for matrix in matrices(*shape):
        g = jnp.asarray(matrix.entries, jnp.float32)
        own = found["errors"][matrix.name] = {}
        for (name, _), form in forms.items():
            pair = errors(np.asarray(form(g, optax.EmptyState())[0]), matrix)
            lists = own.setdefault(name, {"orthogonality": [], "polar": []})
            for kind, error in zip(lists, pair, strict=True):
                lists[kind].append(float(f"{error:.3g}"))
    seen: dict[tuple[str, int], list[float]] = {key: [] for key in forms}
    g = jax.random.normal(jax.random.key(0), shape)
    for _ in range(rounds):
        for key, form in forms.items():
            start = time.perf_counter()
            jax.block_until_ready(form(g, optax.EmptyState()))
            seen[key].append(1e3 * (time.perf_counter() - start))
    for (name, _), own in seen.items():
        found["milliseconds"].setdefault(name, []).append(round(statistics.median(own), 2))
    return found


def processor() -> str:
    """What /proc/cpuinfo calls it: names alone do not tell generations apart."""
    path = pathlib.Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    lines = (line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines}
    kept = (fields.get(key, "?") for key in ("model name", "cpu family", "model"))
    return "{}, family {}, model {}".format(*kept)


def show(found: dict[str, Any]) -> None:
    print(f"{found['processor']}; JAX {jax.__version__}; {found['shape']}, {found['dtype']}")
    for matrix, own in found["errors"].items():
        print(f"\n{matrix}: orthogonality after each step")
        print(f"{'':26}" + "".join(f"{k:>9}" for k in range(1, MOST_STEPS + 1)))
        for name, lists in own.items():
            print(f"{name:26}" + "".join(f"{e:9.2g}" for e in lists["orthogonality"]))
    print("\nWith the usual number of steps: milliseconds, then orthogonality and polar error")
    print(f"{'':26}{'steps':>6}{'ms':>8}" + "".join(f"{m:>22}" for m in found["errors"]))
    for name, steps in USUAL.items():
        pairs = (own[name] for own in found["errors"].values())
        cells = "".join(
            f"{p['orthogonality'][steps - 1]:14.2g}{p['polar'][steps - 1]:8.2g}" for p in pairs
        )
        print(f"{name:26}{steps:6}{found['milliseconds'][name][steps - 1]:8.1f}{cells}")


def draw(found: dict[str, Any], path: pathlib.Path) -> None:
    """Orthogonality against steps above, against milliseconds below; a ring is the usual number of steps."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(15, 7), layout="constrained")
    axes = figure.subplots(2, len(found["errors"]), sharey=True)
    handles: list[Any] = []
    for column, (matrix, own) in enumerate(found["errors"].items()):
        for row, unit in enumerate(("steps", "milliseconds")):
            axis = axes[row, column]
            handles = []
            for name, lists in own.items():
                x = found["milliseconds"][name] if row else range(1, MOST_STEPS + 1)
                y = np.maximum(lists["orthogonality"], 1e-6)
                handles += axis.semilogy(x, y, ".-", label=name, linewidth=1.2)
                usual = USUAL[name] - 1
                axis.plot(x[usual], y[usual], "o", ms=8, mfc="none", c=handles[-1].get_color())
            axis.set_xlabel(unit)
            axis.grid(alpha=0.3)
        axes[0, column].set_title(matrix)
    for axis in axes[:, 0]:
        axis.set_ylabel("orthogonality error")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9)
    title = f"{found['shape'][0]} x {found['shape'][1]}, {found['dtype']}; {found['processor']}"
    figure.suptitle(title, fontsize=10)
    whole = io.BytesIO()
    figure.savefig(whole, dpi=80)
    colours = Image.open(whole).convert("RGB").quantize(48, Image.Quantize.FASTOCTREE)
    colours.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=(512, 2048))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=9, help="rounds counted (default 9)")
    parser.add_argument("--figure", type=pathlib.Path, help="draw it there, a PNG")
    parser.add_argument("--json", type=pathlib.Path, help="also save every number there")
    args = parser.parse_args()
    header = {"processor": processor(), "shape": list(args.shape), "dtype": args.dtype}
    found = header | measured(tuple(args.shape), args.dtype, args.rounds)
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found, separators=(",", ":")) + "\n")
    if args.figure:
        draw(found, args.figure)


if __name__ == "__main__":
    main()
