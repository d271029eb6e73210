"""E8: Muon against AdamW on a small language model, each with one rate for hidden matrices and one for the rest.

Muon is usually compared with an AdamW that has one rate for all. Here both have Adam on embeddings, biases and the
output, at a rate of its own, and both rates are tuned. The mechanism off is Muon that divides by the norm and does not
orthogonalise (as in E7).
"""

from typing import Any

import numpy as np
import optax

from chainrule import chains, transforms
from chainrule.evidence import models, tasks
from chainrule.evidence.experiment import (
    Arm,
    Claim,
    Curves,
    Experiment,
    Metric,
    Setting,
    log_grid,
    quick,
)

TARGET = 2.6
"""Nats a character."""
BETAS = {"b1": 0.9, "b2": 0.95}
SIZES = {"batch": 8, "places": 32, "width": 64, "depth": 2, "windows": 64}


def until_target(curves: Curves) -> float:
    """The share of the run after which the held-out loss first was at most the target; 1 also if it never was."""
    reached = np.flatnonzero(np.asarray(curves["loss"]) <= TARGET)
    return float((reached[0] + 1) / len(curves["loss"])) if len(reached) else 1.0


def adamw(h):
    """Adam with Muon's routing: hidden matrices at one rate, the rest at another."""
    return optax.partition(
        {
            "muon": chains.adam(h["learning_rate"], **BETAS, weight_decay=None),
            "adam": chains.adam(h["rest_rate"], **BETAS, weight_decay=None),
        },
        transforms.HIDDEN_MATRICES,
    )


def one_rate(h):
    """Adam with one rate, and its b2 tuned in the place of the other rate."""
    b2 = 1 - h["forget"]
    return chains.adam(h["learning_rate"], BETAS["b1"], b2, weight_decay=None)


def muon(**settings: Any):
    """Muon with `settings`, as an arm's `make`."""

    def make(h):
        return chains.muon(
            h["learning_rate"],
            weight_decay=None,
            adam_lr_ratio=h["rest_rate"] / h["learning_rate"],
            adam_b1=BETAS["b1"],
            adam_b2=BETAS["b2"],
            **settings,
        )

    return make


def model_to_time() -> Any:
    """The model of the normal setting."""
    random = np.random.default_rng(0)
    return models.CharTransformer(random, 96, SIZES["places"], SIZES["width"], SIZES["depth"])


REST = {"rest_rate": log_grid(1e-3, 3e-2, 3)}
MUON_GRID = {"learning_rate": log_grid(1e-2, 1e-1, 3), **REST}
EXPERIMENT = Experiment(
    id="E8",
    title="Muon against AdamW on a small language model",
    source="Muon (Jordan et al., 2024), and the reports that followed it",
    data="the sources of Python's standard library as characters, a tenth held out",
    model="a transformer, 0.11 million parameters",
    build=tasks.language,
    arms=[
        Arm("adamw", "baseline", adamw, {"learning_rate": log_grid(6e-4, 6e-3, 3), **REST}),
        Arm(
            "adamw, one rate",
            "control",
            one_rate,
            {"learning_rate": log_grid(1e-3, 1e-2, 3), "forget": log_grid(5e-3, 5e-1, 3)},
        ),
        Arm("muon", "claim", muon(), MUON_GRID),
        Arm(
            "muon off",
            "mechanism-off",
            muon(
                coefficients=(1.0, 0.0, 0.0), ns_steps=1, scale_factor=float(SIZES["width"]) ** 0.5
            ),
            MUON_GRID,
        ),
    ],
    claims=[
        Claim("Muon is better than AdamW with two rates", "muon", "adamw", "loss", "muon off"),
        Claim("Muon is quicker to the target", "muon", "adamw", "until_target", "muon off"),
        Claim("Muon is better than AdamW with one rate", "muon", "adamw, one rate", "loss"),
        Claim("A second rate improves AdamW", "adamw", "adamw, one rate", "loss"),
    ],
    metrics=[
        Metric("loss", "held-out loss", margin=0.01, better=-1),
        Metric(
            "until_target",
            f"share of the run until a held-out loss of {TARGET}",
            margin=0.05,
            better=-1,
            percent=True,
        ),
    ],
    tune_on=Metric("validation", "loss on the validation text", margin=0.0, better=-1),
    summaries={"until_target": until_target},
    timed=model_to_time,
    settings={
        "quick": quick(
            20,
            {"batch": 2, "places": 8, "width": 16, "depth": 1, "windows": 8},
            arms=("adamw", "muon", "muon off"),
        ),
        "normal": Setting(
            steps=300, sizes=SIZES, evaluations=20, seeds=10, tuning_seeds=1, block=6
        ),
        "full": Setting(
            steps=5000,
            sizes={"batch": 64, "places": 128, "width": 256, "depth": 6, "windows": 128},
            evaluations=100,
            seeds=10,
            tuning_seeds=2,
            block=2,
        ),
    },
)
