"""Ten thousand steps need no more memory than a thousand."""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from chainrule import TorchBridge, chains
from chainrule.native import _kernel

WARM, STEPS = 1_000, 10_000
# The smallest tensor is of 4 KiB, so that one kept by every step is 40 MiB, and one by every tenth 4 MiB. The heap of
# a process at rest moves by some hundred KiB.
SHAPES = {"w": (64, 32), "b": (1024,)}
GROWTH = 2 * 2**20
# Objects that the collector sees: one kept by every hundredth step. Caches fill up while the steps warm up.
OBJECTS = STEPS // 100

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc"),
]


def resident() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x]
    return int(line.split()[1]) * 1024


def in_jax() -> Callable[[], None]:
    tx = chains.magma(chains.stam(0.01))
    params: Any = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    run = [params, tx.init(params)]

    @jax.jit
    def update(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    def step() -> None:
        run[:] = update(*run)

    return step


def in_torch(compile: bool = False) -> Callable[[], None]:
    params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
    bridge = TorchBridge(chains.magma(chains.stam(0.01)), params.items(), compile=compile)

    def step() -> None:
        for p in params.values():
            p.grad = torch.sin(p.detach())
        bridge.step(lambda: 1.0)
        bridge.zero_grad()

    return step


def in_torch_compiled() -> Callable[[], None]:
    return in_torch(compile=True)


def in_the_kernel() -> Callable[[], None]:
    shapes = SHAPES.values()
    p, mu, nu = ([np.ones(shape, np.float32) for shape in shapes] for _ in range(3))
    codes = [np.zeros(np.prod(shape), np.uint8) for shape in shapes]
    scales = [np.zeros(np.prod(shape) // 64, np.float32) for shape in shapes]

    def step() -> None:
        grads = [np.sin(x) for x in p]
        numbers = {"learning_rate": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-8}
        _kernel.tier2(p, grads, mu, nu, **numbers)
        _kernel.quantize(mu, codes, scales, block=64, bits=8)
        _kernel.statistics(grads)

    return step


@pytest.mark.parametrize("make", [in_jax, in_torch, in_torch_compiled, in_the_kernel])
def test_ten_thousand_steps_leave_nothing_behind(make: Callable[[], Callable[[], None]]) -> None:
    step = make()

    def measured() -> tuple[int, int, int]:
        gc.collect()
        objects = gc.get_objects()
        tensors = sum(issubclass(type(x), torch.Tensor) for x in objects) + len(jax.live_arrays())
        return resident(), tensors, len(objects)

    for _ in range(WARM):
        step()
    before = measured()
    for _ in range(STEPS):
        step()
    bytes_more, tensors_more, objects_more = np.subtract(measured(), before)
    assert tensors_more == 0
    assert objects_more < OBJECTS
    assert bytes_more < GROWTH


def test_the_measure_sees_a_tensor_in_a_hundred_steps() -> None:
    kept = []
    before = len(gc.get_objects())
    for i in range(STEPS):
        if i % 100 == 0:
            kept.append([torch.ones(1024)])
    gc.collect()
    assert len(gc.get_objects()) - before >= OBJECTS
