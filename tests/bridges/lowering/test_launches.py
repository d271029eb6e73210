"""Compiled pieces of many leaves in one loop."""

import pytest
import torch

from chainrule import TorchBridge, chains
from chainrule.bridges.lowering.backends import compile, inductor
from chainrule.native import _kernel

SHAPES = [(3, 4), (4, 3), (5,), (2, 3, 2)]


def test_leaves_that_are_alike_are_one_call(monkeypatch):
    """With tensors that are not contiguous, or have other memory, in between: as if each were called by itself."""
    made = []
    launched = inductor._Launched
    monkeypatch.setattr(
        inductor, "_Launched", lambda *given: made.append(launched(*given)) or made[-1]
    )
    together = trained(chains.casmo(1e-2))
    assert any(len(call.calls) == len(SHAPES) for call in made)
    monkeypatch.setattr(compile, "function_of", lambda *_: None)
    count = len(made)
    apart = trained(chains.casmo(1e-2))
    assert len(made) == count  # the second one has none
    for x, y in zip(together, apart, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def trained(chain):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
    optimizer = TorchBridge(chain, params, compile=True)
    for step in range(5):
        if step == 2:
            params[0].data = params[0].data.clone()
            params[1].data = params[1].data.t().contiguous().t()
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        if step == 3:
            params[3].grad = params[3].grad.transpose(0, 2).contiguous().transpose(0, 2)
        optimizer.step()
    return [p.detach().contiguous() for p in params]


def test_what_a_loop_refuses():
    with pytest.raises(ValueError, match="function: must be the address of one, got null"):
        _kernel.Launches(0, [], [], 1)
    with pytest.raises(ValueError, match=r"rows\[1\]: must be in \[0, 2\], got 3"):
        _kernel.Launches(1, [[0, 2], [3]], [7], 2)
    with pytest.raises(ValueError, match=r"rows\[0\]: its length: must be in \[0, 64\], got 65"):
        _kernel.Launches(1, [[0] * 65], [], 1)
    with pytest.raises(ValueError, match="pointers: must be 2, one for each tensor, got 1"):
        _kernel.Launches(1, [], [], 2).run([1])
