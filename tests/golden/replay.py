"""Replays recorded trajectories of the reference implementations through chains and atoms.

Everything about a recording (hyperparameters, shapes, seeds) comes from its `meta`, so another set
of the same files can be replayed: set CHAINRULE_GOLDEN_DIR to its folder. A test is parametrised
over `cases` of files; `test_complete.py` fails if no test has a variant and `not_followed.py` does
not list it.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bounds
from tests.golden.not_followed import reason_not_to_follow

FOLDER = Path(os.environ.get("CHAINRULE_GOLDEN_DIR", Path(__file__).parent))


class Recording:
    """One file: initial parameters, gradients, and a trajectory for each variant."""

    def __init__(self, name: str):
        self.name = name
        with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as data:
            self.data = dict(data)
        self.meta = json.loads(str(self.data["meta"]))
        self.names: list[str] = self.meta["names"]
        self.variants: dict[str, dict[str, Any]] = self.meta.get("variants", {})

    @cached_property
    def followable(self) -> list[str]:
        """The variants; of a file of single calls, each call, as `pack/odd`."""
        if self.variants:
            return list(self.variants)
        calls = ("/".join(key.split("/")[:2]) for key in self.data if "/" in key)
        return sorted({call for call in calls if not call.startswith("x/")})

    @cached_property
    def rec_steps(self) -> np.ndarray:
        return self.data["rec_steps"]

    @cached_property
    def params(self) -> dict[str, np.ndarray]:
        return {name: self.data[f"p0/{name}"] for name in self.names}

    def gradients(self, variant: str) -> dict[str, np.ndarray]:
        """Each tensor's gradients, (T, ...): the variant's own, or its kind's (the first word of
        its name), or the file's."""
        kinds = (f"{variant}/g", f"g_{variant.split('_')[0]}", "g")
        shared = {k.split("/")[0] for k in self.data if k.startswith("g_")}
        prefix = next((k for k in kinds if f"{k}/{self.names[0]}" in self.data), None)
        if prefix is None and variant == "zero":  # all-zero gradients are not stored
            return {
                name: np.zeros((self.meta["T"], *p.shape), p.dtype)
                for name, p in self.params.items()
            }
        if (
            prefix is None
        ):  # one kind for the whole file, or the spiky one for what is named otherwise
            prefix = "g_spiky" if "g_spiky" in shared else min(shared)
        return {name: self.data[f"{prefix}/{name}"] for name in self.names}

    def recorded(self, variant: str, what: str = "p") -> dict[str, np.ndarray]:
        """What the reference recorded of each tensor (`"p"`: parameters after `rec_steps`, (R, ...))."""
        return {name: self.data[f"{variant}/{what}/{name}"] for name in self.names}

    def log(self, variant: str, what: str) -> np.ndarray:
        """A per-step log, (T, tensors or groups)."""
        return self.data[f"{variant}/{what}"]


class Case(NamedTuple):
    recording: str
    variant: str


@lru_cache
def recording(name: str) -> Recording:
    return Recording(name)


def cases(files: Iterable[str]) -> list[Any]:
    """A pytest parameter for every variant, or single call, of the files that is followed."""
    return [
        pytest.param(Case(file, variant), id=f"{file}-{variant}")
        for file in files
        for variant in recording(file).followable
        if reason_not_to_follow(file, variant) is None
    ]


class Replay(NamedTuple):
    params: dict[str, np.ndarray]
    """Parameters after every step, (T, ...)."""
    logs: Any
    """What `log(state)` returned after every step, stacked."""
    state: Any
    """The last state."""


def replay(
    tx: optax.GradientTransformation,
    params: Mapping[str, np.ndarray],
    gradients: Mapping[str, np.ndarray],
    *,
    log: Callable[[Any], Any] = lambda state: (),
    extra: Mapping[str, Any] | None = None,
    give_params: bool = True,
) -> Replay:
    """Steps through recorded gradients under `jit` and `scan`; `extra` holds extra arguments
    stacked over steps."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def run(params, gradients, extra):
        def step(carry, inputs):
            params, state = carry
            grads, extra = inputs
            updates, state = tx.update(grads, state, params if give_params else None, **extra)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, log(state))

        return jax.lax.scan(step, (params, tx.init(params)), (gradients, extra))

    def to_jax(tree):
        return jax.tree.map(jnp.asarray, tree)

    (_, state), (trajectory, logs) = run(
        to_jax(dict(params)), to_jax(dict(gradients)), to_jax(dict(extra or {}))
    )
    return Replay(jax.tree.map(np.asarray, trajectory), jax.tree.map(np.asarray, logs), state)


def relative_error(got: np.ndarray, recorded: np.ndarray) -> float:
    """max |got - recorded| over max(movement, 0.1 max|p|, 1e-3), both (R, ...); non-finite entries
    must be the same."""
    got, recorded = np.asarray(got, np.float64), np.asarray(recorded, np.float64)
    finite = np.isfinite(recorded)
    if not np.array_equal(finite, np.isfinite(got)):
        return np.inf
    if not finite.any():
        return 0.0
    movement = np.abs(np.where(finite, recorded - recorded[:1], 0)).max(initial=0)
    scale = max(movement, 0.1 * np.abs(recorded[finite]).max(initial=0), 1e-3)
    return float(np.abs(np.where(finite, got - recorded, 0)).max(initial=0) / scale)


def assert_follows(
    got: Mapping[str, np.ndarray],
    rec: Recording,
    variant: str,
    *,
    tolerance: float = bounds.RECORDED,
    skip: tuple[str, ...] = (),
) -> None:
    """Holds parameters after every step, (T, ...), to the recorded ones, tensor by tensor."""
    expected = rec.recorded(variant)
    errors = {
        name: relative_error(got[name][rec.rec_steps - 1], expected[name])
        for name in rec.names
        if name not in skip
    }
    assert max(errors.values()) <= tolerance, (
        f"{rec.name}/{variant}: error over tolerance {tolerance}: {errors}"
    )


def columns(tree: Mapping[str, np.ndarray], names: list[str]) -> np.ndarray:
    """A log of one scalar a tensor as the recordings hold it: (T, tensors)."""
    return np.stack([np.asarray(tree[name]) for name in names], axis=1)
