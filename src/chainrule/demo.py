"""`chainrule demo`: three mechanisms at work on digits, measured as they train; then every chain beside optax.adamw.

Without scikit-learn the digits are those of a font, and without matplotlib there is no figure: the rest needs neither.

Of the digits 30 % are labelled wrong. Every chain has its rate tuned on seeds and a split of its own; accuracies are of
rightly labelled digits that nothing else saw, paired by seed, and a chain differs from `optax.adamw` if Holm's interval
of the difference has no zero in it (`benchmarks/evidence`, whose harness this uses).
"""

import importlib.util
import inspect
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from chainrule import chains
from chainrule.demo_mechanisms import HANDWRITTEN, MECHANISMS, WRONG_LABELS, Panel, sizes
from chainrule.evidence import tasks
from chainrule.evidence.conclusions import Document, values
from chainrule.evidence.experiment import Arm, Experiment, Metric, Setting, log_grid
from chainrule.evidence.runner import Run
from chainrule.evidence.statistics import Comparison, compare
from chainrule.transforms import TieredState, assign, retier, state_bytes

WEIGHT_DECAY = 0.01
STEPS_PER_EPOCH = 15
"""997 digits in batches of 64."""
BASELINE = "optax.adamw"
MEND = r'install it with: pip install "chainrule\[demo]"'
"""The brackets are escaped for rich."""
RATES = log_grid(3e-4, 3e-2, 5)

MakeChain = Callable[[Any], optax.GradientTransformation]


class Row(NamedTuple):
    """What one chain did."""

    name: str
    learning_rate: float
    accuracy: np.ndarray
    """(seeds,)"""
    difference: Comparison | None
    """Over the baseline; `None` of itself."""
    seconds: float
    """Tuning and training, compilation included."""
    state_bytes: int
    """Of one run."""

    @property
    def differs(self) -> str:
        """Whether it differs from the baseline, and how."""
        if self.difference is None:
            return ""
        _, low, high = self.difference.corrected
        return "better" if low > 0 else "worse" if high < 0 else "no"


def candidates() -> dict[str, MakeChain]:
    """Everything to compare, as functions of a learning rate: the baseline and whatever `chains` names.

    A chain whose first argument has no default wraps another one, and is applied to the baseline.
    """

    def baseline(learning_rate: Any) -> optax.GradientTransformation:
        return optax.adamw(learning_rate, weight_decay=WEIGHT_DECAY)

    found: dict[str, MakeChain] = {BASELINE: baseline}
    for name in chains.__all__:
        factory = getattr(chains, name)
        parameters = inspect.signature(factory).parameters
        if next(iter(parameters.values())).default is inspect.Parameter.empty:
            found[f"{name}(adamw)"] = lambda lr, factory=factory: factory(baseline(lr))
        else:
            decay = {"weight_decay": WEIGHT_DECAY} if "weight_decay" in parameters else {}
            found[name] = lambda lr, factory=factory, decay=decay: factory(lr, **decay)
    return found


def in_first_tiers(make: MakeChain, task: Any) -> MakeChain:
    """A tiered chain that begins in the tiers of its first step and stays there; others as they are.

    Tiers are static, so that runs which train together share them.
    """
    params, drawn = task.draw(0)
    state = make(RATES[0]).init(params)

    def tiered(state: Any) -> list[TieredState]:
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TieredState))
        return [node for node in nodes if isinstance(node, TieredState)]

    if not tiered(state):
        return make
    grads = jax.grad(task.loss)(params, task.data, drawn, np.int32(0))
    tiers = tiered(retier(state, grads, params))[0].assignment.tiers

    def assigned(rate: Any) -> optax.GradientTransformation:
        tx = optax.with_extra_args_support(make(rate))
        return optax.GradientTransformationExtraArgs(
            lambda params: assign(tx.init(params), tiers, params), tx.update
        )

    return assigned


def experiment(makers: dict[str, MakeChain], setting: Setting) -> Experiment:
    """The comparison, for the harness of `chainrule evidence`."""
    grid = {"learning_rate": RATES}
    return Experiment(
        id="demo",
        title="every chain on digits with wrong labels",
        source="",
        data="digits",
        model="two hidden layers",
        build=tasks.noisy_digits,
        arms=[
            Arm(name, "control", lambda h, make=make: make(h["learning_rate"]), grid)
            for name, make in makers.items()
        ],
        claims=[],
        metrics=[Metric("accuracy", "accuracy", margin=0.0, percent=True)],
        tune_on=Metric("validation_accuracy", "validation accuracy", margin=0.0, percent=True),
        settings={"demo": setting},
    )


def rows_of(document: Document, makers: dict[str, MakeChain], params: Any) -> list[Row]:
    """The table, with all differences in one family for Holm's correction."""
    accuracy = {name: values(document, name, "accuracy") for name in makers}
    others = [name for name in makers if name != BASELINE]
    found = compare([(accuracy[name].tolist(), accuracy[BASELINE].tolist()) for name in others])
    difference = dict(zip(others, found, strict=True))
    return [
        Row(
            name,
            document["arms"][name]["point"]["learning_rate"],
            accuracy[name],
            difference.get(name),
            document["arms"][name]["seconds"],
            state_bytes(make(RATES[0]).init(params)),
        )
        for name, make in makers.items()
    ]


def draw(panels: Sequence[Panel], rows: Sequence[Row], path: pathlib.Path) -> None:
    """Saves the figure: the mechanisms over their runs, and the paired difference of each chain to the baseline."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * (len(panels) + 1), 4.2), layout="constrained")
    *axes, forest = figure.subplots(1, len(panels) + 1)
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel)
    compared = [row for row in rows if row.difference is not None]
    for place, row in enumerate(compared):
        assert row.difference is not None
        effect, low, high = (100 * value for value in row.difference.corrected)
        colour = "0.5" if row.differs == "no" else "tab:red"
        forest.plot([max(low, -99), min(high, 99)], [-place, -place], color=colour)
        forest.plot(effect, -place, "o", color=colour, markersize=4)
    forest.axvline(0, color="0.5", linewidth=0.8)
    forest.set_yticks([-place for place in range(len(compared))], [row.name for row in compared])
    forest.tick_params(labelsize=8)
    forest.set_title(f"accuracy over {BASELINE}, {len(rows[0].accuracy)} paired seeds", fontsize=10)
    forest.set_xlabel("percentage points, with Holm's interval", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _draw_panel(axis: Any, panel: Panel) -> None:
    second = axis.twinx()
    drawn = []
    for place, lines, style in ((axis, panel.lines, "-"), (second, panel.right, "--")):
        for name, line in lines.items():
            colour = f"C{len(drawn)}"
            mean, half = line.mean(1), line.std(1)
            (shown,) = place.plot(panel.steps, mean, style, color=colour, linewidth=1.4, label=name)
            place.fill_between(panel.steps, mean - half, mean + half, color=colour, alpha=0.12)
            drawn.append(shown)
    if panel.shift is not None:
        axis.axvline(panel.shift, color="0.5", linewidth=0.8)
    for place, label in zip((axis, second), panel.labels, strict=True):
        place.set_ylabel(label, fontsize=8)
        place.tick_params(labelsize=8)
    axis.set_xlabel("step", fontsize=8)
    axis.set_title(panel.title, fontsize=10)
    axis.legend(handles=drawn, fontsize=7)


def report(panels: Sequence[Panel], rows: Sequence[Row]) -> dict[str, Any]:
    """What `--json` saves."""
    return {
        "wrong_labels": WRONG_LABELS,
        "learning_rates": RATES,
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "mechanisms": [
            {"title": panel.title, "steps": panel.steps.tolist()}
            | {name: line.tolist() for name, line in {**panel.lines, **panel.right}.items()}
            for panel in panels
        ],
        "runs": [
            {
                "name": row.name,
                "learning_rate": row.learning_rate,
                "accuracy": row.accuracy.tolist(),
                "interval": row.difference and list(row.difference.corrected),
                "differs": row.differs,
                "seconds": row.seconds,
                "state_bytes": row.state_bytes,
            }
            for row in rows
        ],
    }


def main(
    *, quick: bool, seeds: int, epochs: int, out: pathlib.Path, json_path: pathlib.Path | None
) -> None:
    """Measures and trains behind a progress bar, prints the table, saves the figure."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console, steps = Console(), epochs * STEPS_PER_EPOCH
    has_figure = importlib.util.find_spec("matplotlib") is not None
    if not HANDWRITTEN:
        console.print(
            f"digits of a font, as scikit-learn has handwritten ones and is not there; {MEND}",
            highlight=False,
        )
    task = tasks.noisy_digits(sizes(steps, WRONG_LABELS))
    makers = {name: in_first_tiers(make, task) for name, make in candidates().items()}
    setting = Setting(
        steps,
        evaluations=1,
        seeds=seeds,
        tuning_seeds=1 if quick else 2,
        block=2 if quick else 10,
        extensions=0 if quick else 2,
        grid_points=1 if quick else None,
        sizes=sizes(steps, WRONG_LABELS),
    )
    panels: list[Panel] = []
    columns = (TextColumn("{task.description:<52}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress, tempfile.TemporaryDirectory() as folder:
        bar = progress.add_task("", total=len(MECHANISMS) + len(makers))
        for mechanism in MECHANISMS:
            for seen in mechanism(steps, min(seeds, 5), evaluations=10 if quick else 40):
                if isinstance(seen, Panel):
                    panels.append(seen)
                    progress.advance(bar)
                else:
                    progress.update(bar, description=seen)
        done = set()

        def advance(what: str, ended: int, planned: int) -> None:
            del ended, planned
            name = what.removeprefix("demo ").rpartition(":")[0]
            progress.update(bar, description=what, advance=name not in done)
            done.add(name)

        document = Run(
            experiment(makers, setting), "demo", pathlib.Path(folder), progress=advance
        )()
        progress.update(bar, description="done")
    rows = rows_of(document, makers, task.draw(0)[0])
    _print_table(console, rows, steps)
    if has_figure:
        draw(panels, rows, out)
    console.print(
        f"figure: {out}" if has_figure else f"no figure: needs matplotlib; {MEND}", highlight=False
    )
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report(panels, rows), indent=1))
        console.print(f"numbers: {json_path}")


def _print_table(console: Any, rows: Sequence[Row], steps: int) -> None:
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE,
        title=f"digits, {WRONG_LABELS:.0%} wrong labels, {steps} steps, {len(rows[0].accuracy)} seeds",
        caption="in percent, ± standard deviation over seeds; differences paired by seed, with Holm's interval",
    )
    table.add_column("chain", no_wrap=True)
    for heading in ("accuracy", "over optax.adamw", "differs?", "rate", "state"):
        table.add_column(heading, justify="right")
    for row in rows:
        spread = row.accuracy.std(ddof=1 if len(row.accuracy) > 1 else 0)
        over = ""
        if row.difference is not None:
            effect, low, high = (100 * value for value in row.difference.corrected)
            over = f"{effect:+.1f} [{low:+.1f}, {high:+.1f}]"
        table.add_row(
            row.name,
            f"{100 * row.accuracy.mean():.1f} ± {100 * spread:.1f}",
            over,
            row.differs,
            f"{row.learning_rate:.2g}",
            f"{row.state_bytes / rows[0].state_bytes:.3f}x",
        )
    console.print(table)
