"""E7: Muon as KerasOptimizers has it, on digits: its Nesterov forms, caution and OrthoGrad, beside Nadam.

The mechanism of Muon is to orthogonalise. Without it the polynomial of Newton-Schulz is x: momentum divided by its
norm, so that every matrix still moves by the same amount each step, and scaled to Muon's usual length.
"""

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
    Experiment,
    Metric,
    Setting,
    Task,
    log_grid,
    quick,
    share_until,
)

TARGET = 0.98
RANK = 32
"""About the number of singular values of the model's matrices, of which Newton-Schulz makes ones."""


def build(sizes: Mapping[str, Any]) -> Task:
    """Digits and a small convolutional network."""
    images, labels = data.digits()

    def draw(seed):
        random = np.random.default_rng(seed)
        train, validation, test = data.split(random, len(labels), 300, 500)
        params = models.ConvNet(random, 8, sizes["channels"], sizes["hidden"], 10)
        rows = data.batches(random, train, 64, sizes["steps"])
        return params, {"batches": rows, "validation": validation, "test": test}

    def loss(params, shared, drawn, step):
        rows = drawn["batches"][step]
        logits = params(shared["images"][rows])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, shared["labels"][rows]
        ).mean()

    def evaluate(params, shared, drawn):
        def accuracy(rows):
            right = jnp.argmax(params(shared["images"][rows]), -1) == shared["labels"][rows]
            return jnp.mean(right)

        return {"validation": accuracy(drawn["validation"]), "accuracy": accuracy(drawn["test"])}

    return Task(
        {"images": jnp.asarray(images), "labels": jnp.asarray(labels)}, draw, loss, evaluate
    )


def muon(**settings):
    """Muon with `settings`, as an arm's `make`."""

    def make(h):
        return chains.muon(h["learning_rate"], weight_decay=None, adam_lr_ratio=0.1, **settings)

    return make


def orthograd(h):
    """OrthoGrad in front of Muon."""
    return chains.orthograd(muon()(h))


ADAM_GRID = {"learning_rate": log_grid(3e-4, 3e-2, 5)}
MUON_GRID = {"learning_rate": log_grid(3e-3, 3e-1, 5)}
VALIDATION = Metric("validation", "accuracy on the validation split", margin=0.0, percent=True)
BETTER = "Keras Muon is better than Nadam"

EXPERIMENT = Experiment(
    id="E7",
    title="Keras Muon on digits",
    source="KerasOptimizers, README",
    data="scikit-learn's 1797 digits: 997 to train, 300 to tune by, 500 to report; the split is the seed's",
    model="two 3 x 3 convolutions and one hidden layer, batches of 64",
    build=build,
    arms=[
        Arm("adam", "baseline", lambda h: chains.adam(h["learning_rate"]), ADAM_GRID),
        Arm("nadam", "baseline", lambda h: chains.nadam(h["learning_rate"]), ADAM_GRID),
        Arm("muon", "claim", muon(), MUON_GRID),
        Arm("muon elementwise", "claim", muon(nesterov="elementwise"), MUON_GRID),
        Arm("muon raw", "claim", muon(nesterov="raw"), MUON_GRID),
        Arm("muon cautious", "claim", muon(caution="mean"), MUON_GRID),
        Arm("muon orthograd", "claim", orthograd, MUON_GRID),
        Arm(
            "muon off",
            "mechanism-off",
            muon(coefficients=(1.0, 0.0, 0.0), ns_steps=1, scale_factor=RANK**0.5),
            MUON_GRID,
        ),
    ],
    claims=[
        Claim(BETTER, "muon", "nadam", "accuracy", "muon off"),
        Claim(
            f"{BETTER} (its Nesterov form of HEAD)",
            "muon elementwise",
            "nadam",
            "accuracy",
            "muon off",
        ),
        Claim(
            f"{BETTER} (its earlier Nesterov form)",
            "muon raw",
            "nadam",
            "accuracy",
            "muon off",
        ),
        Claim("Muon is quicker than Nadam", "muon", "nadam", "until_target", "muon off"),
        Claim("Caution improves Muon", "muon cautious", "muon", "accuracy"),
        Claim("OrthoGrad improves Muon", "muon orthograd", "muon", "accuracy"),
    ],
    metrics=[
        Metric("accuracy", "test accuracy", margin=0.005, percent=True),
        Metric(
            "until_target",
            f"share of the run until {TARGET:.0%} test accuracy",
            margin=0.05,
            better=-1,
            percent=True,
        ),
    ],
    tune_on=VALIDATION,
    summaries={"until_target": share_until("accuracy", TARGET)},
    settings={
        "quick": quick(
            30,
            {"channels": (4, 8), "hidden": 16},
            evaluations=3,
            grid_points=3,
            arms=("nadam", "muon", "muon off"),
        ),
        "normal": Setting(
            steps=300,
            sizes={"channels": (16, 32), "hidden": 64},
            evaluations=20,
            seeds=10,
            tuning_seeds=2,
            block=10,
        ),
        "full": Setting(
            steps=1500,
            sizes={"channels": (64, 128), "hidden": 256},
            evaluations=50,
            seeds=20,
            tuning_seeds=4,
            block=20,
        ),
    },
)
