"""E1: CASMO on addition with wrong labels, where a network first learns them by heart and then, maybe, the rule.

CASMO scales Adam's step by a confidence and leaves the decay alone, so a low confidence is a larger decay for the same
step. Without its mechanism it is AdamW at the mean confidence, or at the confidence over time, folded into the rate.
Hypotheses on what it gains: the confidence scales the decay too (the gain should go, if it is decay), or divides it.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

import chainrule
from chainrule import chains, transforms
from chainrule.evidence import data
from chainrule.evidence.experiment import (
    Arm,
    Claim,
    Experiment,
    Metric,
    Setting,
    Task,
    area,
    log_grid,
    quick,
)
from chainrule.evidence.models import Dense, Module, normal
from chainrule.evidence.probes import folded, mean_metric, ratio, snr

WRONG = 0.3
HEADS = 4


class Transformer(Module):
    """One layer over the tokens a, b, =; read at the last. No normalisation, as in studies of this task.

    Only the last token asks, and keys and values of a token at a place are the same in all examples: these are computed
    once for each token and looked up.
    """

    embedding: jax.Array
    positions: jax.Array
    query: Dense
    key: Dense
    value: Dense
    out: Dense
    up: Dense
    down: Dense
    output: Dense

    def __init__(self, random: np.random.Generator, p: int, width: int):
        self.embedding = normal(random, (p + 1, width), width**-0.5)
        self.positions = normal(random, (3, width), width**-0.5)
        self.query, self.key, self.value, self.out = (Dense(random, width, width) for _ in range(4))
        self.up, self.down = Dense(random, width, 2 * width, 2.0), Dense(random, 2 * width, width)
        self.output = Dense(random, width, p)

    def __call__(self, pairs: jax.Array) -> jax.Array:
        p = len(self.embedding) - 1
        last = self.embedding[p:] + self.positions[2]
        query = self.query(last).reshape(1, HEADS, -1)
        mixed = total = jnp.zeros(())
        for place, row in enumerate((pairs[:, 0], pairs[:, 1], None)):
            tokens = last if row is None else self.embedding[:p] + self.positions[place]
            key, value = (
                layer(tokens).reshape(len(tokens), HEADS, -1) for layer in (self.key, self.value)
            )
            # Scores stay small without a shift: the decay holds queries and keys together.
            weight = jnp.exp((key * query).sum(-1, keepdims=True) / key.shape[-1] ** 0.5)
            seen = jnp.concatenate([weight, weight * value], -1)
            seen = seen if row is None else seen[row]
            total, mixed = total + seen[..., :1], mixed + seen[..., 1:]
        x = last + self.out((mixed / total).reshape(len(pairs), -1))
        return self.output(x + self.down(jax.nn.relu(self.up(x))))


def build(sizes: Mapping[str, Any]) -> Task:
    """All pairs mod p: half to train on, of which 30 % are wrong, a quarter to tune by, a quarter to report."""
    p = sizes["p"]
    pairs = np.stack(np.divmod(np.arange(p * p), p), -1).astype(np.int32)
    sums = (pairs.sum(-1) % p).astype(np.int32)

    def draw(seed):
        random = np.random.default_rng(seed)
        train, validation, test = data.split(random, p * p, p * p // 4, p * p // 4)
        drawn = {
            "labels": data.wrong_labels(random, sums, WRONG, p),
            "batches": data.batches(random, train, sizes["batch"], sizes["steps"]),
            "validation": validation,
            "test": test,
        }
        return Transformer(random, p, sizes["width"]), drawn

    def loss(params, shared, drawn, step):
        rows = drawn["batches"][step]
        logits = params(shared["pairs"][rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, drawn["labels"][rows]).mean()

    def evaluate(params, shared, drawn):
        def accuracy(rows):
            return jnp.mean(jnp.argmax(params(shared["pairs"][rows]), -1) == shared["sums"][rows])

        return {"validation": accuracy(drawn["validation"]), "accuracy": accuracy(drawn["test"])}

    shared = {"pairs": jnp.asarray(pairs), "sums": jnp.asarray(sums)}
    return Task(shared, draw, loss, evaluate)


def confident_decay(
    weight_decay: Any, power: int, **settings: Any
) -> optax.GradientTransformationExtraArgs:
    """CASMO's confidence c, then decay c^power weight_decay: 0 is CASMO, 1 scales the decay too, -1 divides it."""
    link = transforms.agar_confidence(**settings)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates, new = link.update(updates, state, params, **extra)
        confidence = cast(jax.Array, cast(transforms.AgarConfidenceState, new).confidence)
        factor = weight_decay * confidence**power
        return jax.tree.map(lambda u, p: u + factor * p, updates, params), new

    return optax.GradientTransformationExtraArgs(link.init, update)


def adamw(h):
    return optax.adamw(h["learning_rate"], weight_decay=h["weight_decay"])


def casmo(h):
    return chains.casmo(h["learning_rate"], weight_decay=h["weight_decay"])


def casmo_decay(power: int):
    """CASMO with `confident_decay`."""

    def make(h):
        return chainrule.chain(
            transforms.scale_by_adam(),
            confident_decay(h["weight_decay"], power),
            optax.scale_by_learning_rate(h["learning_rate"]),
        )

    return make


def over_time(h):
    """AdamW at a factor of the rate for each part of the run, with the same decay for every step."""
    factors = h["factors"]

    def factor(count):
        return factors[jnp.minimum(count * len(factors) // h["steps"], len(factors) - 1)]

    return optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_schedule(factor),
        optax.add_decayed_weights(h["weight_decay"]),
        optax.scale_by_learning_rate(h["learning_rate"]),
    )


def folded_over_time(point, measured):
    """`Arm.match`: the confidence of each part of the run in the rate."""
    return {**point, "factors": measured["confidence"].tolist()}


GRID = {"learning_rate": log_grid(5e-3, 2e-2, 3), "weight_decay": log_grid(0.25, 2, 4)}
BETTER = "CASMO learns the rule in spite of wrong labels where AdamW learns them by heart"

EXPERIMENT = Experiment(
    id="E1",
    title="CASMO and grokking with wrong labels",
    source="the CASMO repository: 90.3 % against 24.0 %, one seed",
    data="(a + b) mod p: half of all pairs to train on, 30 % of them with a wrong sum, a quarter to tune by and a "
    "quarter to report, both with right sums; the split and the wrong sums are the seed's",
    model="a transformer of one layer without normalisation",
    build=build,
    arms=[
        Arm("adamw", "baseline", adamw, GRID),
        Arm("casmo", "claim", casmo, GRID, mean_metric("confidence")),
        Arm("casmo off", "mechanism-off", adamw, matches="casmo", match=folded("confidence")),
        Arm(
            "casmo off over time",
            "mechanism-off",
            over_time,
            matches="casmo",
            match=folded_over_time,
        ),
        Arm("casmo_snr", "claim", snr(), GRID, ratio),
        Arm(
            "casmo_snr off",
            "mechanism-off",
            snr(robustness=0.0, rel_floor=1.0),
            measure=ratio,
            matches="casmo_snr",
            match=folded("ratio"),
        ),
        Arm("casmo decay x confidence", "hypothesis", casmo_decay(1), GRID),
        Arm("casmo decay / confidence", "hypothesis", casmo_decay(-1), GRID),
    ],
    claims=[
        Claim(BETTER, "casmo", "adamw", "accuracy", "casmo off"),
        Claim("The same, over the whole run", "casmo", "adamw", "area", "casmo off"),
        Claim("The same of CASMO 0.4", "casmo_snr", "adamw", "accuracy", "casmo_snr off"),
        Claim(
            "CASMO needs its decay unscaled: it is better than with confidence on the decay too",
            "casmo",
            "casmo decay x confidence",
            "accuracy",
        ),
        Claim(
            "Decay divided by confidence is better than CASMO",
            "casmo decay / confidence",
            "casmo",
            "accuracy",
        ),
        Claim(
            "CASMO's confidence does more than a schedule of the rate",
            "casmo",
            "casmo off over time",
            "accuracy",
        ),
    ],
    metrics=[
        Metric("accuracy", "accuracy on unseen pairs", margin=0.02, percent=True),
        Metric("area", "mean accuracy over the run", margin=0.02, percent=True),
    ],
    tune_on=Metric("validation", "accuracy on pairs to tune by", margin=0.0, percent=True),
    summaries={"area": area("accuracy")},
    settings={
        "quick": quick(
            20,
            block=9,
            grid_points=3,
            arms=("adamw", "casmo", "casmo off"),
            sizes={"p": 13, "width": 16, "batch": 32},
        ),
        "normal": Setting(
            steps=2000,
            evaluations=20,
            seeds=10,
            tuning_seeds=2,
            block=8,
            sizes={"p": 97, "width": 64, "batch": 256},
        ),
        "full": Setting(
            steps=10_000,
            evaluations=50,
            seeds=10,
            tuning_seeds=2,
            block=10,
            sizes={"p": 97, "width": 128, "batch": 512},
        ),
    },
)
