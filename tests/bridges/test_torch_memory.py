"""What a step needs beyond parameters, gradients and state."""

import sys
import weakref
from pathlib import Path

import optax
import pytest
import torch

from chainrule import TorchBridge, chains
from chainrule.native import _kernel

# Of 36 MiB: memory of up to 32 MiB the C library may have kept from before, and a temporary there would not be seen.
SHAPES = 3 * [(3072, 3072), (3072,)]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc"),
]


def resident(field: str) -> int:
    """`VmRSS` or `VmHWM` (the peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {field}")


def peak_of_a_step(optimizer: torch.optim.Optimizer) -> int:
    optimizer.step()
    optimizer.step()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    optimizer.step()
    return resident("VmHWM") - before


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in SHAPES:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = torch.randn(shape, generator=generator)
        params.append(p)
    return params


CHAINS = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "stam": lambda: chains.stam(1e-3),
    "casmo": lambda: chains.casmo(1e-3),
    "magma": lambda: chains.magma(optax.adamw(1e-3)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_compiled_step_needs_five_percent_of_the_parameters(name: str) -> None:
    params = parameters()
    size = sum(p.nbytes for p in params)
    assert peak_of_a_step(TorchBridge(CHAINS[name](), params, compile=True)) <= 0.05 * size


@pytest.mark.skipif(_kernel is None, reason="needs the compiled kernel")
@pytest.mark.parametrize("name", ["optax.adamw", "stam"])
def test_an_eager_step_in_the_kernel_needs_five_percent_of_the_parameters(name: str) -> None:
    params = parameters()
    size = sum(p.nbytes for p in params)
    assert peak_of_a_step(TorchBridge(CHAINS[name](), params)) <= 0.05 * size


def test_the_measure_sees_a_temporary() -> None:
    params = parameters()
    size = sum(p.nbytes for p in params)
    assert peak_of_a_step(torch.optim.AdamW(params, foreach=True)) > 0.5 * size


def test_eager_statistics_of_large_tensors_are_taken_one_tensor_at_a_time() -> None:
    params = parameters()
    size = sum(p.nbytes for p in params)
    # Of all three tensors at once, what `adafactor` makes on its way was three times their size.
    assert peak_of_a_step(TorchBridge(optax.adafactor(1e-3), params)) < 2 * size


def test_no_gradient_is_kept() -> None:
    params = [torch.nn.Parameter(torch.ones(8, 8)), torch.nn.Parameter(torch.ones(()))]
    optimizer = TorchBridge(optax.adamw(1e-3), params, compile=True)
    for p in params:
        p.grad = torch.ones_like(p)
    kept = [weakref.ref(p.grad) for p in params]
    optimizer.step()
    optimizer.zero_grad()
    assert [grad() for grad in kept] == [None, None]
