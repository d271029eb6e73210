"""Codes: equal to the recorded ones, right at odd block sizes, and tier 2 over them."""

import ctypes
import json
import os
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

import bounds
from chainrule.native import _kernel
from harness import assert_close
from reference import kernel as oracle

GOLDEN = Path(os.environ.get("CHAINRULE_GOLDEN_DIR", Path(__file__).parent.parent / "golden"))
# Smaller, equal and larger than a nibble pair, a tile and the tensor; odd and even.
BLOCKS = [1, 2, 3, 16, 101, 256, 1000, 1024, 1025, 5000, 200_000]
SIZES = [0, 1, 2, 33, 1024, 2051, 140_001]
STEP = {"learning_rate": 0.01, "b1": 0.9, "b2": 0.99, "eps": 1e-8}


def draw(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(n).astype(np.float32) for n in SIZES]


def empty_codes(
    sizes: list[int], block: int, bits: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Codes full of rubbish, and scales, for tensors of these sizes."""
    packed = [np.full((n + 1) // 2 if bits == 4 else n, 0xA5, np.uint8) for n in sizes]
    return packed, [np.zeros(-(-n // block), np.float32) for n in sizes]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", BLOCKS)
def test_codes_are_the_formula_s_and_a_round_trip_is_within_half_a_quantum(block, bits):
    values = draw(0)
    codes, scales = empty_codes(SIZES, block, bits)
    _kernel.quantize(values, codes, scales, block=block, bits=bits)
    decoded = [np.empty_like(x) for x in values]
    _kernel.dequantize(codes, scales, decoded, block=block, bits=bits)
    for x, c, s, y in zip(values, codes, scales, decoded, strict=True):
        expected = oracle.quantize(x, block=block, bits=bits)
        np.testing.assert_array_equal(s, expected.scales)
        np.testing.assert_array_equal(c, expected.packed)
        np.testing.assert_allclose(y, expected.values, rtol=bounds.ELEMENTWISE)
        quantum = np.repeat(s, block)[: x.size]
        assert (np.abs(x - y) <= 0.5001 * quantum).all()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_halves_are_quantised_as_float32(dtype):
    values = [x.astype(dtype) for x in draw(0)]
    wide = [x.astype(np.float32) for x in values]
    some, others = empty_codes(SIZES, 64, 4), empty_codes(SIZES, 64, 4)
    _kernel.quantize(values, *some, block=64)
    _kernel.quantize(wide, *others, block=64)
    for a, b in zip([*some[0], *some[1]], [*others[0], *others[1]], strict=True):
        np.testing.assert_array_equal(a, b)
    decoded, expected = [np.empty_like(x) for x in values], [np.empty_like(x) for x in wide]
    _kernel.dequantize(*some, decoded, block=64)
    _kernel.dequantize(*others, expected, block=64)
    for a, b in zip(decoded, expected, strict=True):
        np.testing.assert_array_equal(a.view(np.uint16), b.astype(dtype).view(np.uint16))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [3, 16, 1025])
def test_stochastic_rounding_uses_jax_s_bits(block, bits):
    values = draw(1)
    keys = jax.random.split(jax.random.key(7), len(SIZES))
    codes, scales = empty_codes(SIZES, block, bits)
    words = np.asarray(jax.random.key_data(keys))
    _kernel.quantize(values, codes, scales, block=block, bits=bits, keys=words)
    for x, key, c in zip(values, keys, codes, strict=True):
        random = np.asarray(jax.random.bits(key, x.shape, "uint32"))
        uniform = (random >> 8).astype(np.float32) * np.float32(2.0**-24)
        np.testing.assert_array_equal(
            c, oracle.quantize(x, block=block, bits=bits, uniform=uniform).packed
        )


def test_stochastic_rounding_is_right_on_average():
    x = np.full(100_000, 0.3, np.float32)
    x[0] = 7.0
    codes, scales = empty_codes([x.size], x.size, 4)
    _kernel.quantize([x], codes, scales, block=x.size, keys=np.array([[1, 2]], np.uint32))
    decoded = np.empty_like(x)
    _kernel.dequantize(codes, scales, [decoded], block=x.size)
    assert abs(decoded[1:].mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)


def test_a_block_that_is_not_finite_decodes_to_nan_and_no_other_does():
    x = np.ones(12, np.float32)
    x[5] = np.inf
    codes, scales = empty_codes([12], 3, 4)
    _kernel.quantize([x], codes, scales, block=3)
    decoded = np.empty_like(x)
    _kernel.dequantize(codes, scales, [decoded], block=3)
    np.testing.assert_array_equal(np.isnan(decoded), np.arange(12) // 3 == 1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("start", ["zero", "gradient"])
@pytest.mark.parametrize("block", [2, 33, 256, 1025, 3000])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_tier2_over_codes_equals_requantising_by_hand(dtype, block, start, bits):
    mus, longs = empty_codes(SIZES, block, bits), empty_codes(SIZES, block, bits)
    p, nu = draw(2), [np.zeros(n, np.float32) for n in SIZES]
    held = {"mu": [np.zeros(n) for n in SIZES], "long": [np.zeros(n) for n in SIZES]}
    settings = {"b1": 0.9, "b2": 0.99, "eps": 1e-3, "b1_long": 0.99, "blend": 0.5}
    by_hand = [x.astype(np.float64) for x in p]
    nus = [np.zeros(n) for n in SIZES]
    for t in range(3):
        g = [x.astype(dtype) for x in draw(10 + t)]
        _kernel.tier2_quantized(
            p,
            g,
            *mus,
            nu,
            mu_long_codes=longs[0],
            mu_long_scales=longs[1],
            block=block,
            bits=bits,
            start=start,
            learning_rate=0.1,
            **settings,
        )
        for i, x in enumerate(g):
            x = x.astype(np.float64)
            first = {"b1": 0.0, "b1_long": 0.0} if t == 0 and start == "gradient" else {}
            new = oracle.tier2(x, held["mu"][i], nus[i], held["long"][i], **{**settings, **first})
            by_hand[i] = by_hand[i] - 0.1 * new.update
            nus[i] = new.nu
            for name, codes, value in (("mu", mus, new.mu), ("long", longs, new.mu_long)):
                expected = oracle.quantize(value.astype(np.float32), block=block, bits=bits)
                # float32 EMAs may round the other way at a tie: off by one code, seldom.
                stored = np.empty(x.size, np.float32)
                _kernel.dequantize([codes[0][i]], [codes[1][i]], [stored], block=block, bits=bits)
                size = expected.scales.max(initial=0.0)
                bound = bounds.stepped(t + 1)
                np.testing.assert_allclose(codes[1][i], expected.scales, rtol=0, atol=bound * size)
                levels = {4: 7, 8: 127}[bits]
                off = np.abs(stored - expected.values) > bound * levels * size
                assert off.sum() <= 5 + x.size // 100
                held[name][i] = stored.astype(np.float64)
    for a, b in zip(p, by_hand, strict=True):
        assert_close(a, b, bounds.stepped(3))


@pytest.fixture(scope="module")
def primitives() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "cosmic_primitives.npz", allow_pickle=False))


def test_recorded_codes_scales_and_values(primitives):
    cases = [key.split("/")[1] for key in primitives if key.startswith("x/")]
    assert cases
    forms = {key.split("/")[0] for key in primitives if key.startswith("blocks")}
    for case in cases:
        x = primitives[f"x/{case}"].reshape(-1)
        for form in sorted(forms):
            if f"{form}/{case}/q" not in primitives:
                continue
            block = int(form.removeprefix("blocks"))
            codes, scales = empty_codes([x.size], block, 4)
            _kernel.quantize([x], codes, scales, block=block)
            np.testing.assert_array_equal(codes[0], primitives[f"{form}/{case}/q"])
            np.testing.assert_array_equal(scales[0], primitives[f"{form}/{case}/scale"])
            decoded = np.empty_like(x)
            _kernel.dequantize(codes, scales, [decoded], block=block)
            np.testing.assert_array_equal(
                decoded, primitives[f"{form}/{case}/unpacked"].reshape(-1)
            )


def test_recorded_codes_of_whole_tensors(primitives):
    for key in [key for key in primitives if key.startswith("pack/") and key.endswith("/q")]:
        x = primitives[f"x/{key.split('/')[1]}"].reshape(-1)
        codes, scales = empty_codes([x.size], max(x.size, 1), 4)
        _kernel.quantize([x], codes, scales, block=max(x.size, 1))
        np.testing.assert_array_equal(codes[0], primitives[key])


def test_recorded_tier_signals(primitives):
    for key in [key for key in primitives if key.startswith("tier_signal/")]:
        x = primitives.get(f"x/{key.split('/')[1]}", np.zeros(0, np.float32))
        mean, square, variance, peak = _kernel.statistics([x])[0]
        signal = mean + 0.1 * np.sqrt(square)
        signal *= 1 + 0.25 * min(variance / (mean**2 + 1e-12), 8)
        signal *= 1 + 0.1 * min(peak / (mean + 1e-12), 8)
        np.testing.assert_allclose(
            signal, primitives[key], rtol=bounds.summed(x.size, "float64"), atol=bounds.FLUSHED
        )


CODED = ["ema_short_q", "ema_short_scale", "ema_long_q", "ema_long_scale"]


def quant4() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "cosmic_quant4.npz", allow_pickle=False))


@pytest.mark.parametrize(
    "variant", [v for v in json.loads(str(quant4()["meta"]))["variants"] if v.startswith("fused")]
)
def test_recorded_codes_step_by_step(variant):
    """Each step from the recorded state before it: codes and scales after it are equal, bit by bit."""
    data = quant4()
    meta = json.loads(str(data["meta"]))
    given = meta["variants"][variant]
    block = given.get("quant4_block_size", 256)
    for name, shape in meta["shapes"].items():
        size = int(np.prod(shape))
        p = data[f"p0/{name}"].reshape(-1).copy()
        nu = np.zeros(size, np.float32)
        # Scales 0, and every code the one of 0.
        roles = [data[f"{variant}/{r}/{name}"][0] * 0 for r in CODED]
        roles[0] += 0x88
        roles[2] += 0x88
        tiers = data[f"{variant}/tier"][:, meta["names"].index(name)]
        rates = data[f"{variant}/eff_lr"][:, meta["names"].index(name)]
        for t in range(meta["T"]):
            _kernel.tier2_quantized(
                [p],
                [np.ascontiguousarray(data[f"g/{name}"][t]).reshape(-1)],
                [roles[0]],
                [roles[1]],
                [nu],
                mu_long_codes=[roles[2]],
                mu_long_scales=[roles[3]],
                block=block,
                start="gradient",
                learning_rate=rates[t],
                weight_decay=given.get("weight_decay", 0.0),
                b1=0.9,
                b1_long=0.99,
                blend=tiers[t] / 2,
                b2=0.999,
                eps=1e-8,
                nu_correction=1 - 0.999 ** (t + 1),
            )
            for mine, role in zip(roles, CODED, strict=True):
                np.testing.assert_array_equal(mine, data[f"{variant}/{role}/{name}"][t])
            recorded = data[f"{variant}/p/{name}"][t].reshape(-1)
            movement = np.abs(recorded - data[f"{variant}/p/{name}"][0].reshape(-1)).max()
            scale = max(movement, 0.1 * np.abs(recorded).max(), 1e-3)
            assert np.abs(p - recorded).max() <= bounds.RECORDED * scale
            p = recorded.copy()


@pytest.mark.parametrize("size", [1, 512, 2048, 70001])
@pytest.mark.parametrize(("bits", "block"), [(8, 64), (4, 3), (4, 5000)])
@pytest.mark.parametrize("is_program", [False, True])
def test_a_function_or_program_between_codes_runs_tile_by_tile(size, bits, block, is_program):
    """A step on all entries at once, by NumPy, between a decode and an encode of the whole."""
    held = _kernel.Format(bits, block, False)
    moment, gradient = np.random.default_rng(0).standard_normal((2, size), np.float32)
    blocks = -(-size // block)
    codes, scales = (
        np.zeros((size + 1) // 2 if bits == 4 else size, np.uint8),
        np.zeros(blocks, np.float32),
    )
    held.encode(codes.ctypes.data, scales.ctypes.data, size, moment.ctypes.data, 0, 0, size)
    expected, expected_codes, expected_scales = np.empty(size, np.float32), codes * 0, scales * 0
    held.decode(codes.ctypes.data, scales.ctypes.data, size, expected.ctypes.data, 0, size)
    expected = np.float32(0.5) * expected + gradient
    held.encode(
        expected_codes.ctypes.data,
        expected_scales.ctypes.data,
        size,
        expected.ctypes.data,
        0,
        0,
        size,
    )
    seen = []

    @ctypes.CFUNCTYPE(
        None, ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_float), ctypes.c_int64
    )
    def step(m, g, n):
        m, g = (np.ctypeslib.as_array(x, (n,)) for x in (m, g))
        m[:] = np.float32(0.5) * m + g
        seen.append(n)

    _, tensor, scratch, length = range(4)
    place = (scratch, 0, 4)
    arguments = [place, (tensor, 2, 4)]
    if is_program:
        words = np.array([0.5], np.float32).view(np.uint32)
        own, other, number = (0, 0), (0, 1), (2, 0)
        steps = [("mul", own, [own, number]), ("add", own, [own, other])]
        body = _kernel.ElementProgram(steps, [(size, [0, 1], [0])], words, 2)
    else:
        body = ctypes.cast(step, ctypes.c_void_p).value
        arguments.append((length, 0, 0))
    row = (size, arguments, [(held, place, 0, 1, -1)], [(held, place, 0, 1, -1)])
    launches = _kernel.CodedLaunches(body, [row], [], 3)
    launches.run([x.ctypes.data for x in (codes, scales, gradient)], 2)
    if not is_program:
        assert sum(seen) == size and max(seen) <= max(512, 2 * block)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_array_equal(scales, expected_scales)
