"""E13: what moments in 8 and 4 bits cost a small language model, in Adam, Lion and STAM.

`quantized_state` claims to cost nothing, which paired seeds cannot show; they can rule out a cost above a margin. So
the claims say that codes cost held-out loss: "not reproduced" is what a user wants to read. The mechanism that is
switched off is the logarithmic code of second moments, at the rate that was tuned with it.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from chainrule import transforms
from chainrule.evidence import data, tasks
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

B1, B2 = 0.9, 0.95
BLOCK = 256
"""Entries that share a scale."""


def adam() -> optax.GradientTransformation:
    """Adam's direction."""
    return transforms.scale_by_adam(B1, B2)


def lion() -> optax.GradientTransformation:
    """Lion's sign, from one moment."""
    return optax.scale_by_lion()


def stam() -> optax.GradientTransformation:
    """Adam with STAM's b1."""
    moment = transforms.adaptive_beta1(B1)
    return transforms.chain(moment, transforms.scale_by_adam(b1=None, b2=B2))


def held(inner: Callable[[], Any], bits: int | None, **settings: Any) -> Callable[[Any], Any]:
    """`inner` with its moments in so many bits (`None`: float32), at a tuned rate."""

    def make(h):
        return transforms.chain(
            transforms.quantized_state(inner(), bits, BLOCK, **settings),
            optax.scale_by_learning_rate(h["learning_rate"]),
        )

    return make


RATES = {
    adam: {"learning_rate": log_grid(2e-3, 2e-2, 3)},
    lion: {"learning_rate": log_grid(3e-4, 3e-3, 3)},
    stam: {"learning_rate": log_grid(2e-3, 2e-2, 3)},
}


def in_bits(inner: Callable[[], Any]) -> list[Arm]:
    """The same transform with moments in float32, 8 bits and 4 bits."""
    name, grid = inner.__name__, RATES[inner]
    return [
        Arm(name, "baseline", held(inner, None), grid),
        *(Arm(f"{name}, {bits} bits", "claim", held(inner, bits), grid) for bits in (8, 4)),
    ]


LINEAR = held(adam, 4, logarithmic=())
GUESS = math.log(data.VOCABULARY)
"""The loss of who knows nothing."""


def build(sizes: Mapping[str, Any]) -> Task:
    """The language task; its metric "bounded" is the loss, and of a run that diverged what a guess has."""
    task = tasks.language(sizes)

    def evaluate(params, shared, drawn):
        found = task.evaluate(params, shared, drawn)
        return {**found, LOSS.name: jnp.fmin(found["loss"], GUESS)}

    return task._replace(evaluate=evaluate)


LOSS = Metric("bounded", "held-out loss, at most a guess's", margin=0.01, better=-1)

EXPERIMENT = Experiment(
    id="E13",
    title="Moments in 8 and 4 bits on a small language model",
    source="Dettmers et al. (arXiv 2110.02861), and `quantized_state`",
    data="the sources of Python's standard library as characters, a tenth held out",
    model="a transformer, 0.11 million parameters",
    build=build,
    arms=[
        *in_bits(adam),
        Arm("adam, 4 bits, linear", "control", LINEAR, RATES[adam]),
        Arm(
            "adam, 4 bits off",
            "mechanism-off",
            LINEAR,
            matches="adam, 4 bits",
            match=lambda point, measured: point,
        ),
        Arm(
            "adam, 4 bits, stochastic", "control", held(adam, 4, rounding="stochastic"), RATES[adam]
        ),
        *in_bits(lion),
        *in_bits(stam),
    ],
    claims=[
        *(
            Claim(f"{bits} bits cost {name} held-out loss", name, f"{name}, {bits} bits", LOSS.name)
            for name in ("adam", "lion", "stam")
            for bits in (8, 4)
        ),
        Claim(
            "Logarithmic codes of second moments help Adam in 4 bits",
            "adam, 4 bits",
            "adam, 4 bits, linear",
            LOSS.name,
            "adam, 4 bits off",
        ),
        Claim(
            "Stochastic rounding helps Adam in 4 bits",
            "adam, 4 bits, stochastic",
            "adam, 4 bits",
            LOSS.name,
        ),
    ],
    metrics=[LOSS],
    tune_on=Metric("validation", "loss on the validation text", margin=0.0, better=-1),
    settings={
        "quick": quick(
            20,
            {"batch": 2, "places": 8, "width": 16, "depth": 1, "windows": 8},
            arms=("adam", "adam, 4 bits", "adam, 4 bits, linear", "adam, 4 bits off"),
        ),
        "normal": Setting(
            steps=300,
            sizes={"batch": 8, "places": 32, "width": 64, "depth": 2, "windows": 64},
            evaluations=20,
            seeds=10,
            tuning_seeds=1,
            block=5,
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
