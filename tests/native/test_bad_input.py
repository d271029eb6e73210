"""What the NumPy door refuses, by type and message, with nothing written before."""

import subprocess
import sys
from collections.abc import Callable

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from chainrule.native import _kernel

N = 12
Roles = dict[str, object]


def tier2_roles() -> Roles:
    def memory() -> list[np.ndarray]:
        return [np.ones(N, np.float32), np.ones(5, np.float32)]

    numbers = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "eps": 1e-8}
    return {
        "parameters": memory(),
        "gradients": memory(),
        "mu": memory(),
        "nu": memory(),
        **numbers,
    }


def quantized_roles() -> Roles:
    roles = tier2_roles()
    del roles["mu"]
    roles["mu_codes"] = [np.zeros(N // 2, np.uint8), np.zeros(3, np.uint8)]
    roles["mu_scales"] = [np.zeros(3, np.float32), np.zeros(2, np.float32)]
    return {**roles, "block": 4}


def snapshot(roles: Roles) -> list[bytes]:
    lists = [role for role in roles.values() if isinstance(role, list)]
    return [x.tobytes() for role in lists for x in role if isinstance(x, np.ndarray)]


def strided() -> np.ndarray:
    return np.ones(2 * N, np.float32)[::2]


def misaligned() -> np.ndarray:
    return np.zeros(4 * N + 1, np.uint8)[1:].view(np.float32)


def read_only() -> np.ndarray:
    x = np.ones(N, np.float32)
    x.flags.writeable = False
    return x


def put(role: str, first: Callable[[], object]) -> Callable[[Roles], None]:
    def change(roles: Roles) -> None:
        entries = roles[role]
        assert isinstance(entries, list)
        entries[0] = first()

    return change


def share(role: str, other: str, shift: int) -> Callable[[Roles], None]:
    def change(roles: Roles) -> None:
        whole = np.ones(N + shift, np.float32)
        put(role, lambda: whole[:N])(roles)
        put(other, lambda: whole[shift:])(roles)

    return change


def given(**values: object) -> Callable[[Roles], None]:
    return lambda roles: roles.update(values)


BAD_BUFFERS = {
    "not contiguous": (put("mu", strided), ValueError, r"mu\[0\]: must be C-contiguous"),
    "transposed": (
        put("gradients", lambda: np.ones((3, 4), np.float32).T),
        ValueError,
        r"gradients\[0\]: must be C-contiguous",
    ),
    "misaligned": (put("nu", misaligned), ValueError, r"nu\[0\]: must be aligned"),
    "misaligned pointer": (
        put("nu", lambda: (np.ones(N, np.float32).ctypes.data + 2, N, "float32")),
        ValueError,
        r"nu\[0\]: must be aligned.* got address \d+",
    ),
    "read-only": (
        put("parameters", read_only),
        ValueError,
        r"parameters\[0\]: must be writeable, got what is read-only; pass a copy",
    ),
    "jax array": (
        put("mu", lambda: np.asarray(jnp.ones(N))),
        ValueError,
        r"mu\[0\]: must be writeable",
    ),
    "no CPU buffer": (
        put("parameters", lambda: jnp.ones(N)),
        TypeError,
        r"parameters\[0\]: must be a NumPy array .* on an accelerator has no memory",
    ),
    "wrong length": (
        put("mu", lambda: np.ones(N - 1, np.float32)),
        ValueError,
        r"mu\[0\]: must be of 12 elements, got 11",
    ),
    "too few tensors": (
        given(nu=[np.ones(N, np.float32)]),
        ValueError,
        r"nu: must be 2 tensors, .* got 1",
    ),
    "float64": (
        put("gradients", lambda: np.ones(N)),
        TypeError,
        r"gradients\[0\]: must be float32, .* got float64; cast it",
    ),
    "integers": (
        put("gradients", lambda: np.ones(N, np.int32)),
        TypeError,
        r"gradients\[0\]: must be float32, .* got int32",
    ),
    "codes as moments": (
        put("mu", lambda: np.ones(N, np.uint8)),
        TypeError,
        r"mu\[0\]: must be float32, bfloat16 or float16, got uint8",
    ),
    "byte order": (
        put("gradients", lambda: np.ones(N, ">f4")),
        ValueError,
        r"gradients\[0\]: must be in the native byte order",
    ),
    "the same twice": (share("mu", "nu", 0), ValueError, r"mu\[0\] and nu\[0\] overlap"),
    "overlapping": (
        share("parameters", "gradients", 3),
        ValueError,
        r"parameters\[0\] and gradients\[0\] overlap",
    ),
    "null pointer": (put("mu", lambda: (0, N, "float32")), ValueError, "pointer that is not null"),
    "negative length": (put("mu", lambda: (8, -1, "float32")), ValueError, "length of at least 0"),
    "a triple of other things": (
        put("mu", lambda: (8.0, 1, "float32")),
        TypeError,
        "must be a triple",
    ),
    "unknown dtype": (put("mu", lambda: (8, 1, "float8")), TypeError, "got float8"),
    "one array for many": (
        given(mu=np.ones((2, N), np.float32)),
        TypeError,
        "mu: must be a sequence of arrays",
    ),
    "no moments": (given(mu=None), TypeError, "mu: must be given, got None"),
    "no gradients": (given(gradients=None), TypeError, "gradients: must be given, got None"),
    "no parameters": (
        given(parameters=None),
        ValueError,
        "parameters: must be given, got None; or `updates`",
    ),
    "decay without parameters": (
        given(
            parameters=None,
            weight_decay=0.1,
            updates=[np.ones(N, np.float32), np.ones(5, np.float32)],
        ),
        ValueError,
        "parameters: must be given, got None; weight_decay is not 0",
    ),
    "updates in half the gradient": (
        lambda roles: roles.update(
            updates=[x.view(np.float16)[: x.size] for x in roles["gradients"]]
        ),
        ValueError,
        "overlap",
    ),
    "nu that is not used": (given(denominator="none"), ValueError, "nu: must be None"),
    "nu that is": (
        given(nu=None),
        ValueError,
        "nu: must be given, got None; denominator is 'root'",
    ),
    "blend of one EMA": (
        given(blend=0.5),
        ValueError,
        "blend: must be 1 without a long EMA, got 0.5",
    ),
}

BAD_NUMBERS = {
    "b1 above 1": (given(b1=1.5), ValueError, r"b1: must be finite and in \[0, 1\], got 1.5"),
    "b2 below 0": (given(b2=-0.1), ValueError, "b2: must be finite"),
    "eps": (given(eps=-1.0), ValueError, "eps: must be finite"),
    "learning rate": (given(learning_rate=np.nan), ValueError, "learning_rate: must be finite"),
    "correction": (
        given(nu_correction=0.0),
        ValueError,
        r"nu_correction: must be finite and in \(",
    ),
    "number of numbers": (
        given(b1=[0.9, 0.9, 0.9]),
        ValueError,
        "b1: must be one number or 2, .*got 3",
    ),
    "no number": (given(b1="much"), (TypeError, ValueError), "b1|could not convert"),
    "denominator": (
        given(denominator="sqrt"),
        ValueError,
        "denominator: must be one of root, magnitude, none, got 'sqrt'",
    ),
    "threads": (given(threads=-1), ValueError, r"threads: must be in \[0, 1024\], got -1"),
}

BAD_CODES = {
    "block of 0": (given(block=0), ValueError, r"block: must be finite and in \[1, "),
    "negative block": (given(block=-4), ValueError, "block: must be finite"),
    "fraction of a block": (given(block=2.5), ValueError, "block: must be an integer"),
    "bits": (given(bits=5), ValueError, "bits: must be 4 or 8, got 5"),
    "codes for other bits": (
        given(bits=8),
        ValueError,
        r"mu_codes\[0\]: must be of 12 elements, got 6",
    ),
    "scales of another block": (
        given(block=2),
        ValueError,
        r"mu_scales\[0\]: must be of 6 elements",
    ),
    "scales in half": (
        put("mu_scales", lambda: np.zeros(3, np.float16)),
        TypeError,
        r"mu_scales\[0\]: must be float32, got float16",
    ),
    "codes that are floats": (
        put("mu_codes", lambda: np.zeros(6, np.float32)),
        TypeError,
        r"mu_codes\[0\]: must be uint8, got float32",
    ),
    "read-only codes": (
        put("mu_codes", lambda: np.frombuffer(bytes(6), np.uint8)),
        ValueError,
        r"mu_codes\[0\]: must be writeable",
    ),
    "half of the long EMA": (
        given(mu_long_codes=[]),
        ValueError,
        "mu_long_codes and mu_long_scales: must be both given or both None",
    ),
    "start": (given(start="warm"), ValueError, "start: must be one of zero, gradient, got 'warm'"),
}


@pytest.mark.parametrize("case", BAD_BUFFERS | BAD_NUMBERS)
def test_tier2_refuses_before_it_writes(case):
    change, error, message = (BAD_BUFFERS | BAD_NUMBERS)[case]
    roles = tier2_roles()
    change(roles)
    before = snapshot(roles)
    with pytest.raises(error, match=message):
        _kernel.tier2(**roles)
    assert snapshot(roles) == before


@pytest.mark.parametrize("case", BAD_CODES)
def test_tier2_quantized_refuses_before_it_writes(case):
    change, error, message = BAD_CODES[case]
    roles = quantized_roles()
    change(roles)
    before = snapshot(roles)
    with pytest.raises(error, match=message):
        _kernel.tier2_quantized(**roles)
    assert snapshot(roles) == before


def test_the_unchanged_roles_are_accepted():
    _kernel.tier2(**tier2_roles())
    _kernel.tier2_quantized(**quantized_roles())


def test_tier1_wants_a_float32_magnitude_for_each_tensor():
    p, g = [np.ones(3, np.float32)], [np.ones(3, np.float32)]
    numbers = {"learning_rate": 0.1, "decay": 0.9}
    with pytest.raises(ValueError, match=r"magnitudes\[0\]: must be of 1 elements, got 2"):
        _kernel.tier1(p, g, [np.ones(2, np.float32)], **numbers)
    with pytest.raises(TypeError, match=r"magnitudes\[0\]: must be float32, got bfloat16"):
        _kernel.tier1(p, g, [np.ones(1, ml_dtypes.bfloat16)], **numbers)
    with pytest.raises(ValueError, match="mean_magnitude: must be finite"):
        _kernel.tier1(p, g, [np.ones(1, np.float32)], mean_magnitude=-1.0, **numbers)
    assert (p[0] == 1).all()


@pytest.mark.parametrize("keys", [np.zeros((2, 2), np.uint32), np.zeros(2, np.uint32)])
def test_stochastic_rounding_wants_a_key_for_each_tensor(keys):
    codes, scales = [np.zeros(3, np.uint8)], [np.zeros(1, np.float32)]
    with pytest.raises(
        ValueError,
        match=r"keys: must be uint32 of shape \(1, 2\), got \(2.*a Threefry key for each",
    ):
        _kernel.quantize([np.ones(5, np.float32)], codes, scales, block=5, keys=keys)
    assert not codes[0].any()


@pytest.mark.parametrize(
    ("kind", "ys", "message"),
    [
        ("median", None, "kind: must be one of moments, residual.*, got 'median'"),
        ("residual", None, "ys: must be given, got NoneType; kind is 'residual'"),
        ("magnitude", [np.ones(3, np.float32)], "ys: must be None, got list; kind is 'magnitude'"),
        ("alignment", [np.ones(2, np.float32)], r"ys\[0\]: must be of 3 elements, got 2"),
        ("alignment", [], "ys: must be 1 tensors"),
    ],
)
def test_sums_want_a_kind_and_its_tensors(kind, ys, message):
    with pytest.raises(ValueError, match=message):
        _kernel.sums(kind, [np.ones(3, np.float32)], ys)


@pytest.mark.parametrize(
    ("bits", "block", "message"),
    [
        (5, 4, "bits: must be 4 or 8, got 5"),
        (8, 0, r"block: must be in \[1, .*got 0"),
    ],
)
def test_a_format_of_codes_is_checked_when_it_is_made(bits, block, message):
    with pytest.raises(ValueError, match=message):
        _kernel.Format(bits, block, False)


TENSOR = (1, 0, 4)
"""A place: the first of the tensors, of 4 bytes an element."""


def coded(*, block=4, values=(2, 0, 0), codes=0, scales=1, key=-1):
    return (_kernel.Format(8, block, False), values, codes, scales, key)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((8, [TENSOR] * 65, [], []), r"rows\[0\]: its length.* got 65"),
        ((8, [(4, 0, 0)], [], []), r"rows\[0\]: a kind: must be .*\[0, 3\], got 4"),
        ((8, [(1, 2, 4)], [], []), r"rows\[0\]: must be below 2, got 2"),
        ((8, [], [coded(codes=2)], []), r"rows\[0\]: must be below 2, got 2"),
        ((8, [], [], [coded(scales=3)]), r"rows\[0\]: must be below 2, got 3"),
        ((8, [], [], [coded(key=2)]), r"rows\[0\]: must be a tensor, got 2"),
        (
            (8, [], [coded(block=4), coded(block=6)], []),
            r"rows\[0\]: must be blocks that divide each other, got 12",
        ),
    ],
)
def test_launches_between_codes_are_checked_when_they_are_made(row, message):
    with pytest.raises(ValueError, match=message):
        _kernel.CodedLaunches(1, [row], [], 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "function: must be a program of 0 rows, got 1"),
        ([(8, [TENSOR, TENSOR], [], [])], r"rows\[0\]: must be the 1 tensors of the program"),
        ([(8, [(3, 0, 0)], [], [])], r"rows\[0\]: must be the 1 tensors of the program"),
        ([(8, [(1, 0, 0)], [], [])], r"rows\[0\]: must be the 1 tensors of the program"),
    ],
)
def test_a_program_between_codes_fits_its_rows(rows, message):
    steps = [("neg", (0, 0), [(0, 0)])]
    program = _kernel.ElementProgram(steps, [(8, [0], [])], np.zeros(1, np.uint32), 1)
    with pytest.raises(ValueError, match=message):
        _kernel.CodedLaunches(program, rows, [], 2)


def test_a_program_between_codes_has_no_sums():
    steps, sums = [("sum", (3, 0), [(0, 0)])], np.zeros(1, np.float32)
    program = _kernel.ElementProgram(steps, [(8, [0], [])], np.zeros(1, np.uint32), 1, sums)
    with pytest.raises(ValueError, match="function: must be a program without sums, got 1"):
        _kernel.CodedLaunches(program, [(8, [TENSOR], [], [])], [], 2)


def test_launches_between_codes_want_a_function_and_a_pointer_for_each_tensor():
    with pytest.raises(ValueError, match="function: must be the address of one, got null"):
        _kernel.CodedLaunches(0, [], [], 1)
    launches = _kernel.CodedLaunches(1, [], [], 2)
    with pytest.raises(ValueError, match="pointers: must be 2, one for each tensor, got 1"):
        launches.run([1])
    with pytest.raises(ValueError, match=r"threads: must be .*\[1, 1024\], got 0"):
        launches.run([1, 1], 0)


def test_buffers_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match=r"params\[0\]: must be C-contiguous"):
        _kernel.Buffers([strided()], "params")


@pytest.mark.parametrize(
    ("variable", "value"), [("CHAINRULE_NUM_THREADS", "two"), ("CHAINRULE_NUM_THREADS", "0")]
)
def test_a_wrong_number_of_threads_is_an_error(variable, value, monkeypatch):
    monkeypatch.setenv(variable, value)
    with pytest.raises(
        ValueError, match=r"CHAINRULE_NUM_THREADS must be an integer in \[1, 1024\]"
    ):
        _kernel.statistics([np.ones(3, np.float32)])


def test_an_unknown_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("CHAINRULE_ISA", "z80")
    with pytest.raises(ValueError, match=r"CHAINRULE_ISA must be one of .*baseline"):
        _kernel.statistics([np.ones(3, np.float32)])


def test_the_number_of_threads_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("CHAINRULE_NUM_THREADS", "3")
    assert _kernel.info()["threads"] == 3


def test_a_forked_child_gets_threads_of_its_own():
    code = """
import os, numpy as np
from chainrule.native import _kernel
g = [np.ones(1_000_000, np.float32)]
expected = _kernel.statistics(g, threads=4)
child = os.fork()
if child == 0:
    os._exit(0 if (_kernel.statistics(g, threads=4) == expected).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    # JAX warns of forks because of its own threads; this program has none.
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
