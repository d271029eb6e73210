"""E3: CASMO under differential privacy: digits, gradients clipped and noised by optax's own aggregate.

Noise and clipping norm are fixed, batches and steps are every arm's, so all have spent the same epsilon. CASMO's
mechanism is a confidence that scales the step; without it AdamW runs at the mean confidence.
"""

from collections.abc import Mapping
from typing import Any

import jax
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
)
from chainrule.evidence.probes import folded, mean_metric

CLIP = 1.0
SIGMA = 2.0
DECAY = 1e-4


def build(sizes: Mapping[str, Any]) -> Task:
    """Digits and one hidden layer; the chain is given the gradient of each example."""
    images, labels = data.digits()

    def draw(seed):
        random = np.random.default_rng(seed)
        train, validation, test = data.split(random, len(labels), 300, 500)
        params = models.Mlp(random, (64, sizes["hidden"], 10))
        # Each batch is drawn afresh, as accountants of privacy assume, not in passes.
        rows = random.choice(train, (sizes["steps"], sizes["batch"]))
        return params, {"batches": rows, "validation": validation, "test": test}

    def one(params, image, label):
        logits = params(image)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    def gradient(params, shared, drawn, step):
        rows = drawn["batches"][step]
        losses, grads = jax.vmap(jax.value_and_grad(one), (None, 0, 0))(
            params, shared["images"][rows], shared["labels"][rows]
        )
        return losses.mean(), grads

    def loss(params, shared, drawn, step):
        return gradient(params, shared, drawn, step)[0]

    def evaluate(params, shared, drawn):
        def accuracy(rows):
            right = jnp.argmax(params(shared["images"][rows]), -1) == shared["labels"][rows]
            return jnp.mean(right)

        return {"validation": accuracy(drawn["validation"]), "accuracy": accuracy(drawn["test"])}

    flat = jnp.asarray(images.reshape(len(images), -1))
    return Task({"images": flat, "labels": jnp.asarray(labels)}, draw, loss, evaluate, gradient)


def private(chain: Any) -> Any:
    """`chain` of hyperparameters behind the differentially private aggregate, noised with the run's seed."""

    def make(h):
        key = jax.random.key(h["seed"])
        aggregate = optax.contrib.differentially_private_aggregate(CLIP, SIGMA, key)
        return optax.chain(aggregate, chain(h))

    return make


def adamw(h):
    """AdamW."""
    return chains.adam(h["learning_rate"], weight_decay=h.get("weight_decay", DECAY))


def casmo(h):
    """CASMO, calibrated in the first fifth of the run."""
    return chains.casmo(h["learning_rate"], weight_decay=DECAY, tau_init_steps=h["steps"] // 5)


def at_mean_confidence(point, measured):
    """The mean confidence in the rate, the decay of a step as it was."""
    return folded("confidence")({**point, "weight_decay": DECAY}, measured)


GRID = {"learning_rate": log_grid(1e-3, 3e-2, 5)}
EXPERIMENT = Experiment(
    id="E3",
    title="CASMO under differential privacy",
    source="CASMO, README",
    data="scikit-learn's 1797 digits: 997 to train, 300 to tune by, 500 to report; the split is the seed's",
    model=f"one hidden layer; gradients clipped to {CLIP}, noise of {SIGMA} times that",
    build=build,
    arms=[
        Arm(
            "dp-sgd",
            "baseline",
            private(lambda h: optax.sgd(h["learning_rate"], 0.9)),
            {"learning_rate": log_grid(1e-2, 3e-1, 5)},
        ),
        Arm("dp-adamw", "baseline", private(adamw), GRID),
        Arm("dp-casmo", "claim", private(casmo), GRID, measure=mean_metric("confidence")),
        Arm(
            "dp-casmo off",
            "mechanism-off",
            private(adamw),
            matches="dp-casmo",
            match=at_mean_confidence,
        ),
    ],
    claims=[
        Claim("CASMO helps under privacy", "dp-casmo", "dp-adamw", "accuracy", "dp-casmo off"),
        Claim("CASMO is better than DP-SGD", "dp-casmo", "dp-sgd", "accuracy", "dp-casmo off"),
    ],
    metrics=[Metric("accuracy", "test accuracy", margin=0.005, percent=True)],
    tune_on=Metric("validation", "accuracy on the validation split", margin=0.0, percent=True),
    settings={
        "quick": quick(20, {"batch": 16, "hidden": 8}),
        "normal": Setting(
            steps=300,
            sizes={"batch": 64, "hidden": 32},
            evaluations=20,
            seeds=10,
            tuning_seeds=3,
            block=10,
        ),
        "full": Setting(
            steps=2000,
            sizes={"batch": 256, "hidden": 128},
            evaluations=50,
            seeds=20,
            tuning_seeds=4,
            block=20,
        ),
    },
)
