"""The `chainrule` command: `demo` trains with every chain, `show` prints their links, `plan` what one costs on a model,
`convert` moves states between libraries, `export` writes a chain as a file of torch code, `evidence` tests claims."""

import argparse
import importlib.util
import inspect
import pathlib
import sys
from typing import Any

import jax.numpy as jnp

import chainrule
from chainrule import chains
from chainrule.expression import chain_of
from chainrule.models import MODELS


def _doc(name: str) -> tuple[str, list[list[str]]]:
    """The first sentence of a chain's documentation, and the cells of its table of links."""
    doc = inspect.getdoc(getattr(chains, name)) or ""
    summary, lines = " ".join(doc.partition("\n\n")[0].split()), doc.splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if line.startswith("|") and set(line) - set("|-")
    ]
    return summary, rows


def _columns(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  "
        + "   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def show_all() -> str:
    """Every chain and the first sentence of its documentation."""
    return _columns([[name, _doc(name)[0]] for name in chains.__all__])


def show_markdown() -> str:
    """Every chain's table of links, as the README has it."""
    sections = []
    for name in chains.__all__:
        summary, (head, *rows) = _doc(name)
        table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
        sections.append(f"**`{name}`** {summary}\n\n{table}")
    return "\n\n".join(sections)


def _presets(factory: Any, defaults: dict[str, str]) -> list[list[str]]:
    """What each preset of a chain changes."""
    rows: list[list[str]] = []
    for preset, arguments in getattr(factory, "presets", {}).items():
        changed = [
            [
                a,
                v if isinstance(v, str) and v.startswith("`") else repr(v),
                f"in place of {defaults[a]}",
            ]
            for a, v in arguments.items()
        ]
        for i, row in enumerate(changed or [["nothing", "", ""]]):
            rows.append([preset if i == 0 else "", *row])
    return rows


def show(name: str) -> str:
    """One chain: its links, its live hyperparameters and other arguments with defaults, and what its presets change."""
    summary, rows = _doc(name)
    factory = getattr(chains, name)
    parameters = inspect.signature(factory).parameters.values()
    wrapped = [p.name for p in parameters if p.default is inspect.Parameter.empty]
    # A chain that wraps another one is built around the simplest there is.
    tx = factory(*(chains.adam() for _ in wrapped))
    state = tx.init({"w": jnp.zeros((2, 2))})
    live = chainrule.hyperparams(state._replace(inner_state=()))
    known = {p.name: repr(p.default) for p in parameters if p.name not in (*wrapped, "preset")}
    defaults = [[argument, default] for argument, default in known.items()]
    sections = [
        ("links", rows[1:]),
        ("wraps", [[argument] for argument in wrapped]),
        ("live hyperparameters", [row for row in defaults if row[0] in live]),
        ("other arguments", [row for row in defaults if row[0] not in live]),
        ("presets", _presets(factory, known)),
    ]
    shown = [f"{title}\n{_columns(rows)}" for title, rows in sections if rows]
    return "\n\n".join([f"{name}: {summary}", *shown])


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chainrule", description=__doc__)
    parser.add_argument("--version", action="version", version=f"chainrule {chainrule.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="watch three mechanisms at work on digits, then see which chain differs from optax.adamw",
        description="Trains a small network on scikit-learn's digits, of which 30 %% are labelled "
        "wrong. First measures CASMO's AGAR, STAM's b1 and COSMIC's state while they train; then "
        "trains with optax.adamw and every chain, each with its rate tuned, on the same seeds and "
        "batches, and says which of them differ. Prints a table and saves a figure.",
    )
    demo.add_argument(
        "--quick", action="store_true", help="1 learning rate, 2 seeds, 2 epochs: a smoke test"
    )
    demo.add_argument("--seeds", type=_count, help="runs of each chain (default 10)")
    demo.add_argument("--epochs", type=_count, help="passes over the training split (default 40)")
    demo.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("demo.png"),
        help="figure (default demo.png)",
    )
    demo.add_argument("--json", type=pathlib.Path, help="also save every number there")

    show_parser = commands.add_parser(
        "show",
        help="list the chains, or print one chain's links and hyperparameters",
        description="Without a name, lists the chains; with one, prints its links and its hyperparameters.",
    )
    show_parser.add_argument("chain", nargs="?", choices=chains.__all__, metavar="chain")
    show_parser.add_argument(
        "--markdown", action="store_true", help="every chain's table of links, for the README"
    )
    _add_plan(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_evidence(commands)
    return parser


def _add_plan(commands: Any) -> None:
    planned = commands.add_parser(
        "plan",
        help="what a chain costs on a model: state by link, memory traffic, collectives",
        description="Prints what a chain will cost on a model before anything is allocated: the state by link and "
        "field, what a step moves and computes, and on a mesh its collectives.",
    )
    planned.add_argument(
        "chain", help='such as "chains.stam(learning_rate=3e-4)" or "optax.adamw(1e-3)"'
    )
    planned.add_argument(
        "model", help=f"{', '.join(MODELS)}, or the path of a state dict (.safetensors, .pt)"
    )
    planned.add_argument("--mesh", help="such as fsdp=8 or dp=2,tp=4")
    planned.add_argument("--dtype", help="of parameters and gradients, such as bfloat16")
    planned.add_argument(
        "--bandwidth", type=_gigabytes, metavar="GB/s", help="of memory, for the time of a step"
    )
    planned.add_argument(
        "--network", type=_gigabytes, metavar="GB/s", help="that a device sends, likewise"
    )


def _gigabytes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {value}")
    return 1e9 * value


def _plan(arguments: argparse.Namespace) -> int:
    try:
        found = chainrule.plan(
            chain_of(arguments.chain),
            arguments.model,
            mesh=arguments.mesh,
            dtype=arguments.dtype,
            bandwidth=arguments.bandwidth,
            network=arguments.network,
        )
    except (TypeError, ValueError) as error:
        sys.stderr.write(f"chainrule plan: {error}\n")
        return 2
    if importlib.util.find_spec("rich") is None:
        sys.stdout.write(f"{found}\n")
    else:
        from rich.console import Console

        Console(file=sys.stdout).print(found)
    return 0


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert the state of an optimizer between torch, optax and Keras",
        description="Writes the state of an optimizer in a file as that of another library's optimizer. Forms: "
        "`torch.adamw`, `optax.adamw`, `keras.sgd`, ...; see `chainrule.convert_state`.",
    )
    convert.add_argument("checkpoint", type=pathlib.Path, help="file of torch.save or numpy.savez")
    convert.add_argument("--from", dest="from_", required=True, metavar="form", help="of the state")
    convert.add_argument("--to", required=True, metavar="form", help="the form that is wanted")
    convert.add_argument(
        "--params", type=pathlib.Path, required=True, help="state dict of the model, in its order"
    )
    convert.add_argument(
        "-o", "--out", type=pathlib.Path, required=True, help=".pt for torch, else .npz"
    )
    convert.add_argument("--key", help="where in the checkpoint the state is, such as optimizer")
    convert.add_argument(
        "--like", type=pathlib.Path, help="state of the target, for what the state does not say"
    )
    convert.add_argument(
        "--learning-rate", type=float, help="where a state holds it or something times it"
    )
    convert.add_argument("--momentum", type=float, help="of keras.muon")
    convert.add_argument("--count", type=int, help="steps made, where the state does not say it")


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="write a chain as a Python file with a torch optimizer that needs torch alone",
        description="Writes a chain as a self-contained Python file with one torch.optim.Optimizer, for parameters of "
        "any shapes; a chain that no such file can hold is refused.",
    )
    export.add_argument("chain", help='such as "chains.stam(learning_rate=3e-4)"')
    export.add_argument("-o", "--out", type=pathlib.Path, required=True, help="the file")
    export.add_argument("--name", help="of the class (default: the chain's, as in Stam)")
    export.add_argument(
        "--dtype",
        action="append",
        help="of the parameters; may be given several times (default float32)",
    )


def _export(arguments: argparse.Namespace) -> int:
    if _missing("torch", "torch"):
        return 1
    from chainrule.bridges.export import export

    called = arguments.chain.partition("(")[0].rpartition(".")[2]
    name = arguments.name or "".join(word.capitalize() for word in called.split("_"))
    try:
        chain = chain_of(arguments.chain)
        path = export(chain, arguments.dtype or ["float32"], arguments.out, name)
    except (TypeError, ValueError, OSError) as error:
        sys.stderr.write(f"chainrule export: {error}\n")
        return 2
    sys.stdout.write(f"wrote the class {name} to {path}\n")
    return 0


def _add_evidence(commands: Any) -> None:
    evidence = commands.add_parser(
        "evidence",
        help="test what each method claims: tuned baselines, mechanisms switched off, paired seeds, a verdict",
        description="Runs experiments and writes their results, figures and REPORT.md. An interrupted run goes on "
        "where it ended. Without a name, lists the experiments.",
    )
    evidence.add_argument(
        "names",
        nargs="*",
        metavar="experiment",
        help="such as E7, or all; report: write REPORT.md again; error-rates: how often the verdict errs",
    )
    size = evidence.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_const", const="quick", dest="setting", help="seconds: a smoke test"
    )
    size.add_argument(
        "--full",
        action="store_const",
        const="full",
        dest="setting",
        help="hours: for an accelerator",
    )
    evidence.add_argument("--seeds", type=_count, help="reported runs of each arm")
    evidence.add_argument(
        "--arms",
        type=lambda text: [name.strip() for name in text.split(",")],
        help="only these arms and what they are made from, such as adam,muon",
    )
    evidence.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("evidence-results"),
        help="folder of the results (default evidence-results)",
    )
    evidence.add_argument(
        "--bridge",
        action="store_true",
        help="repeat the reported runs with every step by TorchBridge, and compare",
    )
    evidence.set_defaults(setting="normal")


def _missing(command: str, *modules: str) -> bool:
    """Says which extra to install if one of `modules` is not there."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            sys.stderr.write(
                f"chainrule {command}: needs {module}; install it with: pip install 'chainrule[{command}]'\n"
            )
            return True
    return False


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns its exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "show":
        if arguments.chain is not None:
            shown = show(arguments.chain)
        else:
            shown = show_markdown() if arguments.markdown else show_all()
        sys.stdout.write(shown + "\n")
        return 0
    if arguments.command == "plan":
        return _plan(arguments)
    if arguments.command == "export":
        return _export(arguments)
    if arguments.command == "evidence":
        if _missing(
            "evidence", "equinox", "matplotlib", "mlxtend", "rich", "sklearn", "statsmodels"
        ):
            return 1
        if arguments.bridge and _missing("torch", "torch"):
            return 1
        from chainrule.evidence import command

        return command.main(
            arguments.names,
            setting=arguments.setting,
            seeds=arguments.seeds,
            arms=arguments.arms,
            out=arguments.out,
            bridge=arguments.bridge,
        )
    if arguments.command == "convert":
        from chainrule import convert_command

        given = vars(arguments)
        del given["command"]
        return convert_command.main(**given)
    if _missing("demo", "equinox", "matplotlib", "rich", "scipy", "sklearn", "statsmodels"):
        return 1
    from chainrule import demo

    demo.main(
        quick=arguments.quick,
        seeds=arguments.seeds or (2 if arguments.quick else 10),
        epochs=arguments.epochs or (2 if arguments.quick else 40),
        out=arguments.out,
        json_path=arguments.json,
    )
    return 0
