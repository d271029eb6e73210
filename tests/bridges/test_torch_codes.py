"""`quantized_state` around chains in the torch bridge: the kernel's codes, in tiles, in parts and of whole tensors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import bounds
import chainrule as cr
from chainrule import TorchBridge
from chainrule import transforms as ct
from chainrule.bridges.lowering import ops
from chainrule.bridges.lowering.backends import coded_batch, parts
from chainrule.bridges.lowering.rules import kernel
from chainrule.native import _kernel, coding, primitives

pytestmark = pytest.mark.skipif(
    _kernel is None, reason="without the compiled kernel there are no such calls"
)

INNERS = {
    "adam": ct.scale_by_adam,
    "lion": optax.scale_by_lion,
    "adafactor": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=16),
    "muon": lambda: cr.chain(optax.trace(0.95, nesterov=True), ct.newton_schulz()),
    "stam": lambda: cr.chain(ct.adaptive_beta1(), ct.scale_by_adam(b1=None)),
    "casmo": lambda: cr.chain(ct.scale_by_adam(), ct.agar_confidence()),
    "magma": lambda: cr.chain(ct.scale_by_adam(), ct.momentum_alignment_mask()),
}
SHAPES = [(40, 24), (515,), (8,)]
RATE = 1e-2


def drawn(shapes, seed):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def in_both(inner, bits, *, compile=False, shapes=SHAPES, steps=2, after=(), **settings):
    """Parameters and codes of some steps in JAX and in the bridge."""
    settings = {"block": 64, **settings}
    tx = cr.chain(ct.quantized_state(inner, bits, **settings), *after, optax.scale(-RATE))
    params = [jnp.asarray(x) for x in drawn(shapes, 0)]
    own = [torch.nn.Parameter(torch.tensor(np.array(x))) for x in params]
    state, update, bridge = (
        tx.init(params),
        jax.jit(tx.update),
        TorchBridge(tx, own, compile=compile),
    )
    found = []
    for seed in range(1, steps + 1):
        grads = drawn(shapes, seed)
        for p, g in zip(own, grads, strict=True):
            p.grad = torch.from_numpy(g)
        updates, state = update([jnp.asarray(g) for g in grads], state, params)
        params = optax.apply_updates(params, updates)
        bridge.step()
        found.append(
            (
                [np.asarray(p) for p in jax.tree.leaves(params)],
                [p.detach().numpy().copy() for p in own],
            )
        )
    return found, state, bridge


def codes_of(arrays):
    return sorted(
        (np.asarray(x) for x in arrays if str(x.dtype).removeprefix("torch.") == "uint8"),
        key=lambda x: (x.size, x.sum(dtype=np.int64)),
    )


def check(found, state, bridge, bits):
    """The first step is the same; afterwards an entry may have fallen between two codes."""
    for jax_params, torch_params in found[:1]:
        for a, b in zip(jax_params, torch_params, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=bounds.stepped(1) * np.abs(a).max())
    theirs = codes_of(x for x in jax.tree.leaves(state) if hasattr(x, "dtype"))
    mine = codes_of(x for own in bridge.state.values() for x in own.values() if torch.is_tensor(x))
    assert len(theirs) == len(mine) > 0
    for a, b in zip(theirs, mine, strict=True):
        if bits == 4:
            a, b = (np.stack([x & 15, x >> 4]) for x in (a, b))
        gaps = np.abs(a.astype(int) - b.astype(int))
        assert gaps.max() <= 1 and gaps.mean() < 0.01


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", INNERS)
def test_chains_in_codes(name, bits):
    shapes = [(40, 24)] if name == "muon" else SHAPES
    check(*in_both(INNERS[name](), bits, shapes=shapes), bits)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "bits"), [("adam", 8), ("stam", 4), ("casmo", 8)])
def test_chains_in_codes_compiled(name, bits):
    check(*in_both(INNERS[name](), bits, compile=True), bits)


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stochastic_rounding_draws_what_jax_draws(compile):
    settings = {"rounding": "stochastic", "seed": 3, "smaller": "quantize"}
    check(*in_both(ct.scale_by_adam(), 8, compile=compile, **settings), 8)


@pytest.mark.parametrize("block", [7, None])
def test_blocks_that_do_not_fit_parts(block):
    check(*in_both(ct.scale_by_adam(), 4, block=block, smaller="quantize"), 4)


def test_a_later_link_reads_moments_from_codes_that_were_just_written():
    check(*in_both(ct.scale_by_adam(), 8, after=[ct.cautious()]), 8)


@pytest.mark.parametrize("name", ["adam", "casmo"])
def test_large_tensors_in_parts(name, monkeypatch):
    """Where no program of the kernel's is for the arithmetic between the codes."""
    monkeypatch.setattr(coded_batch, "fits_tiles", lambda _: False)
    whole, *_ = in_both(INNERS[name](), 8, shapes=[(60, 40)])
    monkeypatch.setattr(parts, "PART", 512)
    found = in_both(INNERS[name](), 8, shapes=[(60, 40)])
    check(*found, 8)
    np.testing.assert_array_equal(whole[-1][1][0], found[0][-1][1][0])


@pytest.mark.parametrize("name", ["adam", "lion"])
def test_an_eager_step_in_codes_makes_no_whole_tensor(name, monkeypatch):
    """Its arithmetic is a program of the kernel's between the codes, also of a parameter that does not lie in order."""

    def whole(*_):
        raise AssertionError

    monkeypatch.setattr(coded_batch, "_CodedBatch", whole)
    found = []
    for transposed in (False, True):
        (x,) = drawn([(40, 24)], 0)
        p = torch.tensor(x).requires_grad_()
        if transposed:
            p.data = p.data.t().contiguous().t()
        tx = optax.chain(ct.quantized_state(INNERS[name](), 8, 64), optax.scale(-RATE))
        bridge = TorchBridge(tx, [p])
        for (g,) in (drawn([(40, 24)], seed) for seed in (1, 2)):
            p.grad = torch.from_numpy(g)
            bridge.step()
        found.append(p.detach().numpy())
        assert p.is_contiguous() != transposed
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size", "block"), [(1000, 64), (5001, 5001)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_kernel_and_xla_make_the_same_codes(size, block, bits, logarithmic, stochastic):
    x = drawn([(size,)], 0)[0] * 10 ** np.linspace(-4, 4, size, dtype=np.float32)
    x = x * x if logarithmic else x
    x[:block] = 0
    if size == 1000:
        x[[500, 700]] = np.nan, np.inf
    held = coding.Format(bits, block, logarithmic)
    key = np.array([3, 4], np.uint32)
    given = [jnp.asarray(x), *([jnp.asarray(key)] if stochastic else [])]
    codes, scales = primitives.encode.bind(*given, held=held, kernel="auto")
    words = torch.from_numpy(key.astype(np.int64)) if stochastic else None
    own_codes, own_scales = ops.encode(torch.from_numpy(x), words, held)
    np.testing.assert_array_equal(codes, own_codes)
    np.testing.assert_array_equal(scales, own_scales)
    (back,) = primitives.decode.bind(codes, scales, shape=x.shape, held=held, kernel="auto")
    np.testing.assert_array_equal(back, ops.decode(own_codes, own_scales, x.shape, held))


@pytest.mark.parametrize("shape", [(6, 12), (72,)])
def test_compiled_codes_without_the_kernel_are_the_eager_ones(shape, monkeypatch):
    """As on shards. The last block is shorter than the others: Inductor left its codes as they were."""
    monkeypatch.setattr(kernel, "CODES", {})
    found = []
    for compile in (False, True):
        generator = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=generator)
        chain = optax.chain(ct.quantized_state(optax.trace(0.9), 8, 32), optax.scale(-1e-2))
        optimizer = TorchBridge(chain, [p], compile=compile)
        optimizer.step()
        found.append([x for k, x in optimizer.state[p].items() if k.endswith("codes")])
    (eager,), (compiled,) = found
    assert torch.equal(compiled, eager) and len(set(eager[64:].tolist())) > 1
