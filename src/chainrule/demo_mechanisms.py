"""What `chainrule demo` shows of three mechanisms while they train on digits: generators that yield as they measure.

Each yields a line of text after every stretch of steps, and at last a `Panel`.
"""

import importlib.util
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import chainrule
from chainrule import chains, transforms
from chainrule.evidence import tasks
from chainrule.evidence.experiment import Arm, Setting, Task
from chainrule.evidence.probes import mean_metric
from chainrule.evidence.training import Trainer

WRONG_LABELS = 0.3
HANDWRITTEN = importlib.util.find_spec("sklearn") is not None
"""Whether scikit-learn's digits are there; else the demo draws its own."""
GROUP = 32
"""Examples of each group whose gradients AGAR compares."""


class Panel(NamedTuple):
    """One mechanism over a run."""

    title: str
    steps: np.ndarray
    lines: dict[str, np.ndarray]
    """(evaluations, runs) by name."""
    right: dict[str, np.ndarray]
    """The same on an axis of its own."""
    labels: tuple[str, str]
    """Of the two axes."""
    shift: int | None = None
    """The step at which the data change."""


def sizes(steps: int, wrong: float) -> dict[str, Any]:
    """What `tasks.noisy_digits` wants to know."""
    drawn = {} if HANDWRITTEN else {"drawn": True}
    return {"steps": steps, "batch": 64, "hidden": (128, 64), "wrong": wrong, **drawn}


def agar_of_labels(steps: int, seeds: int, evaluations: int) -> Iterator[str | Panel]:
    """AGAR of the gradients of rightly and of wrongly labelled examples, equally many, while CASMO trains on both."""
    task = tasks.noisy_digits(sizes(steps, WRONG_LABELS))
    tx = chains.casmo(3e-3, tau_init_steps=steps // 5)
    probe = transforms.agar_confidence(steps // 5, source="own")
    labels = np.asarray(task.data["labels"])

    def draw(seed: int) -> Any:
        params, drawn = task.draw(seed)
        random, train = np.random.default_rng(seed), np.unique(drawn["batches"])
        wrong = drawn["labels"][train] != labels[train]
        groups = [random.choice(train[which], (steps, GROUP)) for which in (~wrong, wrong)]
        return params, {**drawn, "groups": np.stack(groups, 1)}

    def start(params: Any) -> Any:
        return params, tx.init(params), jax.vmap(lambda _: probe.init(params))(jnp.arange(2))

    def stretch(carry: Any, drawn: Any, first: Any) -> tuple[Any, Any]:
        def step(carry: Any, index: Any) -> tuple[Any, Any]:
            params, state, probes = carry

            def of_group(rows: Any, state: Any) -> Any:
                batches = {**drawn, "batches": rows[None]}
                return probe.update(jax.grad(task.loss)(params, task.data, batches, 0), state)[1]

            probes = jax.vmap(of_group)(drawn["groups"][index], probes)
            grads = jax.grad(task.loss)(params, task.data, drawn, index)
            updates, state = tx.update(grads, state, params)
            seen = probes.agar, chainrule.metrics(state)["confidence"]
            return (optax.apply_updates(params, updates), state, probes), seen

        length = steps // evaluations
        carry, seen = jax.lax.scan(step, carry, first + jnp.arange(length))
        return carry, jax.tree.map(lambda x: x.mean(0), seen)

    params, drawn = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *map(draw, range(seeds)))
    carry, history = jax.jit(jax.vmap(start))(params), []
    program = jax.jit(jax.vmap(stretch, (0, 0, None)), donate_argnums=0)
    for first in range(0, steps, steps // evaluations):
        carry, seen = program(carry, drawn, first)
        history.append(jax.device_get(seen))
        right, wrong = history[-1][0].mean(0)
        yield f"CASMO: AGAR of right labels {right:.2f}, of wrong {wrong:.2f}"
    agar, confidence = map(np.stack, zip(*history, strict=True))
    yield Panel(
        "what CASMO measures of right and wrong labels",
        _ends(steps, evaluations),
        {"AGAR, right labels": agar[..., 0], "AGAR, wrong labels": agar[..., 1]},
        {"confidence of the step": confidence},
        ("share of the gradient that is signal", "confidence"),
    )


def b1_through_shift(steps: int, seeds: int, evaluations: int) -> Iterator[str | Panel]:
    """STAM's b1, and that of the signal "noise", while the classes are renamed half-way."""
    base = tasks.noisy_digits(sizes(steps, 0.0))

    def draw(seed: int) -> Any:
        params, drawn = base.draw(seed)
        names = np.stack([np.arange(10), np.random.default_rng(seed).permutation(10)])
        return params, {**drawn, "labels": names[:, drawn["labels"]].astype(np.int32)}

    def loss(params: Any, shared: Any, drawn: Any, step: Any) -> Any:
        return base.loss(
            params, shared, {**drawn, "labels": drawn["labels"][2 * step // steps]}, step
        )

    def noise(h: Any) -> optax.GradientTransformation:
        return transforms.chain(
            transforms.adaptive_beta1(0.98, signal="noise", adapt_strength=0.45),
            transforms.scale_by_adam(b1=None),
            optax.scale_by_learning_rate(h["learning_rate"]),
        )

    grid = {"learning_rate": (1e-3, 3e-3, 1e-2)}
    measure = mean_metric("b1")
    arms = {
        "STAM": Arm("stam", "claim", lambda h: chains.stam(h["learning_rate"]), grid, measure),
        'signal="noise"': Arm("noise", "claim", noise, grid, measure),
    }
    setting = Setting(steps, evaluations, seeds, 1, block=seeds)
    trainer = Trainer(Task(base.data, draw, loss, base.evaluate), setting)
    lines, losses = {}, {}
    for name, arm in arms.items():
        runs = [({"learning_rate": 3e-3}, seed) for seed in range(seeds)]
        (outcomes,) = trainer.train(arm, runs)
        lines[name] = np.stack([each.measured["b1"] for each in outcomes], 1)
        losses[f"loss, {name}"] = np.stack([each.curves["train_loss"] for each in outcomes], 1)
        before, after = (lines[name][evaluations // 2 + i].mean() for i in (-1, 0))
        yield f"{name}: b1 before the shift {before:.2f}, after {after:.2f}"
    title = "STAM's b1 when the classes are renamed"
    labels = ("b1, mean over tensors", "training loss")
    yield Panel(title, _ends(steps, evaluations), lines, losses, labels, shift=steps // 2)


def cosmic_budget(steps: int, seeds: int, evaluations: int) -> Iterator[str | Panel]:
    """COSMIC's bytes of state as its tensors move between tiers, and its loss beside AdamW's and sign descent's."""
    task = tasks.noisy_digits(sizes(steps, 0.0))
    rate, length = 1e-3, steps // evaluations
    policy = transforms.TierPolicy(
        {2: 0.2, 1: 0.3},
        warmup_fractions={2: 0.8, 1: 0.2},
        warmup_steps=steps // 4,
        reassignment_interval=steps // 20,
        min_tier_steps=steps // 20,
        confirmations=1,
    )
    optimizers = {
        "AdamW": optax.adamw(3e-3),
        "sign descent": optax.chain(optax.scale_by_sign(), optax.scale(-rate)),
        "COSMIC": chains.cosmic(rate, policy=policy),
    }
    losses: dict[str, list[Any]] = {name: [] for name in optimizers}
    bytes_held: list[list[float]] = []
    gradient = jax.jit(jax.value_and_grad(task.loss))
    for name, tx in optimizers.items():

        @jax.jit
        def update(params: Any, state: Any, grads: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for seed in range(seeds):
            params, drawn = task.draw(seed)
            params = jax.tree.map(jnp.asarray, params)
            state, seen, held = tx.init(params), [], []
            for step in range(steps):
                loss, grads = gradient(params, task.data, drawn, np.int32(step))
                state = chainrule.retier(state, grads, params)
                params, state = update(params, state, grads)
                seen.append(float(loss))
                held.append(transforms.state_bytes(state))
                if name == "COSMIC" and (step + 1) % length == 0:
                    yield f"COSMIC: {held[-1] / 1024:.1f} KiB of state, loss {seen[-1]:.3f}"
            losses[name].append(np.reshape(seen, (evaluations, length)).mean(1))
            if name == "COSMIC":
                bytes_held.append(np.reshape(held, (evaluations, length)).mean(1) / 1024)
    yield Panel(
        "COSMIC's state as tensors move, and its loss",
        _ends(steps, evaluations),
        {name: np.stack(each, 1) for name, each in losses.items()},
        {"COSMIC's state": np.stack(bytes_held, 1)},
        ("training loss", "KiB of state"),
    )


def _ends(steps: int, evaluations: int) -> np.ndarray:
    return np.linspace(0, steps, evaluations + 1)[1:]


MECHANISMS = (agar_of_labels, b1_through_shift, cosmic_budget)
