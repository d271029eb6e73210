"""E6: COSMIC on a small language model that is tuned to other text, in torch: loss, memory and speed.

COSMIC keeps full state for some tensors, one number or none for the others, whose update is then a sign. Without the
mechanism every tensor's update is its sign. Chains run through `TorchBridge`, torch's optimizers as they come, each arm
in a fresh process.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from chainrule import chains
from chainrule.evidence import data
from chainrule.evidence.experiment import (
    Arm,
    Claim,
    Experiment,
    Metric,
    Point,
    Setting,
    log_grid,
    quick,
)
from chainrule.evidence.processes import ProcessTrainer, TorchTask
from chainrule.transforms import TierPolicy

DECAY = 0.01


def build(sizes: Mapping[str, Any]) -> TorchTask:
    """A decoder of characters, trained on the standard library's sources and tuned to Python's manual."""
    import torch

    from chainrule.evidence.torch_models import Decoder, cross_entropy

    places, batch = sizes["places"], sizes["batch"]
    manual, *held_out = data.manual()
    shown = [
        torch.from_numpy(data.windows(text, sizes["windows"], places + 1)).long()
        for text in held_out
    ]

    def model():
        torch.manual_seed(0)
        return Decoder(data.VOCABULARY, places, sizes["width"], sizes["depth"])

    def texts(text, seed, steps):
        starts = np.random.default_rng(seed).integers(len(text) - places, size=(steps, batch, 1))
        return torch.from_numpy(text[starts + np.arange(places + 1)]).long()

    def prepare(path):
        first = model()
        optimizer = torch.optim.AdamW(first.parameters(), 3e-3)
        for text in texts(data.standard_library()[0], 0, sizes["pretraining"]):
            optimizer.zero_grad()
            cross_entropy(first, text).backward()
            optimizer.step()
        torch.save(first.state_dict(), path)

    def start(seed, path):
        tuned = model()
        tuned.load_state_dict(torch.load(path))
        return tuned, texts(manual, seed, sizes["steps"])

    @torch.no_grad()
    def evaluate(tuned) -> dict[str, float]:
        validation, test = (cross_entropy(tuned, text).item() for text in shown)
        return {"validation": validation, "loss": test}

    return TorchTask(prepare, start, cross_entropy, evaluate, batch * places)


Make = Callable[[Point], Callable[[Any], Any]]


def torch_own(name: str, **settings: Any) -> Make:
    """An optimizer of torch."""

    def make(h: Point):
        import torch

        optimizer = getattr(torch.optim, name)
        rate = h["learning_rate"]
        return lambda model: optimizer(model.parameters(), lr=rate, weight_decay=DECAY, **settings)

    return make


def bridged(chain: Callable[[Point], optax.GradientTransformation]) -> Make:
    """A chain through the torch bridge."""

    def make(h: Point):
        from chainrule import TorchBridge

        return lambda model: TorchBridge(chain(h), model.named_parameters())

    return make


def sign(h):
    """Sign descent, without state."""
    return optax.chain(
        optax.scale_by_sign(),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(h["learning_rate"]),
    )


def cosmic(h):
    """COSMIC with its fractions, reassigning often enough for a short run."""
    policy = TierPolicy(reassignment_interval=25, min_tier_steps=25)
    return chains.cosmic(h["learning_rate"], weight_decay=DECAY, policy=policy)


def lion(h):
    """Lion."""
    return optax.lion(h["learning_rate"], weight_decay=DECAY)


def grid(middle: float) -> dict[str, tuple[float, ...]]:
    """Three rates about one."""
    return {"learning_rate": log_grid(middle / 10**0.5, middle * 10**0.5, 3)}


EXPERIMENT = Experiment(
    id="E6",
    title="COSMIC's state, speed and loss",
    source="the COSMIC repository: loss .1185 against Adam's .1258, 514 tokens/s against 441, .22 MB of state against "
    "625",
    data="a model of Python's standard library's sources, tuned to its manual (`pydoc_data`), a tenth held out",
    model="a transformer in torch, trained in torch; COSMIC, Lion and sign descent through `TorchBridge`",
    build=build,
    trainer=functools.partial(ProcessTrainer, "E6"),
    arms=[
        Arm("fused adamw", "baseline", torch_own("AdamW", fused=True), grid(1e-3)),
        Arm("adafactor", "control", torch_own("Adafactor"), grid(1e-2)),
        Arm("lion", "control", bridged(lion), grid(3e-4)),
        Arm("signsgd", "mechanism-off", bridged(sign), grid(3e-4)),
        Arm("cosmic", "claim", bridged(cosmic), grid(1e-3)),
    ],
    claims=[
        Claim("COSMIC's loss is lower than Adam's", "cosmic", "fused adamw", "loss", "signsgd"),
        Claim("COSMIC's state buys something", "cosmic", "signsgd", "loss"),
        Claim("COSMIC is better than Lion", "cosmic", "lion", "loss"),
        Claim("COSMIC is better than Adafactor", "cosmic", "adafactor", "loss"),
    ],
    metrics=[Metric("loss", "held-out loss", margin=0.01, better=-1)],
    tune_on=Metric("validation", "loss on the validation text", margin=0.0, better=-1),
    settings={
        "quick": quick(
            6,
            {"batch": 2, "places": 8, "width": 32, "depth": 1, "windows": 4, "pretraining": 2},
            block=1,
            arms=("signsgd", "cosmic"),
        ),
        "normal": Setting(
            steps=200,
            sizes={
                "batch": 8,
                "places": 64,
                "width": 96,
                "depth": 3,
                "windows": 32,
                "pretraining": 300,
            },
            block=1,
            evaluations=10,
            seeds=10,
            tuning_seeds=1,
        ),
        "full": Setting(
            steps=5000,
            sizes={
                "batch": 32,
                "places": 256,
                "width": 512,
                "depth": 8,
                "windows": 256,
                "pretraining": 20_000,
            },
            block=1,
            evaluations=50,
            seeds=5,
            tuning_seeds=1,
        ),
    },
)
