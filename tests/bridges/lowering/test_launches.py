"""Compiled pieces of many leaves in one loop."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch._inductor import metrics

from chainrule import TorchBridge, chains
from chainrule.bridges.lowering import lower, ops
from chainrule.bridges.lowering.backends import calls, compile, inductor
from chainrule.bridges.lowering.ops import elementwise
from chainrule.bridges.lowering.pipeline import make_step
from chainrule.native import _kernel


def magma(rate):
    return chains.magma(optax.adamw(rate))


SHAPES = [(3, 4), (4, 3), (5,), (2, 3, 2)]


def test_leaves_that_are_alike_are_one_call(monkeypatch, compiled_anew):
    """With tensors that are not contiguous, or have other memory, in between: as if each were called by itself."""
    made = []
    launched = inductor.Launched
    monkeypatch.setattr(
        inductor, "Launched", lambda *given: made.append(launched(*given)) or made[-1]
    )
    together = trained(chains.casmo(1e-2))
    assert any(len(call.calls) == len(SHAPES) for call in made)
    monkeypatch.setattr(compile, "function_of", lambda *_: None)
    compiled_anew.clear()
    count = len(made)
    apart = trained(chains.casmo(1e-2))
    assert len(made) == count  # the second one has none
    for x, y in zip(together, apart, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.skipif(_kernel is None, reason="needs the compiled kernel")
def test_what_is_summed_and_then_scaled_takes_no_memory(monkeypatch, compiled_anew):
    """It is computed in both loops; a buffer like the leaf would be for Python to make, call by call."""
    found, real = [], compile.function_of
    monkeypatch.setattr(
        compile, "function_of", lambda *args: found.append(real(*args)) or found[-1]
    )
    trained(chains.adam(1e-2, caution="clamped_mean"))
    assert None not in found


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


@pytest.mark.parametrize("chain", [chains.stam, magma])
def test_a_step_is_the_same_on_any_number_of_threads(chain, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr(calls, "_A_THREADS_WORK", 1)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(trained(chain(1e-2)))
        finally:
            torch.set_num_threads(before)
    for one, many in zip(*found, strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("compiled_anew")
def test_a_tensor_is_summed_while_it_is_updated(dtype, monkeypatch):
    """One loop before the sum over both leaves is known, and one after it. Small integers add up exactly."""
    shapes = [(70_001,), (300, 301)]
    loops, real = [], inductor.compile_piece

    def counted(piece, large):
        before = metrics.generated_kernel_count
        made = real(piece, large)
        loops.extend([metrics.generated_kernel_count - before] if large else [])
        return made

    def step(params, grads, averages):
        new = [m / 2 + g.astype(m.dtype) for m, g in zip(averages, grads, strict=True)]
        total = sum(jnp.sum(jnp.square(m.astype(jnp.float32))) for m in new)
        return [p - total * m for p, m in zip(params, new, strict=True)], new

    rng = np.random.default_rng(0)
    params, grads, averages = ([2 * rng.integers(-2, 3, s) for s in shapes] for _ in range(3))
    expected = [m / 2 + g for m, g in zip(averages, grads, strict=True)]
    total = sum((m**2).sum() for m in expected)
    expected = [p - total * m for p, m in zip(params, expected, strict=True)] + expected
    avals = [[jax.ShapeDtypeStruct(s, t) for s in shapes] for t in ("float32", "float32", dtype)]
    inputs = [torch.tensor(x, dtype=torch.float32) for x in (*params, *grads, *averages)]
    inputs[4:] = [x.to(getattr(torch, dtype)) for x in inputs[4:]]
    inputs[1] = inputs[1].t().contiguous().t()
    monkeypatch.setattr(inductor, "compile_piece", counted)
    make_step(lower(step, *avals), (0, 1, 4, 5), compile=True)(inputs)
    for i, x in zip((0, 1, 4, 5), expected, strict=True):
        np.testing.assert_array_equal(inputs[i].float().numpy(), x)
    assert loops == [1, 1]


def test_what_reads_an_old_value_after_the_sum_of_the_new_one():
    """Also by a view: the first element of what is overwritten."""

    def step(p, g, m):
        new = m / 2 + g
        return p - jnp.sum(jnp.square(new)) * m[0], new

    aval = jax.ShapeDtypeStruct((5,), jnp.float32)
    inputs = [torch.arange(5.0), torch.ones(5), torch.tensor([4.0, 2.0, 0.0, -2.0, 6.0])]
    make_step(lower(step, aval, aval, aval), (0, 2), compile=True)(inputs)
    assert inputs[2].tolist() == [3.0, 2.0, 1.0, 0.0, 4.0]
    assert inputs[0].tolist() == [i - 4 * 30.0 for i in range(5)]


@pytest.mark.parametrize("make", [chains.stam, magma], ids=["stam", "magma"])
def test_results_lie_where_what_they_replace_was(make):
    """Of stam nothing is copied at the end of a step; of magma the one mask that a vector hands each leaf."""
    params = [torch.nn.Parameter(torch.ones(s)) for s in [*SHAPES, *SHAPES]]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = TorchBridge(make(1e-2), params, compile=True)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    copies = sum(e.count for e in profile.key_averages() if e.key == "aten::copy_")
    assert copies <= (len(params) + 2 if make is magma else 0)


def test_scalars_are_made_in_the_vector_that_they_are_stacked_to():
    params = [torch.nn.Parameter(torch.ones(s)) for s in [*SHAPES, *SHAPES]]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = TorchBridge(chains.casmo(1e-2), params, compile=True)
    optimizer.step()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert not {"aten::stack", "aten::cat"} & {e.key for e in profile.key_averages()}


def test_words_of_randomness_are_those_of_torch(monkeypatch):
    words = torch.randint(0, 2**32, (3, 7), generator=torch.Generator().manual_seed(0))
    given = (torch.tensor(2**32 - 1), words[0], words[1, :1], words[2])
    ours = ops.threefry2x32(*given)
    monkeypatch.setattr(elementwise, "_kernel", None)
    for x, y in zip(ours, ops.threefry2x32(*given), strict=True):
        assert x.equal(y)


def test_what_a_loop_refuses():
    with pytest.raises(ValueError, match="function: must be the address of one, got null"):
        _kernel.Launches(0, [], [], 1)
    with pytest.raises(ValueError, match=r"rows\[1\]: must be in \[0, 2\], got 3"):
        _kernel.Launches(1, [[0, 2], [3]], [7], 2)
    with pytest.raises(ValueError, match=r"rows\[0\]: its length: must be in \[0, 64\], got 65"):
        _kernel.Launches(1, [[0] * 65], [], 1)
    with pytest.raises(ValueError, match="pointers: must be 2, one for each tensor, got 1"):
        _kernel.Launches(1, [], [], 2).run([1])
    with pytest.raises(ValueError, match=r"threads: must be in \[1, 1024\], got 0"):
        _kernel.Launches(1, [], [], 0).run([], 0)
