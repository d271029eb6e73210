"""The `chainrule` command: `list` and `show` say what there is, `demo` trains with every chain, `plan` says what one
costs on a model, `export` writes it as a file of torch code, `convert` moves states between libraries, `evidence` tests
claims, `bench` measures speed, `doctor` says what is installed."""

import argparse
import importlib.util
import pathlib
import subprocess
import sys
from typing import Any, NoReturn

import chainrule
from chainrule.expression import chain_of
from chainrule.models import MODELS


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def _named(text: str) -> str:
    from chainrule.catalogue import found

    try:
        found(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    whole = _Parser(prog="chainrule", description=__doc__)
    whole.add_argument("--version", action="version", version=f"chainrule {chainrule.__version__}")
    commands = whole.add_subparsers(dest="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="watch three mechanisms at work on digits, then see which chain differs from optax.adamw",
        description="Trains a small network on digits, of which 30 %% are labelled "
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

    _add_show(commands)
    _add_plan(commands)
    _add_convert(commands)
    _add_export(commands)
    _add_evidence(commands)
    _add_bench(commands)
    commands.add_parser(
        "doctor",
        help="versions, kernel, devices, and the command that mends what is missing",
        description="Prints versions, what the compiled kernel runs on, devices, whether a step works, and for each "
        "extra that is not installed the command that installs it. Exit status 1 if a step does not work.",
    )
    return whole


def _add_show(commands: Any) -> None:
    listing = commands.add_parser(
        "list",
        help="chains and atoms, one line each",
        description="Lists every chain and every atom with the first sentence of its documentation.",
    )
    listing.add_argument("--json", action="store_true", help="name, kind and summary as JSON")
    show_parser = commands.add_parser(
        "show",
        help="a chain's or an atom's links, equations, hyperparameters, state, source and presets",
        description="Without a name, lists the chains. With one, prints links or equations, hyperparameters with "
        "defaults and ranges, bytes of state, source, and what its presets change.",
    )
    show_parser.add_argument(
        "name",
        nargs="?",
        type=_named,
        metavar="NAME",
        help="a chain or an atom; transforms.orthograd for the atom that has a chain's name",
    )
    form = show_parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="the same, and what each argument means")
    form.add_argument(
        "--svg", action="store_true", help="a picture of the links, drawn from the code"
    )
    form.add_argument("--markdown", action="store_true", help="every chain's table of links")


def _show(arguments: argparse.Namespace) -> str:
    from chainrule import pictures, showing

    if arguments.markdown:
        return showing.markdown()
    if arguments.name is None:
        return showing.listed(as_json=True) if arguments.json else showing.chains_only()
    if arguments.svg:
        return pictures.svg(arguments.name).rstrip()
    return showing.shown(arguments.name, as_json=arguments.json)


BENCHES = {
    "jax": "jitted steps of each chain against optax.adamw",
    "muon": "Muon against optax.contrib.muon and torch.optim.Muon",
    "torch": "TorchBridge against torch's own optimizers",
    "native": "the compiled kernel against XLA and torch's fused AdamW",
    "keras": "KerasBridge against Keras' own optimizers",
    "export": "exported files against the bridge",
    "wrap": "TorchWrap against the optimizer inside",
    "sharded": "TorchBridge on two ranks",
}
"""The speed tables -> what each compares; `benchmarks/speed/` has a script for each."""


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench",
        help="the speed tables, measured on this machine",
        description="Runs a speed benchmark of the source tree; arguments after the name are the script's own, such "
        "as `chainrule bench jax --list gpt`. Without a name, lists the tables.",
    )
    bench.add_argument("table", nargs="?", choices=list(BENCHES), help="which table")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="arguments of the script")


def _bench(arguments: argparse.Namespace) -> int:
    if arguments.table is None:
        from chainrule.showing import columns

        sys.stdout.write(columns([[name, what] for name, what in BENCHES.items()]) + "\n")
        return 0
    folder = pathlib.Path(chainrule.__file__).resolve().parents[2] / "benchmarks" / "speed"
    names = {"native": "native.py"}
    script = folder / names.get(arguments.table, f"{arguments.table}_step.py")
    if not script.is_file():
        sys.stderr.write(
            "chainrule bench: the benchmarks are in the source tree, not in the wheel; clone the repository, then "
            "`pip install -e .` in it\n"
        )
        return 1
    return subprocess.run([sys.executable, str(script), *arguments.rest], check=False).returncode


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
    if _missing("export", "torch", "torch"):
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


def _missing(command: str, extra: str, *modules: str) -> bool:
    """Says which extra to install if one of `modules` is not there."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            sys.stderr.write(
                f'chainrule {command}: needs {module}; install it with: pip install "chainrule[{extra}]"\n'
            )
            return True
    return False


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns its exit status."""
    arguments = parser().parse_args(argv)
    if arguments.command in ("list", "show"):
        from chainrule import showing

        listing = arguments.command == "list"
        shown = showing.listed(as_json=arguments.json) if listing else _show(arguments)
        sys.stdout.write(shown + "\n")
        return 0
    if arguments.command == "doctor":
        from chainrule import doctor

        text, works = doctor.report()
        sys.stdout.write(text + "\n")
        return 0 if works else 1
    if arguments.command == "bench":
        return _bench(arguments)
    if arguments.command == "plan":
        return _plan(arguments)
    if arguments.command == "export":
        return _export(arguments)
    if arguments.command == "evidence":
        if _missing("evidence", "evidence", "matplotlib", "mlxtend", "sklearn"):
            return 1
        if arguments.bridge and _missing("evidence", "torch", "torch"):
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
        if _missing("convert", "torch", "torch"):
            return 1
        from chainrule import convert_command

        given = vars(arguments)
        del given["command"]
        return convert_command.main(**given)
    from chainrule import demo

    demo.main(
        quick=arguments.quick,
        seeds=arguments.seeds or (2 if arguments.quick else 10),
        epochs=arguments.epochs or (2 if arguments.quick else 40),
        out=arguments.out,
        json_path=arguments.json,
    )
    return 0
