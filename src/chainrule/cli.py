"""The `chainrule` command: what there is, what it costs, what it does, and whether it works here."""

import functools
import importlib.util
import pathlib
import subprocess
import sys
from typing import Annotated, Any

import typer

import chainrule
from chainrule.expression import chain_of
from chainrule.models import MODELS

app = typer.Typer(
    name="chainrule",
    help="An algebra of gradient transformations: look, plan, export, convert, measure.",
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # lines of a paragraph are joined, then broken where the terminal ends
)
tables = typer.Typer(
    help="Measure speed on this machine.\n\nWhat follows the name goes to the script of the source "
    "tree, as in `chainrule bench jax --list gpt`. Without a name, lists the tables.",
)
app.add_typer(tables, name="bench", invoke_without_command=True)

BENCHES = {
    "jax": "jitted steps of each chain against optax.adamw",
    "muon": "Muon against optax.contrib.muon and torch.optim.Muon",
    "newton_schulz": "how near to orthonormal each preset comes, against steps and time",
    "torch": "TorchBridge against torch's own optimizers",
    "native": "the compiled kernel against XLA and torch's fused AdamW",
    "keras": "KerasBridge against Keras' own optimizers",
    "export": "exported files against the bridge",
    "wrap": "TorchWrap against the optimizer inside",
    "sharded": "TorchBridge on two ranks",
    "traffic": "bytes that compiled steps read and write, stage by stage",
    "lowbit": "quantized_state in TorchBridge against torch's fused AdamW",
    "import_time": "import chainrule against import optax",
}
"""The speed tables -> what each compares; `benchmarks/speed/` has a script for each."""

Json = Annotated[bool, typer.Option("--json", help="As JSON.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"chainrule {chainrule.__version__}")
        raise typer.Exit


@app.callback()
def chainrule_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Its version.")
    ] = False,
) -> None:
    del version  # its callback ends the program


def _known(name: str | None) -> str | None:
    from chainrule.catalogue import found

    if name is not None:
        try:
            found(name)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return name


def _names(incomplete: str) -> list[str]:
    from chainrule.catalogue import atoms

    known = dict.fromkeys([*chainrule.chains.__all__, *atoms()])
    return [name for name in known if name.startswith(incomplete)]


def _at_most_one(**given: bool) -> None:
    chosen = [f"--{name}" for name, there in given.items() if there]
    if len(chosen) > 1:
        raise typer.BadParameter(f"{' and '.join(chosen)} exclude each other; give one of them")


@app.command("list")
def list_command(json: Json = False) -> None:
    """Every chain and every atom, a line each."""
    from chainrule import showing

    typer.echo(showing.listed(as_json=json))


@app.command()
def show(
    name: Annotated[
        str | None,
        typer.Argument(
            callback=_known,
            autocompletion=_names,
            help="A chain or an atom; `transforms.orthograd` for the atom that has a chain's name.",
        ),
    ] = None,
    json: Json = False,
    svg: Annotated[
        bool, typer.Option("--svg", help="A picture of the links, drawn from the code.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Every chain's table of links.")
    ] = False,
) -> None:
    """All about a chain or an atom.

    Its links or equations, hyperparameters with defaults and ranges, bytes of state, source, and what its presets
    change. Without a name, lists the chains.
    """
    from chainrule import pictures, showing

    _at_most_one(json=json, svg=svg, markdown=markdown)
    if markdown:
        typer.echo(showing.markdown())
    elif name is None:
        typer.echo(showing.listed(as_json=True) if json else showing.chains_only())
    elif svg:
        typer.echo(pictures.svg(name).rstrip())
    else:
        typer.echo(showing.shown(name, as_json=json))


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="One rate, 2 seeds, 2 epochs: a smoke test.")
    ] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each chain (10).")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training split (40).")
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(help="The figure.")] = pathlib.Path("demo.png"),
    json: Annotated[
        pathlib.Path | None, typer.Option("--json", help="Also save every number there.")
    ] = None,
) -> None:
    """Watch mechanisms work, compare chains.

    Trains a small network on digits, of which 30 % are labelled wrong. First measures CASMO's AGAR, STAM's b1 and
    COSMIC's state while they train; then trains with optax.adamw and every chain, each with its rate tuned, on the same
    seeds and batches, and says which of them differ. Prints a table and saves a figure.
    """
    from chainrule import demo

    demo.main(
        quick=quick,
        seeds=seeds or (2 if quick else 10),
        epochs=epochs or (2 if quick else 40),
        out=out,
        json_path=json,
    )


@app.command()
def doctor() -> None:
    """What is installed and what is missing.

    Versions, what the kernel runs on, devices, whether a step works, and for each extra that is not installed the
    command that installs it. The exit status is 1 if a step does not work.
    """
    from chainrule import doctor

    text, works = doctor.report()
    typer.echo(text)
    raise typer.Exit(0 if works else 1)


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise typer.BadParameter(f"must be greater than 0, got {text}")
    return 1e9 * value


Rate = functools.partial(typer.Option, parser=_gigabytes, metavar="GB/s")


@app.command()
def plan(
    chain: Annotated[
        str,
        typer.Argument(help='Such as "chains.stam(learning_rate=3e-4)" or "optax.adamw(1e-3)".'),
    ],
    model: Annotated[
        str,
        typer.Argument(
            help=f"{', '.join(MODELS)}, or the path of a state dict (.safetensors, .pt)."
        ),
    ],
    mesh: Annotated[str | None, typer.Option(help="Such as fsdp=8 or dp=2,tp=4.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of parameters and gradients, such as bfloat16.")
    ] = None,
    bandwidth: Annotated[
        float | None, Rate(help="Rate of the memory, for the time of a step.")
    ] = None,
    network: Annotated[float | None, Rate(help="Rate at which a device sends, likewise.")] = None,
) -> None:
    """What a chain costs on a model.

    State by link, what a step moves and computes, and on a mesh its collectives. Nothing is allocated.
    """
    from rich.console import Console

    try:
        found = chainrule.plan(
            chain_of(chain), model, mesh=mesh, dtype=dtype, bandwidth=bandwidth, network=network
        )
    except (TypeError, ValueError) as error:
        raise _failed("plan", error) from None
    Console(file=sys.stdout).print(found)


@app.command()
def convert(
    checkpoint: Annotated[pathlib.Path, typer.Argument(help="File of torch.save or numpy.savez.")],
    from_: Annotated[str, typer.Option("--from", help="Form of the state, such as torch.adamw.")],
    to: Annotated[str, typer.Option(help="The form that is wanted, such as optax.adamw.")],
    params: Annotated[
        pathlib.Path, typer.Option(help="State dict of the model, in its own order.")
    ],
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help=".pt for torch, else .npz.")],
    key: Annotated[
        str | None, typer.Option(help="Where in the checkpoint the state is, such as optimizer.")
    ] = None,
    like: Annotated[
        pathlib.Path | None,
        typer.Option(help="State of the target, for what the state does not say."),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Where a state holds it or something times it.")
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="Of keras.muon.")] = None,
    count: Annotated[
        int | None, typer.Option(help="Steps made, where the state does not say it.")
    ] = None,
) -> None:
    """Move a run to another library.

    Writes the state of an optimizer in a file as that of another library's optimizer; see `chainrule.convert_state`.
    """
    _need("convert", "torch", "torch")
    from chainrule import convert_command

    status = convert_command.main(
        checkpoint=checkpoint,
        from_=from_,
        to=to,
        params=params,
        out=out,
        key=key,
        like=like,
        learning_rate=learning_rate,
        momentum=momentum,
        count=count,
    )
    raise typer.Exit(status)


@app.command()
def export(
    chain: Annotated[str, typer.Argument(help='Such as "chains.stam(learning_rate=3e-4)".')],
    out: Annotated[pathlib.Path, typer.Option("--out", "-o", help="The file.")],
    name: Annotated[
        str | None, typer.Option(help="Of the class; default the chain's, as in Stam.")
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="Of the parameters; may be given several times (float32)."),
    ] = None,
) -> None:
    """Write a chain as a file for torch alone.

    The file holds one torch.optim.Optimizer, for parameters of any shapes. A chain that no such file can hold is
    refused.
    """
    _need("export", "torch", "torch")
    from chainrule.bridges.export import export as write

    called = chain.partition("(")[0].rpartition(".")[2]
    name = name or "".join(word.capitalize() for word in called.split("_"))
    try:
        path = write(chain_of(chain), dtype or ["float32"], out, name)
    except (TypeError, ValueError, OSError) as error:
        raise _failed("export", error) from None
    typer.echo(f"wrote the class {name} to {path}")


@app.command()
def evidence(
    experiments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Such as E7, or all; report: write REPORT.md again; error-rates: how often the verdict errs."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Seconds: a smoke test.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Hours: for an accelerator.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Reported runs of each arm.")] = None,
    arms: Annotated[
        str | None,
        typer.Option(help="Only these arms and what they are made from, such as adam,muon."),
    ] = None,
    out: Annotated[pathlib.Path, typer.Option(help="Folder of the results.")] = pathlib.Path(
        "evidence-results"
    ),
    bridge: Annotated[
        bool,
        typer.Option(
            "--bridge", help="Repeat the reported runs with every step by TorchBridge, and compare."
        ),
    ] = False,
) -> None:
    """Test what each method claims.

    Tuned baselines, mechanisms switched off, paired seeds, a verdict. Writes results, figures and REPORT.md. An
    interrupted run goes on where it ended. Without a name, lists the experiments.
    """
    _at_most_one(quick=quick, full=full)
    _need("evidence", "evidence", "matplotlib", "mlxtend", "sklearn")
    if bridge:
        _need("evidence", "torch", "torch")
    from chainrule.evidence import command

    status = command.main(
        experiments or [],
        setting="quick" if quick else "full" if full else "normal",
        seeds=seeds,
        arms=[name.strip() for name in arms.split(",")] if arms else None,
        out=out,
        bridge=bridge,
    )
    raise typer.Exit(status)


@tables.callback()
def bench(context: typer.Context) -> None:
    from chainrule.showing import columns

    if context.invoked_subcommand is None:
        typer.echo(columns([[name, what] for name, what in BENCHES.items()]))


def _run_table(context: typer.Context) -> None:
    folder = pathlib.Path(chainrule.__file__).resolve().parents[2] / "benchmarks" / "speed"
    names = (f"{context.info_name}.py", f"{context.info_name}_step.py")
    script = next((folder / name for name in names if (folder / name).is_file()), None)
    if script is None:
        raise _failed(
            "bench",
            "the benchmarks are in the source tree, not in the wheel; clone the repository, then `pip install -e .` "
            "in it",
            status=1,
        )
    command = [sys.executable, str(script), *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


_TO_THE_SCRIPT: dict[str, Any] = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],
}
for _table, _what in BENCHES.items():
    tables.command(_table, help=_what, context_settings=_TO_THE_SCRIPT)(_run_table)


def _failed(command: str, reason: object, status: int = 2) -> typer.Exit:
    """Says in a line why `command` did nothing."""
    said = str(reason).removeprefix(
        f"{command}: "
    )  # a function of the command's name says it itself
    typer.echo(f"chainrule {command}: {said}", err=True)
    return typer.Exit(status)


def _need(command: str, extra: str, *modules: str) -> None:
    """Ends with the extra to install if one of `modules` is not there."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise _failed(
                command,
                f'needs {module}; install it with: pip install "chainrule[{extra}]"',
                status=1,
            )


_UsageError: Any = typer.BadParameter.__base__
"""Of click, or of the copy of click that newer Typers bring."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns its exit status. Errors are one line."""
    try:
        status = typer.main.get_command(app).main(
            argv, prog_name="chainrule", standalone_mode=False
        )
    except _UsageError as error:
        where = error.ctx.command_path if error.ctx else "chainrule"
        message = " ".join(error.format_message().split())
        typer.echo(f"{where}: {message.rstrip('.')}; see `{where} --help`", err=True)
        return 2
    except typer.Abort:
        return 130
    return int(status or 0)
