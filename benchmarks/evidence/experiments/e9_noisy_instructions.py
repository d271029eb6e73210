"""E9: instructions of which 30 % have a wrong answer: arithmetic, edits of strings, look-ups; judged on right ones.

CASMO's own benchmark is a language model tuned on such instructions. Here a small decoder learns them from nothing, so
that every arm can be tuned and paired. Without the mechanism it is AdamW at the mean confidence, or at Magma's mean
factor.
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
from chainrule.evidence.probes import folded, mean_metric, ratio, snr

WRONG = 0.3
KINDS = ("add", "sub", "rev", "rot", "get")
LETTERS = np.array(list("abcdefgh"))
PROMPT, ANSWER = 14, 3
"""Characters of each, filled up with spaces on the left."""


def instruction(random: np.random.Generator, kind: str) -> tuple[str, str]:
    """A prompt of a kind and its answer.

    >>> instruction(np.random.default_rng(0), "rot")
    ('rot bcd=', 'cdb')
    """
    large, small = sorted(random.integers(10, size=2).tolist(), reverse=True)
    if kind == "add":
        return f"add {large} {small}=", str(large + small)
    if kind == "sub":
        return f"sub {large} {small}=", str(large - small)
    word = "".join(random.choice(LETTERS, 3, replace=False))
    if kind == "get":
        values, asked = random.integers(10, size=3).tolist(), int(random.integers(3))
        table = "".join(f"{letter}{value}" for letter, value in zip(word, values, strict=True))
        return f"get {word[asked]} {table}=", str(values[asked])
    return f"{kind} {word}=", word[::-1] if kind == "rev" else word[1:] + word[0]


def instructions(random: np.random.Generator, count: int, wrong: float) -> np.ndarray:
    """(count, characters) of prompts and answers; `wrong` of the answers are another one of the kind."""
    lines = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        prompt, answer = instruction(random, kind)
        given = answer
        if random.random() < wrong:
            while given == answer:
                given = instruction(random, kind)[1]
        lines.append(prompt.rjust(PROMPT) + given.rjust(ANSWER))
    return data.encoded("".join(lines).encode()).reshape(count, -1)


def build(sizes: Mapping[str, Any]) -> Task:
    """Instructions as characters, of which the model is asked for the answers."""

    def draw(seed):
        random = np.random.default_rng(seed)
        params = models.CharTransformer(
            random, data.VOCABULARY, PROMPT + ANSWER, sizes["width"], sizes["depth"]
        )
        return params, {
            "train": instructions(random, sizes["examples"], WRONG),
            "batches": data.batches(
                random, np.arange(sizes["examples"]), sizes["batch"], sizes["steps"]
            ),
            "validation": instructions(random, sizes["held_out"], 0.0),
            "test": instructions(random, sizes["held_out"], 0.0),
        }

    def answers(params, lines):
        return params(lines[:, :-1])[:, -ANSWER:], lines[:, -ANSWER:]

    def loss(params, shared, drawn, step):
        logits, wanted = answers(params, drawn["train"][drawn["batches"][step]])
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    def evaluate(params, shared, drawn):
        def exact(lines):
            # Every character is right after right ones: so is what the model writes by itself.
            logits, wanted = answers(params, lines)
            return jnp.mean(jnp.all(jnp.argmax(logits, -1) == wanted, -1))

        return {"validation": exact(drawn["validation"]), "exact": exact(drawn["test"])}

    return Task({}, draw, loss, evaluate)


def adamw(h):
    """AdamW."""
    return chains.adam(h["learning_rate"], weight_decay=h["weight_decay"])


def casmo(h):
    """CASMO, calibrated in the first fifth of the run."""
    rate, decay = h["learning_rate"], h["weight_decay"]
    return chains.casmo(rate, weight_decay=decay, tau_init_steps=h["steps"] // 5)


def magma(h):
    """Magma around AdamW."""
    return chains.magma(adamw(h), seed=jax.random.key(h["seed"], impl="threefry2x32"))


def at_mean_factor(point, measured):
    """Magma's mean s m in the rate; the decay is masked with the step."""
    factor = 0.5 * float(np.mean(measured["alignment"]))
    return {**point, "learning_rate": factor * point["learning_rate"]}


GRID = {"learning_rate": log_grid(1e-3, 1e-2, 3), "weight_decay": log_grid(0.01, 1, 3)}
NORMAL = {"examples": 3000, "held_out": 500, "batch": 32, "width": 32, "depth": 2}
EXPERIMENT = Experiment(
    id="E9",
    title="Noisy instructions",
    source="CASMO, README (a Gemma model tuned on instructions of which 30 % are corrupted)",
    data=f"{NORMAL['examples']} instructions from a generator, {WRONG:.0%} with a wrong answer; 500 right ones to tune "
    "by, 500 to report",
    model="a transformer of two layers over characters",
    build=build,
    arms=[
        Arm("adamw", "baseline", adamw, GRID),
        Arm("casmo", "claim", casmo, GRID, mean_metric("confidence")),
        Arm("casmo off", "mechanism-off", adamw, matches="casmo", match=folded("confidence")),
        Arm("casmo_snr", "claim", snr(), GRID, ratio),
        Arm(
            "casmo_snr off",
            "mechanism-off",
            snr(robustness=0.0, rel_floor=1.0),
            measure=ratio,
            matches="casmo_snr",
            match=folded("ratio"),
        ),
        Arm("magma", "claim", magma, GRID, mean_metric("alignment")),
        Arm("magma off", "mechanism-off", adamw, matches="magma", match=at_mean_factor),
    ],
    claims=[
        Claim("CASMO resists wrong instructions", "casmo", "adamw", "exact", "casmo off"),
        Claim(
            "CASMO 0.4 resists wrong instructions", "casmo_snr", "adamw", "exact", "casmo_snr off"
        ),
        Claim("Magma resists wrong instructions", "magma", "adamw", "exact", "magma off"),
    ],
    metrics=[Metric("exact", "right answers held out", margin=0.02, percent=True)],
    tune_on=Metric("validation", "right answers to tune by", margin=0.0, percent=True),
    settings={
        "quick": quick(
            20,
            {"examples": 40, "held_out": 20, "batch": 8, "width": 16, "depth": 1},
            arms=("adamw", "casmo", "casmo off", "magma", "magma off"),
        ),
        "normal": Setting(
            steps=600, sizes=NORMAL, evaluations=10, seeds=10, tuning_seeds=1, block=10
        ),
        "full": Setting(
            steps=10_000,
            sizes={"examples": 50_000, "held_out": 2000, "batch": 128, "width": 256, "depth": 6},
            evaluations=50,
            seeds=10,
            tuning_seeds=2,
            block=10,
        ),
    },
)
