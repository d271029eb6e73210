"""`convert_state` with Keras on one side: ten steps there, ten here, beside twenty in the second alone."""

from typing import Any, ClassVar

import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
import torch

import bounds
import chainrule
from chainrule import convert_state
from hub_torch import RunInTorch

pytestmark = pytest.mark.keras

RATE, EPS, STEPS = 0.01, 1e-30, 10
SHAPES = {"b": (130, 129), "a": (128, 131)}  # optax factors from 128 on; not in the order of JAX


def arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {k: random.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


class InKeras:
    LIBRARY = "keras"
    MAKE: ClassVar[dict[str, Any]] = {
        "adam": lambda: keras.optimizers.Adam(RATE, epsilon=EPS),
        "adamw": lambda: keras.optimizers.AdamW(RATE, epsilon=EPS, weight_decay=0.1),
        "nadam": lambda: keras.optimizers.Nadam(RATE, epsilon=EPS),
        "adamax": lambda: keras.optimizers.Adamax(RATE, epsilon=EPS),
        "sgd": lambda: keras.optimizers.SGD(RATE, momentum=0.9),
        "rmsprop": lambda: keras.optimizers.RMSprop(RATE, epsilon=EPS, momentum=0.9),
        "lion": lambda: keras.optimizers.Lion(RATE),
        "adafactor": lambda: keras.optimizers.Adafactor(RATE),
        "muon": lambda: keras.optimizers.Muon(RATE, weight_decay=None, adam_weight_decay=None),
    }

    def __init__(self, name: str, params: dict[str, np.ndarray]):
        self.names = list(SHAPES)
        self.variables = [keras.Variable(params[n], name=n) for n in self.names]
        self.optimizer = self.MAKE[name]()
        self.optimizer.build(self.variables)

    def step(self, grads: dict[str, np.ndarray]) -> None:
        self.optimizer.apply(
            [keras.ops.convert_to_tensor(grads[n]) for n in self.names], self.variables
        )

    def values(self) -> dict[str, np.ndarray]:
        pairs = zip(self.names, self.variables, strict=True)
        return {n: np.array(keras.ops.convert_to_numpy(v)) for n, v in pairs}

    @property
    def state(self) -> Any:
        store: dict[str, Any] = {}
        self.optimizer.save_own_variables(store)
        return store

    @state.setter
    def state(self, new: Any) -> None:
        self.optimizer.load_own_variables(new)

    @property
    def like(self) -> Any:
        return self.optimizer


class InOptax:
    LIBRARY = "optax"
    MAKE: ClassVar[dict[str, Any]] = {
        "adam": lambda: optax.adam(RATE, eps=EPS),
        "adamw": lambda: optax.adamw(RATE, eps=EPS, weight_decay=0.1),
        "nadam": lambda: optax.nadam(RATE, eps=EPS),
        "adamax": lambda: optax.adamax(RATE, eps=EPS),
        "sgd": lambda: optax.sgd(RATE, momentum=0.9),
        "rmsprop": lambda: optax.rmsprop(RATE, 0.9, eps=EPS, momentum=0.9),
        "lion": lambda: optax.lion(RATE, weight_decay=0.0),
        "adafactor": lambda: optax.adafactor(RATE),
        "muon": lambda: chainrule.chains.muon(
            RATE, scale="rms", scale_factor=0.2, routing=lambda tree: dict.fromkeys(tree, "muon")
        ),
    }

    def __init__(self, name: str, params: dict[str, np.ndarray]):
        self.params: Any = {k: jnp.asarray(p) for k, p in params.items()}
        self.tx = self.MAKE[name]()
        self.state = self.tx.init(self.params)

    def step(self, grads: dict[str, np.ndarray]) -> None:
        given = {k: jnp.asarray(g) for k, g in grads.items()}
        updates, self.state = self.tx.update(given, self.state, self.params)
        self.params = optax.apply_updates(self.params, updates)

    def values(self) -> dict[str, np.ndarray]:
        return {k: np.asarray(p) for k, p in self.params.items()}

    @property
    def like(self) -> Any:
        return self.state


class InTorch(RunInTorch):
    LIBRARY = "torch"
    MAKE: ClassVar[dict[str, Any]] = {
        "adam": lambda p: torch.optim.Adam(p, RATE, eps=EPS),
        "adamw": lambda p: torch.optim.AdamW(p, RATE, eps=EPS, weight_decay=0.1),
        "nadam": lambda p: torch.optim.NAdam(p, RATE, eps=EPS, momentum_decay=1.0),
        "adamax": lambda p: torch.optim.Adamax(p, RATE, eps=EPS),
        "sgd": lambda p: torch.optim.SGD(p, RATE, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, RATE, alpha=0.9, eps=EPS, momentum=0.9),
        "adafactor": lambda p: torch.optim.Adafactor(p, RATE, eps=(EPS, 1e-3), weight_decay=0.0),
        "muon": lambda p: torch.optim.Muon(
            p, RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        ),
    }


CASES = [
    (name, pair)
    for other in (InOptax, InTorch)
    for name in InKeras.MAKE
    if name in other.MAKE
    for pair in ((InKeras, other), (other, InKeras))
]
OTHER_METHODS = {("nadam", "optax"), ("adafactor", "torch")}
"""What computes another update from the same state."""


@pytest.mark.parametrize(
    ("name", "kinds"), CASES, ids=[f"{name}-{a.LIBRARY}-{b.LIBRARY}" for name, (a, b) in CASES]
)
def test_a_run_goes_on(name: str, kinds: tuple[Any, Any]) -> None:
    start = arrays(0)
    first, alone = kinds[0](name, start), kinds[1](name, start)
    for step in range(STEPS):
        first.step(arrays(step + 1))
        alone.step(arrays(step + 1))
    differs = any((name, kind.LIBRARY) in OTHER_METHODS for kind in kinds)
    reached = (alone if differs else first).values()
    second = kinds[1](name, reached)
    second.state = convert_state(
        first.state,
        *(f"{kind.LIBRARY}.{name}" for kind in kinds),
        start,
        like=second.like,
        learning_rate=RATE,
        momentum=0.95,
        count=STEPS,
    )
    for step in range(STEPS, 2 * STEPS):
        second.step(arrays(step + 1))
        alone.step(arrays(step + 1))
    fresh = kinds[1](name, reached)
    for step in range(STEPS, 2 * STEPS):
        fresh.step(arrays(step + 1))
    for key, p in alone.values().items():
        moved = np.abs(p - start[key]).max()
        size = np.abs(p).max()
        bound = size * (bounds.stepped(2 * STEPS) + bounds.summed(131)) + bounds.of_adam(
            RATE, 2 * STEPS
        )
        if name == "muon" and InTorch in kinds:  # which iterates in bfloat16
            bound = bounds.RECORDED_BF16 * moved
        elif name == "muon":  # five Newton-Schulz steps on each of twenty, of matrices of norm one
            iteration = bounds.iterated(np.linspace(0.01, 1, 128), 5 * [(3.4445, -4.775, 2.0315)])
            bound += 2 * STEPS * RATE * 0.2 * 131**0.5 * iteration
        np.testing.assert_allclose(second.values()[key], p, rtol=0, atol=bound, err_msg=key)
        # Without the state the same ten steps end elsewhere.
        assert np.abs(fresh.values()[key] - p).max() > bound, key
