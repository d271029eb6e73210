"""`REPORT.md`, written from the files of results alone."""

import itertools
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from chainrule.evidence import figures
from chainrule.evidence.conclusions import (
    Conclusion,
    Document,
    conclude,
    metrics,
    reported,
    values,
)
from chainrule.evidence.experiment import Metric
from chainrule.evidence.statistics import (
    ALPHA,
    EXPLAINED,
    NOT_REPRODUCED,
    REPRODUCED,
    REVERSED,
    UNDECIDED,
    Comparison,
    compare,
)
from chainrule.evidence.store import number

SETTINGS = ("quick", "normal", "full")
COSTS = {
    "step_microseconds": ("a warmed step, without gradients", "{:.0f} µs", 1.0),
    "tokens_per_second": ("tokens a second, all told", "{:.0f}", 1.0),
    "first_seconds": ("the first step", "{:.2f} s", 1.0),
    "state_bytes": ("state", "{:.3g} MB", 1e-6),
    "peak_bytes": ("peak memory of the process", "{:.0f} MB", 1e-6),
}
"""What a step costs, by its name in the file: a heading, how it is written, and in which unit."""

HEAD = """# Evidence: does each method do what it claims?

Written by `chainrule evidence report` from the JSON files beside it; nothing here is typed by hand.

Every arm starts from as many tuning trials as every other, on seeds that are not reported; a grid grows until its
optimum is inside. All arms share initial parameters, data and batches seed by seed. Differences are paired, and
positive where the method is better. Intervals are t intervals at the level that Holm's correction leaves each
comparison of an experiment (at least 95 %). *Mechanism off* is the method without its mechanism, at the same mean rate
and decay.

Verdicts, computed from the intervals and a margin chosen beforehand: **reproduced**, better than the tuned baseline and
than its own mechanism off; **explained by lr/decay**, better than the baseline, but no more than the margin better than
its mechanism off; **not reproduced**, a gain above the margin is ruled out; **reversed**, worse; **undecided**, these
seeds cannot tell.

A file's name ends with a key of its settings, versions and code: it goes on with more seeds at that code only, other
code starts another file.
"""

SAID = {
    REPRODUCED: "The claim holds here",
    EXPLAINED: "The gain is real, and the mechanism is not its cause",
    NOT_REPRODUCED: "A gain that matters is ruled out here",
    REVERSED: "The method is worse here",
    UNDECIDED: "The runs do not decide",
}


def chosen(folder: pathlib.Path) -> list[Document]:
    """Of each experiment the newest finished file of the largest setting, by the experiments' numbers."""
    documents = [json.loads(path.read_text()) for path in sorted(folder.glob("E*-*-*.json"))]
    best: dict[str, Document] = {}
    for document in documents:
        if document["finished"] is None:
            continue
        held = best.get(document["experiment"])
        if held is None or _rank(document) > _rank(held):
            best[document["experiment"]] = document
    return sorted(best.values(), key=lambda document: int(document["experiment"][1:]))


def _rank(document: Document) -> tuple[int, str]:
    return SETTINGS.index(document["setting"]), document["finished"]


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes `REPORT.md` and the figures of every finished experiment in `folder`."""
    documents = chosen(folder)
    if not documents:
        raise FileNotFoundError(
            f"{folder} has no finished results (E<number>-<setting>-<key>.json)"
        )
    for document in documents:
        figures.draw(document, folder / f"{document['experiment']}.png")
    path = folder / "REPORT.md"
    path.write_text(render(documents))
    return path


def render(documents: Iterable[Document]) -> str:
    """The report's text."""
    documents = list(documents)
    rows = [row for document in documents for row in _rows(document)]
    return "\n".join([HEAD, *_table(HEADINGS, rows), *map(_section, documents)]) + "\n"


HEADINGS = ("experiment", "claim", "verdict", "over the tuned baseline", "over mechanism off", "n")


def _rows(document: Document) -> list[tuple[str, ...]]:
    return [
        (
            f"[{document['experiment']}](#{document['experiment'].lower()})",
            f"{c.claim.text} ({c.claim.arm} over {c.claim.baseline}: {c.metric.label})",
            f"**{c.verdict}**",
            shown(c.over_baseline, c.metric),
            "" if c.over_off is None else shown(c.over_off, c.metric),
            str(c.over_baseline.n),
        )
        for c in conclude(document)
    ]


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = [headings, ("---",) * len(headings), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def shown(comparison: Comparison, metric: Metric) -> str:
    """The effect and its interval."""
    effect, low, high = comparison.corrected
    ends = [
        metric.shown(end, signed=True) if math.isfinite(end) else f"{'+' if end > 0 else '-'}∞"
        for end in (low, high)
    ]
    return f"{metric.shown(effect, signed=True)} [{ends[0]}, {ends[1]}]"


def _section(document: Document) -> str:
    name = document["experiment"]
    found = conclude(document)
    processor, versions = document["processor"], document["versions"]
    used = ", ".join(f"{package} {versions[package]}" for package in ("jax", "optax", "chainrule"))
    return "\n".join(
        [
            f'\n<a id="{name.lower()}"></a>\n## {name}: {document["title"]}\n',
            f"Claimed by {document['source']}. Data: {document['data']}. Model: {document['model']}. "
            f"{document['settings']['steps']} steps ({document['setting']} setting), "
            f"on {processor['name']} ({processor['cores']} cores), {used}.\n",
            *_halving(document),
            *_table(*_arms(document)),
            "",
            *_costs(document),
            *(_sentence(conclusion) for conclusion in found),
            *_bridged(document),
            f"\n![{name}]({name}.png)",
        ]
    )


def _arms(document: Document) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    known = list(metrics(document).values())
    rows = []
    for arm, info in document["arms"].items():
        point = ", ".join(f"{axis} {_short(value)}" for axis, value in info["point"].items())
        edge = (
            f" (at the end of its grid: {', '.join(info['at_edge'])})"
            if info.get("at_edge")
            else ""
        )
        how = f"made of {info['matches']}" if "matches" in info else f"{info['trials']} trials"
        cells = []
        for metric in known:
            seen = values(document, arm, metric.name)
            spread = metric.shown(float(np.std(seen, ddof=1))) if len(seen) > 1 else "?"
            cells.append(f"{metric.shown(float(np.mean(seen)))} ± {spread}")
        rows.append((arm, info["role"], point + edge, how, *cells))
    return ("arm", "role", "hyperparameters", "tuning", *(m.label for m in known)), rows


def _halving(document: Document) -> list[str]:
    """Who was chosen by successive halving, where there was any."""
    if not (rounds := document.get("halving")):
        return []
    conditions = list(dict.fromkeys(info["condition"] for info in document["arms"].values()))
    metric, settings = Metric(**document["tune_on"]), document["settings"]
    length = settings["steps"] // settings["evaluations"]
    lengths = ", ".join(
        f"{len(each['scores'])} for {each['evaluations'] * length} steps" for each in rounds
    )
    rows = [
        (name, *(metric.shown(number(score)) for score in scores), _fate(name, rounds))
        for name, scores in rounds[0]["scores"].items()
    ]
    return [
        f"Successive halving, each round on seeds of its own: {lengths}; {len(rounds[-1]['kept'])} were tuned and are "
        f"reported. Scores of the first round ({metric.label}):\n",
        *_table(("candidate", *conditions, "got to"), rows),
        "",
    ]


def _fate(name: str, rounds: list[dict[str, Any]]) -> str:
    if name in rounds[-1]["kept"]:
        return f"**the end, as number {rounds[-1]['kept'].index(name) + 1}**"
    return f"round {sum(name in each['scores'] for each in rounds)}"


def _bridged(document: Document) -> list[str]:
    """The runs that the torch bridge repeated beside JAX's, where there are any."""
    if not (runs := document.get("bridged")):
        return []
    arms = {name: document["arms"][name] for name in dict.fromkeys(run["arm"] for run in runs)}
    repeated = {(run["arm"], run["seed"]) for run in runs}
    same_runs = [run for run in document["runs"] if (run["arm"], run["seed"]) in repeated]
    jax = {**document, "arms": arms, "runs": same_runs}
    torch = {**jax, "runs": runs}
    known = metrics(document)
    differences = compare(
        [
            (values(torch, arm, name).tolist(), values(jax, arm, name).tolist())
            for arm, name in itertools.product(arms, known)
        ]
    )
    each = iter(differences)
    rows = []
    for arm in arms:
        ours, theirs = reported(torch, arm), reported(jax, arm)
        first = [
            abs(ours[seed]["curves"]["train_loss"][0] / theirs[seed]["curves"]["train_loss"][0] - 1)
            for seed in ours
        ]
        cells = [shown(next(each), metric) for metric in known.values()]
        rows.append((arm, str(len(ours)), *cells, f"{max(first):.1e}"))
    pairs = list(zip(conclude(torch), conclude(jax), strict=True))
    same = sum(a.verdict == b.verdict for a, b in pairs)
    apart = sum(each.p < ALPHA for each in differences)
    result = "the same result" if same == len(pairs) and not apart else "another result"
    return [
        f"\nThe same runs with every step by `TorchBridge`: {same} of {len(pairs)} verdicts are the same, and {apart} "
        f"of {len(differences)} paired differences, torch less JAX, are told from zero: **{result}**. Roundings "
        "differ, and grow as training goes on: the last column is from its beginning.\n",
        *_table(
            (
                "arm",
                "n",
                *(f"{metric.label}, torch - JAX" for metric in known.values()),
                "training loss until the first evaluation, relative",
            ),
            rows,
        ),
    ]


def _costs(document: Document) -> list[str]:
    """A table of what a step costs, where that was measured."""
    if not (costs := document.get("costs")):
        return []
    known = [name for name in COSTS if name in next(iter(costs.values()))]
    rows = [
        (arm, *(COSTS[name][1].format(COSTS[name][2] * cost[name]) for name in known))
        for arm, cost in costs.items()
    ]
    return [*_table(("arm", *(COSTS[name][0] for name in known)), rows), ""]


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, (int, float)) else "over time"


def _sentence(conclusion: Conclusion) -> str:
    claim, metric, gain, off, said = conclusion
    text = (
        f"- *{claim.text}* ({metric.label}, margin {metric.shown(metric.margin)}): {claim.arm} against tuned "
        f"{claim.baseline} {shown(gain, metric)}, p {gain.p:.2g}"
    )
    if off is not None:
        text += f"; against {claim.off} {shown(off, metric)}, p {off.p:.2g}"
    return f"{text}; n = {gain.n}. {SAID[said]}: **{said}**."
