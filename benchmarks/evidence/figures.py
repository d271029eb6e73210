"""One figure an experiment: how each arm learned, and what came of each claim."""

import pathlib

import numpy as np

from chainrule.evidence.conclusions import Document, conclude, metrics, reported
from chainrule.evidence.store import number


def draw(document: Document, path: pathlib.Path) -> None:
    """Saves a PNG: the first metric over the run, mean and 95 % band of the seeds; each claim's paired differences."""
    from matplotlib.figure import Figure

    found = conclude(document)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    curves, forest = figure.subplots(1, 2, width_ratios=(1, 1))
    _draw_curves(document, curves)
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
    labels = [f"{c.claim.arm}\n{c.metric.name}: {c.verdict}" for c in found]
    forest.set_yticks([-i - 0.11 for i in range(len(found))], labels, fontsize=7)
    forest.set_xlabel("paired difference, positive is better (Holm interval)", fontsize=8)
    for kind, text in (("baseline", "over the tuned baseline"), ("off", "over mechanism off")):
        forest.plot([], [], "o-", color=colours[kind], markersize=4, label=text)
    forest.legend(fontsize=7)
    n = max((c.over_baseline.n for c in found), default=0)
    title = (
        f"{document['experiment']}: {document['title']} ({document['setting']} setting, {n} seeds)"
    )
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _draw_curves(document: Document, axis) -> None:
    metric = next(iter(metrics(document).values()))
    scale = 100 if metric.percent else 1
    for arm in document["arms"]:
        runs = reported(document, arm).values()
        lines = np.array(
            [[number(v) for v in run["curves"].get(metric.name, [])] for run in runs], float
        )
        if not lines.size:
            continue
        settings = document["settings"]
        steps = np.linspace(0, settings["steps"], settings["evaluations"] + 1)[1:]
        mean, half = scale * lines.mean(0), scale * 1.96 * lines.std(0) / np.sqrt(len(lines))
        (line,) = axis.plot(steps, mean, linewidth=1.4, label=arm)
        axis.fill_between(
            steps, mean - half, mean + half, color=line.get_color(), alpha=0.15, linewidth=0
        )
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(metric.label + (" (%)" if metric.percent else ""), fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
