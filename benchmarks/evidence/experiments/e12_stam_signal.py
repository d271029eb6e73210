"""E12: what STAM's b1 does when noise jumps and when drift jumps, on a gradient whose best b1 is known.

Nothing is trained: the gradient of 256 entries is a random walk, of d a step, seen through noise of s, and the
"parameters" are the first moment after each step. It is best at b1 = 1 - 2 d / (d + sqrt(d^2 + 4 s^2)), which rises
with noise and falls with drift (`transforms/_noise_signal.py` derives it). The mechanism off is a constant b1.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule import transforms
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
from chainrule.evidence.probes import mean_metric

NOISE = np.array([1.0, 5.0, 1.0, 1.0, 1.0], np.float32)
DRIFT = np.array([0.1, 0.1, 0.1, 0.5, 0.1], np.float32)
PHASES = len(NOISE)
ENTRIES = 256


def build(sizes: Mapping[str, Any]) -> Task:
    """A noisy gradient that drifts; a step returns the squared error of the moment before it, as a prediction."""
    phase = np.repeat(np.arange(PHASES), sizes["steps"] // PHASES)

    def draw(seed):
        random = np.random.default_rng(seed)
        moves, noise = random.normal(size=(2, sizes["steps"], ENTRIES))
        mean = np.cumsum(DRIFT[phase, None] * moves, 0)
        gradients = mean + NOISE[phase, None] * noise
        drawn = {"mean": mean, "gradients": gradients}
        return np.zeros(ENTRIES, np.float32), jax.tree.map(np.float32, drawn)

    def loss(params, shared, drawn, step):
        return jnp.mean((params - drawn["mean"][step]) ** 2)

    def gradient(params, shared, drawn, step):
        return loss(params, shared, drawn, step), drawn["gradients"][step]

    return Task({}, draw, loss, lambda params, shared, drawn: {}, gradient)


def constant(h):
    """A moment with b1 = 1 - gain."""
    return follow(optax.ema(1 - h["gain"], debias=True), lambda moment: moment)


def follow(moment: optax.GradientTransformation, read: Any) -> optax.GradientTransformation:
    """Makes the parameters what `read` finds in the updates of `moment`."""

    def update(updates, state, params=None):
        updates, state = moment.update(updates, state)
        return jax.tree.map(lambda u, p: read(u) - p, updates, params), state

    return optax.GradientTransformation(moment.init, update)


def adaptive(signal: str):
    """A moment with an adaptive b1 of at most 0.98; the memory of its statistics is tuned."""

    def make(h):
        decay = 1 - h["forget"]
        moment = transforms.adaptive_beta1(
            0.98, adapt_strength=0.45, signal=signal, tau_decay=decay, moment_decay=decay
        )
        return follow(moment, lambda leaf: leaf.mu / leaf.correction)

    return make


def best(h):
    """The moment with the best constant b1 of each phase, which only who knows noise and drift can have."""
    gains = 2 * DRIFT / (DRIFT + np.sqrt(DRIFT**2 + 4 * NOISE**2))
    length = h["steps"] // PHASES

    def init(params):
        return {"count": jnp.zeros((), jnp.int32), "b1": jnp.ones(()), "mu": params}

    def update(updates, state, params=None):
        del params
        gain = jnp.asarray(gains)[state["count"] // length]
        mu = state["mu"] + gain * (updates - state["mu"])
        return mu, {"count": state["count"] + 1, "b1": 1 - gain, "mu": mu}

    return follow(optax.GradientTransformation(init, update), lambda moment: moment)


def at_its_mean(point, measured):
    """The constant b1 that is an adaptive one's mean."""
    del point
    return {"gain": 1 - float(np.mean(measured["b1"]))}


GAINS = {"gain": log_grid(0.02, 0.5, 5)}
FORGET = {"forget": log_grid(3e-3, 0.3, 5)}
ERROR = Metric("error", "squared error of the moment", margin=0.01, better=-1)


EXPERIMENT = Experiment(
    id="E12",
    title="STAM's b1 through jumps of noise and drift",
    source='STAM, README ("high variance lowers b1"), and the theory of `signal="noise"`',
    data=f"a random walk of {ENTRIES} entries seen through noise; noise jumps fivefold in the second of five phases, "
    "drift in the fourth",
    model="none: the moment itself",
    build=build,
    arms=[
        Arm("constant", "baseline", constant, GAINS),
        Arm("residual", "claim", adaptive("residual"), FORGET, measure=mean_metric("b1")),
        Arm("residual off", "mechanism-off", constant, matches="residual", match=at_its_mean),
        Arm("moments", "claim", adaptive("moments"), FORGET, measure=mean_metric("b1")),
        Arm("moments off", "mechanism-off", constant, matches="moments", match=at_its_mean),
        Arm("noise", "hypothesis", adaptive("noise"), FORGET, measure=mean_metric("b1")),
        Arm("noise off", "mechanism-off", constant, matches="noise", match=at_its_mean),
        Arm(
            "best",
            "control",
            best,
            matches="noise",
            match=lambda point, measured: {},
            measure=lambda state: {"b1": state["b1"]},
        ),
    ],
    claims=[
        Claim("STAM's b1 follows noise and drift", "residual", "constant", "error", "residual off"),
        Claim(
            "STAMLite's b1 follows noise and drift", "moments", "constant", "error", "moments off"
        ),
        Claim("b1 by noise over time follows both", "noise", "constant", "error", "noise off"),
    ],
    metrics=[ERROR],
    tune_on=ERROR,
    summaries={"error": area("train_loss")},
    settings={
        "quick": quick(
            50,
            {},
            evaluations=5,
            arms=("constant", "noise", "noise off", "best"),
        ),
        "normal": Setting(steps=2000, evaluations=100, seeds=10, tuning_seeds=2, block=10),
        "full": Setting(steps=10000, evaluations=100, seeds=50, tuning_seeds=10, block=50),
    },
)
