"""From a file of results to verdicts."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from chainrule.evidence.experiment import TUNING_SEEDS, Claim, Metric
from chainrule.evidence.statistics import Comparison, compare, verdict
from chainrule.evidence.store import number

Document = Mapping[str, Any]


class Conclusion(NamedTuple):
    """What came of a claim; differences are positive where the method is better."""

    claim: Claim
    metric: Metric
    over_baseline: Comparison
    over_off: Comparison | None
    verdict: str


def metrics(document: Document) -> dict[str, Metric]:
    """The metrics of a document by name."""
    return {entry["name"]: Metric(**entry) for entry in document["metrics"]}


def reported(document: Document, arm: str) -> dict[int, dict[str, Any]]:
    """The reported runs of an arm at its tuned hyperparameters, by seed."""
    point = document["arms"][arm]["point"]
    return {
        run["seed"]: run
        for run in sorted(document["runs"], key=lambda run: run["seed"])
        if run["arm"] == arm and run["seed"] < TUNING_SEEDS and run["point"] == point
    }


def values(document: Document, arm: str, metric: str) -> np.ndarray:
    """(seeds,): the last value of a metric in each reported run of an arm."""
    return np.array([number(run["final"][metric]) for run in reported(document, arm).values()])


def conclude(document: Document) -> list[Conclusion]:
    """Every claim whose arms have run, in one family for Holm's correction."""
    known = metrics(document)
    claims = [
        claim
        for entry in document["claims"]
        if {(claim := Claim(**entry)).arm, claim.baseline, *([claim.off] if claim.off else [])}
        <= set(document["arms"])
    ]
    pairs, places = [], []
    for claim in claims:
        others = [claim.baseline, *([claim.off] if claim.off else [])]
        places.append((len(pairs), len(others)))
        pairs += [_pair(document, claim.arm, other, known[claim.metric]) for other in others]
    compared = compare(pairs)
    found = []
    for claim, (first, count) in zip(claims, places, strict=True):
        gain, off = compared[first], compared[first + 1] if count == 2 else None
        metric = known[claim.metric]
        said = verdict(gain.corrected, off and off.corrected, metric.margin)
        found.append(Conclusion(claim, metric, gain, off, said))
    return found


def _pair(document: Document, arm: str, other: str, metric: Metric) -> Any:
    """Both arms' results on the seeds that both have, turned so that more is better."""
    ours, theirs = reported(document, arm), reported(document, other)
    seeds = [seed for seed in ours if seed in theirs]
    return tuple(
        [metric.better * number(runs[seed]["final"][metric.name]) for seed in seeds]
        for runs in (ours, theirs)
    )
