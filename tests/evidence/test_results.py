"""The committed results keep to the protocol, and the committed report is what they say."""

import json
import math
import pathlib

import numpy as np
import pytest
from scipy import stats

from chainrule.evidence import experiments, report
from chainrule.evidence.conclusions import conclude, metrics, reported
from chainrule.evidence.experiment import TUNING_SEEDS
from chainrule.evidence.store import number

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks" / "evidence" / "results"
DOCUMENTS = {
    d["experiment"]: d
    for d in map(json.loads, map(pathlib.Path.read_text, sorted(RESULTS.glob("*.json"))))
}
each_document = pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)


def test_every_experiment_has_one_finished_normal_run():
    assert set(DOCUMENTS) == set(experiments.names())
    assert len(list(RESULTS.glob("*.json"))) == len(DOCUMENTS)
    for document in DOCUMENTS.values():
        assert document["finished"] is not None
        assert document["setting"] == "normal"


def test_the_report_is_written_from_the_results():
    assert (RESULTS / "REPORT.md").read_text() == report.render(report.chosen(RESULTS))
    for name in DOCUMENTS:
        assert 0 < (RESULTS / f"{name}.png").stat().st_size < 80_000


@each_document
def test_all_arms_are_reported_on_the_same_seeds_which_tune_nothing(document):
    seeds = {arm: list(reported(document, arm)) for arm in document["arms"]}
    assert set(map(tuple, seeds.values())) == {tuple(range(len(next(iter(seeds.values())))))}
    assert min(map(len, seeds.values())) >= 10
    for run in document["runs"]:
        # A reported seed never tried other hyperparameters than those that tuning chose. (More seeds move the means
        # that a matched arm is made from.)
        arm = document["arms"].get(run["arm"], {"matches": None})
        assert run["seed"] >= TUNING_SEEDS or "matches" in arm or run["point"] == arm["point"]


@each_document
def test_each_arm_is_at_the_interior_optimum_of_its_tuning(document):
    """From as many first trials as every other; recomputed from the tuning runs."""
    name, sign = document["tune_on"]["name"], document["tune_on"]["better"]
    tuned = {arm: info for arm, info in document["arms"].items() if "matches" not in info}
    assert len({math.prod(map(len, info["grid"].values())) for info in tuned.values()}) == 1
    halving = TUNING_SEEDS + document["settings"]["tuning_seeds"]
    for arm, info in tuned.items():
        scores: dict[str, list[float]] = {}
        for run in document["runs"]:
            if run["arm"] == arm and TUNING_SEEDS <= run["seed"] < halving:
                scores.setdefault(json.dumps(run["point"]), []).append(
                    sign * number(run["final"][name])
                )
        assert {len(found) for found in scores.values()} == {document["settings"]["tuning_seeds"]}
        means = {point: np.mean(found) for point, found in scores.items()}
        # Six digits are stored: equal scores may have been apart.
        best = np.nanmax(list(means.values()))
        assert means[json.dumps(info["point"])] == pytest.approx(best, rel=2e-6), arm
        for axis, values in info["axes"].items():
            assert min(values) < info["point"][axis] < max(values), (arm, axis)


@each_document
def test_some_claim_has_its_mechanism_off(document):
    found = conclude(document)
    assert any(c.over_off is not None for c in found)
    assert any(info["role"] == "mechanism-off" for info in document["arms"].values())


@each_document
def test_intervals_are_paired_and_corrected_over_all_comparisons(document):
    """Holm's adjusted p-values by their definition, over every paired t test of the document."""
    found, known = conclude(document), metrics(document)
    raw, told = [], []
    for c in found:
        for other, comparison in ((c.claim.baseline, c.over_baseline), (c.claim.off, c.over_off)):
            if other is None or comparison is None:
                continue
            ours, theirs = (
                np.array([run["final"][c.claim.metric] for run in reported(document, arm).values()])
                for arm in (c.claim.arm, other)
            )
            gain = known[c.claim.metric].better * (ours - theirs)
            raw.append(stats.ttest_rel(ours, theirs).pvalue if np.ptp(gain) else float(not gain[0]))
            told.append(comparison.p)
            assert comparison.interval.effect == pytest.approx(gain.mean(), abs=1e-12)
            assert comparison.n == len(gain)
    order = np.argsort(raw, kind="stable")
    adjusted = np.maximum.accumulate(np.array(raw)[order] * np.arange(len(raw), 0, -1)).clip(max=1)
    np.testing.assert_allclose(np.array(told)[order], adjusted, rtol=1e-6)
