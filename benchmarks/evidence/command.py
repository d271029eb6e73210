"""`chainrule evidence`: a progress bar around `runner`, and what it prints."""

import contextlib
import pathlib
import sys
from collections.abc import Generator, Sequence

from chainrule.evidence import experiments, report
from chainrule.evidence.conclusions import Document, conclude
from chainrule.evidence.runner import Run
from chainrule.evidence.statistics import SCENARIOS, error_rates


def main(
    names: Sequence[str],
    *,
    setting: str,
    seeds: int | None,
    arms: Sequence[str] | None,
    out: pathlib.Path,
    bridge: bool = False,
) -> int:
    """Runs experiments, or does what else `names` says; returns the exit status."""
    from rich.console import Console

    console = Console()
    known = experiments.names()
    if not names:
        for name in known:
            experiment = experiments.load(name)
            console.print(f"{name:<4} {experiment.title}", highlight=False)
        return 0
    if list(names) == ["error-rates"]:
        print_error_rates(console)
        return 0
    if list(names) != ["report"]:
        chosen = list(known) if list(names) == ["all"] else [name.upper() for name in names]
        if unknown := [name for name in chosen if name not in known]:
            sys.stderr.write(
                f"chainrule evidence: no experiment {unknown[0]!r}; there are {', '.join(known)}, and all, report, "
                "error-rates\n"
            )
            return 2
        for name in chosen:
            console.print(f"[bold]{name}[/]: {experiments.load(name).title}")
            try:
                document = run(console, name, setting, seeds, arms, out, bridge)
            except KeyboardInterrupt:
                console.print("interrupted; the same command goes on where this one ended")
                return 130
            print_conclusions(console, document)
    console.print(f"report: {report.write(out)}")
    return 0


def run(
    console,
    name: str,
    setting: str,
    seeds: int | None,
    arms: Sequence[str] | None,
    out: pathlib.Path,
    bridge: bool,
) -> Document:
    """One experiment behind a progress bar, which counts evaluations of blocks of runs."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<44}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task, total = bar.add_task(name, total=0), 0

        def progress(what: str, done: int, planned: int) -> None:
            nonlocal total
            total += planned
            bar.update(task, description=what, advance=done, total=total)

        experiment = experiments.load(name)
        runs = Run(experiment, setting, out, seeds=seeds, arms=arms, progress=progress)
        with built_quickly(setting == "quick"):
            document = runs()
            return runs.through_torch() if bridge else document


@contextlib.contextmanager
def built_quickly(quick: bool) -> Generator[None]:
    """A smoke test's programs run for less time than XLA needs to make them fast."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", quick or before)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def print_conclusions(console, document: Document) -> None:
    """A table of the claims of one experiment."""
    from rich.table import Table

    table = Table(title=f"{document['experiment']}, {document['setting']} setting")
    for heading in ("claim", "verdict", "over the tuned baseline", "over mechanism off", "n"):
        table.add_column(heading)
    for c in conclude(document):
        off = "" if c.over_off is None else report.shown(c.over_off, c.metric)
        over = report.shown(c.over_baseline, c.metric)
        text = f"{c.claim.text}\n[dim]{c.claim.arm}: {c.metric.label}[/]"
        table.add_row(text, c.verdict, over, off, str(c.over_baseline.n))
    console.print(table)


def print_error_rates(console, repeats: int = 2000) -> None:
    """How often simulated results get each verdict, at 5 and 10 seeds."""
    from rich.table import Table

    from chainrule.evidence.report import SAID

    table = Table(title=f"verdicts in {repeats} simulations of each truth")
    for heading in ("truth", "n", *SAID):
        table.add_column(heading)
    for truth, scenario in SCENARIOS.items():
        for n in (5, 10):
            rates = error_rates(scenario, n, repeats)
            table.add_row(truth, str(n), *(f"{rates.get(said, 0):.3f}" for said in SAID))
    console.print(table)
