"""E11: what does recombining give? Chains of the algebra's atoms that no one has published, against AdamW and Muon.

A chain takes one atom of each column below. Published are those with at most one atom besides the direction (STAM,
CASMO, C-AdamW, Magma, Grokfast, OrthoGrad are such), and caution with a filter, which KerasOptimizers composes; of
the others `CHAINS` are drawn by chance, equally many for each direction. Successive halving picks three. The mechanism
off is the direction alone, with a fixed first moment.
"""

import itertools
from collections.abc import Mapping
from typing import Any, cast

import jax
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

CHAINS = 24
DECAY = 0.01
MOMENTS: dict[str, Any] = {
    "": {"b1_base": 0.9, "adapt_strength": 0.0},
    "adaptive": {"b1_base": 0.98, "adapt_strength": 0.45, "signal": "noise"},
}
CONFIDENCES = ("", "agar", "agar a tensor", "snr")
GATES = ("", "cautious", "mask")
FILTERS = ("", "grokfast", "orthograd")
GRIDS = {
    "adam": log_grid(1e-3, 1e-2, 3),
    "muon": log_grid(1e-2, 1e-1, 3),
    "sign": log_grid(3e-4, 3e-3, 3),
    "rms": log_grid(3e-3, 3e-2, 3),
}
"""Rates, by direction."""
Parts = tuple[str, str, str, str]
"""First moment, confidence, gate and filter; an empty name is none."""


def read() -> optax.GradientTransformation:
    """The first moment out of the leaf that `adaptive_beta1` hands on."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda leaf: leaf.mu / leaf.correction, updates)
    )


def beside(link: optax.GradientTransformation) -> optax.GradientTransformation:
    """`link` sees the raw gradient and remembers; the updates pass. For links that read its moments."""

    def update(updates: Any, state: Any, params: Any = None, *, grad: Any, **_: Any) -> Any:
        return updates, link.update(grad, state, params)[1]

    return optax.GradientTransformationExtraArgs(link.init, cast(Any, update))


def direction(name: str, moment: str) -> optax.GradientTransformation:
    """A first moment and what makes a direction of it."""
    first = transforms.adaptive_beta1(**MOMENTS[moment])
    adam = transforms.chain(first, transforms.scale_by_adam(b1=None))
    if name == "adam":
        return adam
    if name == "rms":
        return transforms.chain(first, transforms.scale_by_tensor_rms())
    if name == "sign":
        return transforms.chain(first, read(), optax.scale_by_sign())
    muon = transforms.chain(first, read(), transforms.newton_schulz())
    rest = transforms.chain(adam, optax.scale(0.1))
    return optax.partition({"muon": muon, "adam": rest}, transforms.HIDDEN_MATRICES)


def confidence(name: str, steps: int) -> optax.GradientTransformation:
    """A link that scales the step by how sure the gradient is, calibrated in the first fifth of the run."""
    if name == "snr":
        return transforms.chain(beside(transforms.scale_by_belief()), transforms.snr_confidence())
    granularity = "parameter" if name == "agar a tensor" else "group"
    return transforms.agar_confidence(max(1, steps // 5), source="own", granularity=granularity)


def gate(name: str, seed: Any) -> optax.GradientTransformation:
    """A link that drops a part of the step."""
    if name == "cautious":
        return transforms.cautious()
    key = jax.random.key(seed, impl="threefry2x32")
    return transforms.momentum_alignment_mask(moment="own", seed=key)


def recombined(name: str, parts: Parts):
    """The chain of a direction and `parts`, as an arm's `make`."""
    moment, trust, drop, filtered = parts

    def make(h):
        links = [direction(name, moment)]
        if filtered:
            links.insert(
                0,
                {"grokfast": transforms.grokfast_ema, "orthograd": transforms.orthograd}[
                    filtered
                ](),
            )
        if trust:
            links.append(confidence(trust, h["steps"]))
        if drop:
            links.append(gate(drop, h["seed"]))
        return transforms.chain(
            *links, transforms.decay_and_rate(h["learning_rate"], weight_decay=DECAY)
        )

    return make


def published(parts: Parts) -> bool:
    """Whether somebody has proposed these parts together, or any one by itself."""
    moment, trust, drop, _ = parts
    return sum(map(bool, parts)) < 2 or (drop == "cautious" and not moment and not trust)


def drawn() -> dict[str, tuple[str, Parts]]:
    """The candidates: their direction and parts by name."""
    random = np.random.default_rng(0)
    columns = itertools.product(MOMENTS, CONFIDENCES, GATES, FILTERS)
    new = [parts for parts in columns if not published(parts)]
    return {
        " + ".join([name, *filter(None, new[i])]): (name, new[i])
        for name in GRIDS
        for i in sorted(random.choice(len(new), CHAINS // len(GRIDS), replace=False))
    }


def adamw(h):
    """AdamW."""
    return chains.adam(h["learning_rate"], weight_decay=DECAY)


def muon(h):
    """Muon as published: Nesterov momentum of 0.95."""
    return chains.muon(h["learning_rate"], weight_decay=DECAY, adam_lr_ratio=0.1)


def build(sizes: Mapping[str, Any]) -> Task:
    """The task that the condition names."""
    return tasks.language(sizes) if sizes["task"] == "language" else tasks.noisy_digits(sizes)


def arms() -> list[Arm]:
    """Baselines, directions alone and candidates."""
    grids = {name: {"learning_rate": rates} for name, rates in GRIDS.items()}
    alone: Parts = ("", "", "", "")
    return [
        Arm("adamw", "baseline", adamw, grids["adam"]),
        Arm("muon", "baseline", muon, grids["muon"]),
        *(
            Arm(f"{name} alone", "mechanism-off", recombined(name, alone), grids[name])
            for name in GRIDS
        ),
        *(
            Arm(chain, "candidate", recombined(name, parts), grids[name])
            for chain, (name, parts) in drawn().items()
        ),
    ]


def claims() -> list[Claim]:
    """Of every candidate, whether or not it is among the three."""
    return [
        Claim(f"Recombining beats tuned {shown}", chain, baseline, "loss", f"{name} alone")
        for chain, (name, _) in drawn().items()
        for baseline, shown in (("adamw", "AdamW"), ("muon", "Muon"))
    ]


CONDITIONS: dict[str, dict[str, Any]] = {
    "language": {"task": "language"},
    "digits": {"task": "digits", "wrong": 0.3},
}
ARMS, CLAIMS = across(CONDITIONS, arms(), claims())
SMALLEST = list(drawn())[:2]


EXPERIMENT = Experiment(
    id="E11",
    title="Recombination: chains that no one has published",
    source="nobody: the question that an algebra of atoms poses",
    data="the sources of Python's standard library as characters, a tenth held out; scikit-learn's digits, 30 % of the "
    "997 to train on labelled wrong, the 800 held out labelled right",
    model="a transformer of one layer; a network of one hidden layer",
    build=build,
    arms=ARMS,
    claims=CLAIMS,
    metrics=[Metric("loss", "held-out loss", 0.01, better=-1)],
    tune_on=Metric("validation", "loss to tune by", margin=0.0, better=-1),
    conditions=CONDITIONS,
    settings={
        "quick": quick(
            20,
            {"batch": 2, "places": 8, "width": 16, "depth": 1, "windows": 8, "hidden": (8,)},
            halving=((1, 1),),
            arms=(
                "adamw (digits)",
                "muon (digits)",
                "adam alone (digits)",
                *(f"{name} (digits)" for name in SMALLEST),
            ),
        ),
        "normal": Setting(
            steps=300,
            sizes={
                "batch": 8,
                "places": 32,
                "width": 32,
                "depth": 1,
                "windows": 64,
                "hidden": (64,),
            },
            evaluations=10,
            seeds=10,
            tuning_seeds=2,
            block=6,
            halving=((2, 8), (5, 3)),
        ),
        "full": Setting(
            steps=5000,
            sizes={
                "batch": 64,
                "places": 128,
                "width": 256,
                "depth": 6,
                "windows": 128,
                "hidden": (256, 256),
            },
            evaluations=50,
            seeds=20,
            tuning_seeds=2,
            block=2,
            halving=((2, 12), (10, 6), (25, 3)),
        ),
    },
)
