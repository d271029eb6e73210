"""One figure an experiment: how each arm learned, and what came of each claim."""

import io
import pathlib

import numpy as np

from chainrule.evidence.conclusions import Document, conclude, metrics, reported
from chainrule.evidence.experiment import Metric
from chainrule.evidence.store import number


def draw(document: Document, path: pathlib.Path) -> None:
    """Saves a PNG: for each condition the first metric over the run, mean and 95 % band of the seeds; what arms
    measured of themselves, if any did; and the paired differences of each claim.
    """
    from matplotlib.figure import Figure

    conditions = dict.fromkeys(info.get("condition", "") for info in document["arms"].values())
    measured = sorted({name for run in document["runs"] for name in run.get("measured", {})})
    drawn = [(_draw_curves, condition) for condition in conditions]
    drawn += [(_draw_measure, name) for name in measured]
    drawn += [(_draw_claims, "")]
    height = 4.2 + 0.25 * max(0, len(conclude(document)) - 9)
    figure = Figure(figsize=(1.5 + 4.5 * len(drawn), height), layout="constrained")
    axes = figure.subplots(1, len(drawn))
    for axis, (draw_one, what) in zip(axes, drawn, strict=True):
        draw_one(document, what, axis)
    figure.suptitle(_title(document), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)


def _save(figure, path: pathlib.Path) -> None:
    """A PNG of at most 48 colours: bands that overlap have thousands."""
    from PIL import Image

    whole = io.BytesIO()
    figure.savefig(whole, dpi=80)
    colours = Image.open(whole).convert("RGB").quantize(48, Image.Quantize.FASTOCTREE)
    colours.save(path, optimize=True)


def _draw_claims(document: Document, what: str, forest) -> None:
    del what
    found = conclude(document)
    colours = {"baseline": "tab:blue", "off": "tab:orange"}
    for row, conclusion in enumerate(found):
        metric = conclusion.metric
        scale = 100 if metric.percent else 1
        for offset, (kind, comparison) in enumerate(
            (("baseline", conclusion.over_baseline), ("off", conclusion.over_off))
        ):
            if comparison is None:
                continue
            effect, low, high = (scale * value for value in comparison.corrected)
            y = -row - 0.22 * offset
            if np.isfinite(low):
                forest.plot([low, high], [y, y], color=colours[kind], linewidth=1.5)
            forest.plot(effect, y, "o", color=colours[kind], markersize=4)
        forest.axhspan(-row - 0.42, -row + 0.2, alpha=0.05, color="0.3", linewidth=0)
    forest.axvline(0, color="0.5", linewidth=0.8)
    labels = [f"{c.claim.arm} over {c.claim.baseline}\n{c.metric.name}: {c.verdict}" for c in found]
    forest.set_yticks([-i - 0.11 for i in range(len(found))], labels, fontsize=7)
    forest.set_xlabel("paired difference, positive is better (Holm interval)", fontsize=8)
    for kind, text in (("baseline", "over the tuned baseline"), ("off", "over mechanism off")):
        forest.plot([], [], "o-", color=colours[kind], markersize=4, label=text)
    forest.legend(fontsize=7)


def _title(document: Document) -> str:
    n = max((c.over_baseline.n for c in conclude(document)), default=0)
    return (
        f"{document['experiment']}: {document['title']} ({document['setting']} setting, {n} seeds)"
    )


def _draw_curves(document: Document, condition: str, axis) -> None:
    """The first metric that has curves, for not all have; or else the training loss."""
    curves = next(run["curves"] for run in document["runs"] if "curves" in run)
    loss = Metric("train_loss", "training loss", margin=0.0, better=-1)
    metric = next((m for m in metrics(document).values() if m.name in curves), loss)
    scale = 100 if metric.percent else 1
    for arm, info in document["arms"].items():
        if info.get("condition", "") != condition:
            continue
        runs = reported(document, arm).values()
        lines = [[number(v) for v in run["curves"][metric.name]] for run in runs]
        _band(document, scale * np.array(lines), axis, arm.removesuffix(f" ({condition})"))
    axis.set_title(condition, fontsize=8)
    _finish(axis, metric.label + (" (%)" if metric.percent else ""))


def _draw_measure(document: Document, name: str, axis) -> None:
    for arm in document["arms"]:
        runs = reported(document, arm).values()
        lines = [[number(v) for v in run["measured"].get(name, [])] for run in runs]
        _band(document, np.array(lines), axis, arm)
    _finish(axis, f"{name}, measured")


def _band(document: Document, lines: np.ndarray, axis, label: str) -> None:
    """Mean and 95 % band of (runs, evaluations), if there are any."""
    if not lines.size:
        return
    settings = document["settings"]
    steps = np.linspace(0, settings["steps"], settings["evaluations"] + 1)[1:]
    mean, half = lines.mean(0), 1.96 * lines.std(0) / np.sqrt(len(lines))
    (line,) = axis.plot(steps, mean, linewidth=1.4, label=label)
    axis.fill_between(
        steps, mean - half, mean + half, color=line.get_color(), alpha=0.15, linewidth=0
    )


def _finish(axis, label: str) -> None:
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(label, fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6)
