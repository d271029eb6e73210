"""What is compiled is compiled once: in a process, and by Inductor's cache on disk once for all of them."""

import collections

import optax
import torch
from torch._dynamo.utils import counters

from chainrule import TorchBridge


def stepped(chain, shapes, dtype=torch.float32):
    row = torch.linspace(-1, 1, 24, dtype=dtype)
    params = [torch.nn.Parameter(row.expand(shape).clone()) for shape in shapes]
    for p in params:
        p.grad = torch.ones_like(p)
    TorchBridge(chain(0.25), params, compile=True).step()
    return params


def test_another_bridge_finds_what_one_compiled(compiled_anew):
    """For tensors of other shapes too; another dtype or chain is other code."""
    for chain, shapes, dtype, anew in [
        (optax.adamw, [(3, 24), (24,)], torch.float32, True),
        (optax.adamw, [(24,), (90, 24), (5, 5, 24)], torch.float32, False),
        (optax.adamw, [(3, 24)], torch.bfloat16, True),
        (optax.lion, [(3, 24)], torch.float32, True),
    ]:
        before = len(compiled_anew)
        stepped(chain, shapes, dtype)
        assert (len(compiled_anew) > before) == anew


def test_another_process_finds_it_on_disk(compiled_anew, monkeypatch, tmp_path):
    """Code for small and for large tensors apart, although they are of any length."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(counters, "inductor", collections.Counter())
    first = stepped(optax.adamw, [(3, 24), (4000, 24)])
    assert len(compiled_anew) > 1
    assert counters["inductor"]["fxgraph_cache_miss"] == len(compiled_anew)
    compiled_anew.clear()
    second = stepped(optax.adamw, [(3, 24), (4000, 24)])
    assert counters["inductor"]["fxgraph_cache_hit"] == len(compiled_anew)
    assert all(map(torch.equal, first, second))
