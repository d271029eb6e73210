"""E5: Magma on quadratics of unlike blocks and on a small language model.

Magma scales the update of each tensor by s in about [0.4, 0.6] and drops half of them, but leaves embeddings and the
output alone: these run at about four times the rate of the rest. Without the mechanism it is that split rate, at what
Magma's own mean s m was, or at 0.28 and tuned. "skip" drops alone, and doubles what it keeps.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule import chains, transforms
from chainrule.evidence import tasks
from chainrule.evidence.experiment import (
    Arm,
    Claim,
    Experiment,
    Metric,
    Setting,
    Task,
    across,
    log_grid,
    quick,
)
from chainrule.evidence.probes import mean_metric

EXCLUDED = "embedding|positions|output|bias"
KEEP = 0.5
SIDE = 16
"""Rows and columns of each matrix of the quadratic."""


def build(sizes: Mapping[str, Any]) -> Task:
    """The task that the condition names."""
    return tasks.language(sizes) if sizes["task"] == "language" else quadratic(sizes)


def quadratic(sizes: Mapping[str, Any]) -> Task:
    """Blocks with spectra of their own, each over a hundredfold, in all over 10^5; the gradient is noisy.

    Held out is the loss without noise; its logarithm is the metric, in which 0.01 is 1 %.
    """
    centres = np.geomspace(1e-2, 10, sizes["blocks"])

    def draw(seed):
        random = np.random.default_rng(seed)
        curvatures = [
            centre * np.geomspace(0.1, 10, SIDE * SIDE)[random.permutation(SIDE * SIDE)]
            for centre in random.permutation(centres)
        ]
        names = ["embedding", *(f"matrix_{i}" for i in range(1, sizes["blocks"]))]
        curvature = {
            name: np.reshape(c, (SIDE, SIDE)).astype(np.float32)
            for name, c in zip(names, curvatures, strict=True)
        }
        params = {name: random.normal(size=(SIDE, SIDE)).astype(np.float32) for name in names}
        return params, {"curvature": curvature, "seed": np.int32(seed)}

    def exact(params, drawn):
        terms = [jnp.sum(c * params[name] ** 2) for name, c in drawn["curvature"].items()]
        return 0.5 * jnp.sum(jnp.stack(terms))

    def gradient(params, shared, drawn, step):
        del shared
        loss, grads = jax.value_and_grad(exact)(params, drawn)
        key = jax.random.fold_in(jax.random.key(drawn["seed"]), step)
        noise = optax.tree.random_like(key, params, jax.random.normal)
        # Noise is largest where the curvature is, as of gradients of a likelihood.
        return loss, jax.tree.map(
            lambda g, c, n: g + jnp.sqrt(c) * n, grads, drawn["curvature"], noise
        )

    def loss(params, shared, drawn, step):
        return exact(params, drawn)

    def evaluate(params, shared, drawn):
        logarithm = jnp.log(exact(params, drawn))
        return {"validation": logarithm, "loss": logarithm}

    return Task({}, draw, loss, evaluate, gradient)


BASES = {
    "adam": lambda rate: chains.adam(rate, weight_decay=None),
    "rmsprop": lambda rate: optax.rmsprop(rate, decay=0.99, bias_correction=True),
    "muon": lambda rate: chains.muon(rate, weight_decay=None, adam_lr_ratio=0.1),
}


def split(factor: Any) -> optax.GradientTransformation:
    """Multiplies the updates that Magma would mask."""

    def masked(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not re.search(EXCLUDED, jax.tree_util.keystr(path)), params
        )

    return optax.masked(optax.scale(factor), masked)


def mask(seed: jax.Array, **settings: Any) -> optax.GradientTransformation:
    """Magma's link, with a moment of its own, as not every base has one."""
    key = jax.random.key(seed, impl="threefry2x32")
    return transforms.momentum_alignment_mask(
        KEEP, moment="own", exclude=EXCLUDED, seed=key, **settings
    )


def arms_on(base: str) -> list[Arm]:
    """The base, Magma around it, and what else could do what Magma does."""
    rate = BASES[base]

    def then(link: Any) -> Any:
        """The base at its rate, then `link`, made of the hyperparameters."""
        return lambda h: transforms.chain(rate(h["learning_rate"]), link(h))

    # An alignment of 1/2 for ever, twice.
    skip = then(
        lambda h: transforms.chain(mask(h["seed"], tau=1e6, init_alignment=0.5), split(2.0))
    )
    grid = {"learning_rate": log_grid(*((1e-2, 0.3) if base == "muon" else (2e-3, 6e-2)), 5)}
    return [
        Arm(base, "baseline", lambda h: rate(h["learning_rate"]), grid),
        Arm(
            f"{base} magma",
            "claim",
            then(lambda h: mask(h["seed"])),
            grid,
            measure=mean_metric("alignment"),
        ),
        Arm(
            f"{base} magma off",
            "mechanism-off",
            then(lambda h: split(h["factor"])),
            matches=f"{base} magma",
            match=mean_factor,
        ),
        Arm(f"{base} split", "control", then(lambda h: split(0.28)), grid),
        Arm(f"{base} skip", "control", skip, grid),
        Arm(f"{base} cautious", "control", then(lambda h: transforms.cautious(negated=True)), grid),
    ]


def mean_factor(point, measured):
    """Magma's mean s m, at its rate."""
    return {
        "learning_rate": point["learning_rate"],
        "factor": KEEP * float(np.mean(measured["alignment"])),
    }


def claims_on(base: str) -> list[Claim]:
    """What Magma claims, and what its controls would."""
    return [
        Claim(f"Magma improves {base}", f"{base} magma", base, "loss", f"{base} magma off"),
        Claim(f"A split rate alone improves {base}", f"{base} split", base, "loss"),
        Claim(f"Dropping updates alone improves {base}", f"{base} skip", base, "loss"),
        Claim(f"Caution improves {base}", f"{base} cautious", base, "loss"),
    ]


CONDITIONS = {"quadratic": {"task": "quadratic"}, "language": {"task": "language"}}
ARMS, CLAIMS = across(
    CONDITIONS,
    [arm for base in BASES for arm in arms_on(base)],
    [claim for base in BASES for claim in claims_on(base)],
)


EXPERIMENT = Experiment(
    id="E5",
    title="Magma on unlike quadratics and a small language model",
    source="Magma (arXiv 2602.15322)",
    data="noisy quadratics; the sources of Python's standard library as characters, a tenth held out",
    model="matrices; a transformer",
    build=build,
    arms=ARMS,
    claims=CLAIMS,
    metrics=[Metric("loss", "held-out loss (of the quadratic: its logarithm)", 0.01, better=-1)],
    tune_on=Metric("validation", "loss to tune by", margin=0.0, better=-1),
    conditions=CONDITIONS,
    settings={
        "quick": quick(
            20,
            {"blocks": 3, "batch": 2, "places": 8, "width": 16, "depth": 1, "windows": 8},
            arms=(
                "adam (quadratic)",
                "adam magma (quadratic)",
                "adam magma off (quadratic)",
                "adam skip (quadratic)",
                "muon (language)",
                "muon cautious (language)",
            ),
        ),
        "normal": Setting(
            steps=300,
            sizes={"blocks": 8, "batch": 8, "places": 32, "width": 32, "depth": 1, "windows": 64},
            evaluations=10,
            seeds=10,
            tuning_seeds=1,
            block=8,
        ),
        "full": Setting(
            steps=5000,
            sizes={
                "blocks": 32,
                "batch": 64,
                "places": 128,
                "width": 256,
                "depth": 6,
                "windows": 512,
            },
            evaluations=50,
            seeds=10,
            tuning_seeds=2,
            block=10,
        ),
    },
)
