"""`chainrule demo`: every named chain against optax.adamw, on digits of which 30 % are labelled wrong.

A small network is trained with each chain, from the same initial parameters, on the same wrong labels and the same
batches. The learning rate of each is the one of a log grid with the best mean accuracy on a validation split; what is
reported is the accuracy on a test split with clean labels. All learning rates and seeds of a chain train together, as
two `vmap` axes of one program that is compiled once.
"""

import inspect
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from chainrule import chains
from chainrule.transforms import TieredState, assign, retier, state_bytes

WRONG_LABELS = 0.3
WEIGHT_DECAY = 0.01
WIDTHS = (64, 128, 64, 10)
BATCH = 64
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
BASELINE = "optax.adamw"

Params = dict[str, dict[str, jax.Array]]
MakeChain = Callable[[Any], optax.GradientTransformation]


class Split(NamedTuple):
    """Images, (n, 64) float32 in [0, 1], and labels, (n,) int32."""

    images: jax.Array
    labels: jax.Array


class Data(NamedTuple):
    """The three splits, all with clean labels: the wrong ones are drawn from the seed of each run."""

    train: Split
    validation: Split
    test: Split


class Run(NamedTuple):
    """What one optimizer did."""

    name: str
    learning_rate: float
    at_edge: bool
    """Whether the best learning rate is the first or last of the grid, so that a better one may lie outside."""
    accuracy: np.ndarray
    """(seeds,): clean test accuracy after the last epoch, at that learning rate."""
    curve: np.ndarray
    """(epochs, seeds): the same after every epoch."""
    validation: np.ndarray
    """(learning rates,): mean validation accuracy after the last epoch."""
    seconds: float
    """Training all learning rates and seeds, without compilation."""
    compile_seconds: float
    state_bytes: int
    """Of one run."""


def load_digits() -> Data:
    """scikit-learn's 1797 handwritten digits, always split in the same way: 997 to train, 300, 500."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = jnp.asarray(images[order] / 16, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    return Data(
        *(
            Split(images[part], labels[part])
            for part in (slice(800, None), slice(300), slice(300, 800))
        )
    )


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


class Seeds(NamedTuple):
    """What a seed decides, drawn once for all chains; every leaf has a leading axis of seeds."""

    params: Params
    """The initial parameters."""
    labels: np.ndarray
    """(seeds, n): the training labels, 30 % of them wrong."""
    batches: np.ndarray
    """(seeds, epochs, steps, batch): rows of the training split."""


def draw_seeds(data: Data, seeds: int, epochs: int) -> Seeds:
    """Initial parameters, wrong labels and batches of the seeds 0, 1, ..."""

    def draw(seed: int) -> Seeds:
        random, n = np.random.default_rng(seed), len(data.train.labels)
        orders = np.stack([random.permutation(n)[: n // BATCH * BATCH] for _ in range(epochs)])
        return Seeds(
            init_params(random),
            wrong_labels(random, np.asarray(data.train.labels)),
            orders.reshape(epochs, -1, BATCH),
        )

    return jax.tree.map(lambda *leaves: np.stack(leaves), *map(draw, range(seeds)))


def init_params(random: np.random.Generator) -> Params:
    """He-normal weights and zero biases of a network with `WIDTHS`."""
    layers = {}
    names = [*(f"hidden_{i + 1}" for i in range(len(WIDTHS) - 2)), "output"]
    for name, fan_in, fan_out in zip(names, WIDTHS[:-1], WIDTHS[1:], strict=True):
        kernel = random.normal(0, np.sqrt(2 / fan_in), (fan_in, fan_out))
        layers[name] = {
            "kernel": kernel.astype(np.float32),
            "bias": np.zeros(fan_out, np.float32),
        }
    return layers


def wrong_labels(random: np.random.Generator, labels: np.ndarray) -> np.ndarray:
    """`labels` with 30 % of them replaced by another class, drawn uniformly."""
    others = (labels + random.integers(1, 10, labels.shape)) % 10
    return np.where(random.random(labels.shape) < WRONG_LABELS, others, labels)


def logits(params: Params, images: jax.Array) -> jax.Array:
    """The network's outputs, (n, 10)."""
    *hidden, output = params.values()
    for layer in hidden:
        images = jax.nn.relu(images @ layer["kernel"] + layer["bias"])
    return images @ output["kernel"] + output["bias"]


def accuracy(params: Params, split: Split) -> jax.Array:
    """The fraction of `split` that the network gets right."""
    return jnp.mean(jnp.argmax(logits(params, split.images), -1) == split.labels)


def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy."""
    outputs = logits(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def first_tiers(tx: optax.GradientTransformation, params: Params, batch: Split) -> Any:
    """The tier that a tiered chain gives each tensor at its first step, None for other chains.

    Tiers are static, so that runs which train together share them: the demo does not move tensors
    after the first step.
    """

    def tiered(state: Any) -> list[TieredState]:
        nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, TieredState))
        return [node for node in nodes if isinstance(node, TieredState)]

    if not tiered(jax.eval_shape(tx.init, params)):
        return None
    state = retier(tx.init(params), jax.grad(loss)(params, *batch), params)
    return tiered(state)[0].assignment.tiers


def train(
    name: str, make: MakeChain, data: Data, drawn: Seeds, rates: tuple[float, ...]
) -> Iterator[Run | None]:
    """Trains all learning rates and seeds at once; yields None after each epoch, then the `Run`."""
    first_params = jax.tree.map(lambda leaf: leaf[0], drawn.params)
    first_batch = Split(*(part[:BATCH] for part in data.train))
    tiers = first_tiers(make(rates[0]), first_params, first_batch)

    def init(rate: Any, params: Any) -> tuple[Any, Any]:
        state = make(rate).init(params)
        return params, state if tiers is None else assign(state, tiers, params)

    def run_epoch(rate: Any, carry: Any, labels: jax.Array, batches: jax.Array) -> tuple[Any, Any]:
        tx = optax.with_extra_args_support(make(rate))

        def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
            params, state = carry
            grads = jax.grad(loss)(params, data.train.images[rows], labels[rows])
            updates, state = tx.update(grads, state, params)
            return (jax.tree.map(jnp.add, params, updates), state), None

        carry, _ = jax.lax.scan(step, carry, batches)
        return carry, (accuracy(carry[0], data.validation), accuracy(carry[0], data.test))

    start = time.perf_counter()
    grid = jnp.asarray(rates)
    carry = jax.jit(jax.vmap(jax.vmap(init, (None, 0)), (0, None)))(grid, drawn.params)
    over_runs = jax.vmap(jax.vmap(run_epoch, (None, 0, 0, 0)), (0, 0, None, None))
    program = jax.jit(over_runs, donate_argnums=1)
    program = program.lower(grid, carry, drawn.labels, drawn.batches[:, 0]).compile()
    compile_seconds = time.perf_counter() - start

    start, history = time.perf_counter(), []
    for epoch in range(drawn.batches.shape[1]):
        carry, accuracies = program(grid, carry, drawn.labels, drawn.batches[:, epoch])
        history.append(np.asarray(accuracies))
        yield None
    seconds = time.perf_counter() - start

    validation, test = np.stack(history, 1)  # each (epochs, learning rates, seeds)
    final = validation[-1].mean(-1)
    best = int(np.argmax(final))
    one_state = jax.tree.map(lambda leaf: leaf[0, 0], carry[1])
    yield Run(
        name=name,
        learning_rate=rates[best],
        at_edge=best in (0, len(rates) - 1),
        accuracy=test[-1, best],
        curve=test[:, best],
        validation=final,
        seconds=seconds,
        compile_seconds=compile_seconds,
        state_bytes=state_bytes(one_state),
    )


def draw(runs: list[Run], path: pathlib.Path) -> None:
    """Saves one panel per chain: accuracy by epoch, mean and spread over seeds, with the baseline's mean in grey."""
    from matplotlib.figure import Figure

    columns = min(4, len(runs))
    rows = -(-len(runs) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    baseline = 100 * runs[0].curve.mean(1)
    epochs = np.arange(1, len(baseline) + 1)
    for axis, run in zip(axes, runs, strict=False):
        mean, spread = 100 * run.curve.mean(1), 100 * run.curve.std(1)
        axis.plot(epochs, baseline, color="0.55", linewidth=1.2, linestyle="--", label=BASELINE)
        axis.fill_between(
            epochs, mean - spread, mean + spread, color="tab:blue", alpha=0.2, linewidth=0
        )
        axis.plot(epochs, mean, color="tab:blue", linewidth=1.6)
        axis.set_title(f"{run.name}   {mean[-1]:.1f} %   lr {run.learning_rate:g}", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes[len(runs) :]:
        axis.remove()
    for axis in axes[max(0, len(runs) - columns) : len(runs)]:  # also those above a removed one
        axis.tick_params(labelbottom=True)
    late = [100 * run.curve[len(epochs) // 4 :].mean(1) for run in runs]
    lowest, highest = np.min(late), np.max(late)
    axes[0].set_ylim(5 * (lowest // 5), min(100, 5 * (highest // 5 + 1)))
    axes[0].legend(fontsize=8, loc="lower right")
    figure.supxlabel("epoch", fontsize=10)
    figure.supylabel("accuracy on clean test labels (%)", fontsize=10)
    figure.suptitle(
        f"digits, {WRONG_LABELS:.0%} of the training labels wrong: mean and standard deviation over "
        f"{runs[0].curve.shape[1]} seeds",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def report(runs: list[Run], rates: tuple[float, ...]) -> dict[str, Any]:
    """What `--json` saves."""
    return {
        "wrong_labels": WRONG_LABELS,
        "learning_rates": rates,
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "runs": [
            {
                key: value.tolist() if isinstance(value, np.ndarray) else value
                for key, value in run._asdict().items()
            }
            for run in runs
        ],
    }


def main(
    *, quick: bool, seeds: int, epochs: int, out: pathlib.Path, json_path: pathlib.Path | None
) -> None:
    """Trains everything behind a progress bar, prints the table, saves the figure."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    console = Console()
    data = load_digits()
    drawn = draw_seeds(data, seeds, epochs)
    rates = LEARNING_RATES[1:-1:2] if quick else LEARNING_RATES
    makers = candidates()
    columns = [
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
    ]
    runs: list[Run] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(makers) * epochs)
        for name, make in makers.items():
            progress.update(task, description=name)
            for run in train(name, make, data, drawn, rates):
                if run is None:
                    progress.advance(task)
                else:
                    runs.append(run)
        progress.update(task, description="done")

    table = Table(
        title=f"digits, {WRONG_LABELS:.0%} wrong labels, {len(rates)} learning rates x {seeds} seeds, {epochs} epochs",
        caption="± standard deviation over seeds; * at an edge of the grid",
    )
    table.add_column("chain", no_wrap=True)
    for heading in ("clean test accuracy", "learning rate", "seconds", "state vs AdamW"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.name,
            f"{100 * run.accuracy.mean():.1f} ± {100 * run.accuracy.std(ddof=1 if seeds > 1 else 0):.1f} %",
            f"{run.learning_rate:g}" + ("*" if run.at_edge else " "),
            f"{run.seconds:.1f}",
            f"{run.state_bytes / runs[0].state_bytes:.3f}x",
        )
    console.print(table)
    draw(runs, out)
    console.print(f"figure: {out}")
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(report(runs, rates), indent=1))
        console.print(f"numbers: {json_path}")
