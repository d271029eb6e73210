"""Kahan's summation in torch: neither it nor Inductor may take (p + y) - p for y."""

import optax
import pytest
import torch

import bounds
from chainrule import TorchBridge
from chainrule.transforms import compensated


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_steps_add_up(dtype, compile):
    steps, size = 200, 1e-3 if dtype is torch.bfloat16 else 2.0**-25
    weight = torch.nn.Parameter(torch.ones(8, dtype=dtype))
    chain = optax.chain(optax.scale(-1.0), compensated())
    optimizer = TorchBridge(chain, [weight], compile=compile)
    for _ in range(steps):
        weight.grad = torch.full_like(weight, -size)
        optimizer.step()
    name = "bfloat16" if dtype is torch.bfloat16 else "float32"
    exact = 1 + steps * float(torch.tensor(size, dtype=dtype))
    bound = bounds.compensated(steps, size, name, name)
    lost = optimizer.state[weight]["lost"].double()
    assert (weight.double() + lost - exact).abs().max() <= bound
    assert (weight.double() - exact).abs().max() <= 2 * bounds.unit(name) + bound
