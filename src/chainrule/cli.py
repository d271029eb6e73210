"""The `chainrule` command: `demo` trains with every chain, `show` prints what a chain is made of."""

import argparse
import inspect
import pathlib
import sys

import jax.numpy as jnp

import chainrule
from chainrule import chains


def links_table(name: str) -> str:
    """The table of links in the docstring of a chain, as it stands there."""
    doc = inspect.getdoc(getattr(chains, name)) or ""
    return "\n".join(line for line in doc.splitlines() if line.startswith("|"))


def show(name: str | None) -> str:
    """What `chainrule show [name]` prints."""
    if name is None:
        width = max(map(len, chains.__all__))
        lines = [
            (inspect.getdoc(getattr(chains, name)) or "").partition("\n")[0]
            for name in chains.__all__
        ]
        return "\n".join(
            f"{name:<{width}}  {line}" for name, line in zip(chains.__all__, lines, strict=True)
        )
    factory = getattr(chains, name)
    doc = inspect.getdoc(factory) or ""
    parameters = inspect.signature(factory).parameters
    required = [p.name for p in parameters.values() if p.default is inspect.Parameter.empty]
    # A chain that wraps another one is shown around the simplest there is.
    tx = factory(*(chains.adam() for _ in required))
    live = chainrule.hyperparams(tx.init({"w": jnp.zeros((2, 2))}))
    sections = [f"{name}: {doc.partition(chr(10))[0]}", links_table(name)]
    sections.append(
        "live hyperparameters\n"
        + "\n".join(f"  {key} = {float(value):g}" for key, value in live.items())
    )
    fixed = {
        p.name: p.default
        for p in parameters.values()
        if p.name not in live and p.name not in required
    }
    if fixed:
        sections.append(
            "fixed at construction\n"
            + "\n".join(f"  {key} = {value!r}" for key, value in fixed.items())
        )
    return "\n\n".join(section for section in sections if section)


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
        help="train a small network on digits with 30 %% wrong labels, with optax.adamw and every chain",
        description="Trains a small network on scikit-learn's digits, of which 30 %% are labelled "
        "wrong, with optax.adamw and every chain: same seeds, same batches, the learning rate of "
        "each chosen on a validation split. Prints a table and saves a figure.",
    )
    demo.add_argument(
        "--quick", action="store_true", help="3 learning rates, 2 seeds, 5 epochs: a smoke test"
    )
    demo.add_argument("--seeds", type=_count, help="runs of each chain (default 5)")
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
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns its exit status."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "show":
        sys.stdout.write(show(arguments.chain) + "\n")
        return 0
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"chainrule demo: needs {error.name}; install it with: pip install 'chainrule[demo]'\n"
        )
        return 1
    from chainrule import demo

    demo.main(
        quick=arguments.quick,
        seeds=arguments.seeds or (2 if arguments.quick else 5),
        epochs=arguments.epochs or (5 if arguments.quick else 40),
        out=arguments.out,
        json_path=arguments.json,
    )
    return 0
