"""Any call of the kernel: what it writes and what it leaves alone, and that a bad one is an error.

`make sanitize` runs this file on a kernel that is built with the address and undefined-behaviour sanitizers. There an
array of exactly the right size shows a byte too far; elsewhere the bytes around it do.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from chainrule.native import _kernel, coding, forms, xla

FLOATS = ("float32", "bfloat16", "float16")
GUARD = 0xA5
# Most of the time goes into drawing the examples, each of them a call of microseconds.
examples = settings(
    max_examples=int(os.environ.get("CHAINRULE_EXAMPLES", "100")),
    suppress_health_check=list(HealthCheck),
)


class Call(NamedTuple):
    """One call of the NumPy door."""

    function: str
    roles: dict[str, list[np.ndarray] | None]
    written: frozenset[str]
    numbers: dict[str, Any]
    keys: np.ndarray | None = None

    def __call__(self, **changed: Any) -> Any:
        keys = {} if self.keys is None else {"keys": self.keys}
        return getattr(_kernel, self.function)(**{**self.roles, **self.numbers, **keys, **changed})

    def one(self, index: int) -> "Call":
        """The call of one of its tensors, in memory of its own."""
        roles = {name: role and [role[index].copy()] for name, role in self.roles.items()}
        numbers = {
            name: value[index] if isinstance(value, np.ndarray) else value
            for name, value in self.numbers.items()
        }
        keys = None if self.keys is None else self.keys[index : index + 1]
        return Call(self.function, roles, self.written, {**numbers, "threads": 1}, keys)

    def arrays(self, written: bool | None = None) -> Iterator[np.ndarray]:
        for name, role in self.roles.items():
            if role and (written is None or (name in self.written) == written):
                yield from role


def placed(values: np.ndarray, before: int) -> np.ndarray:
    """A copy of `values` after `before` guarded elements and before as many; in memory of its own if 0."""
    if before == 0:
        return values.copy()
    whole = np.empty(values.size + 2 * before, values.dtype)
    whole.view(np.uint8)[:] = GUARD
    inside = whole[before : before + values.size]
    inside[:] = values.reshape(-1)
    return inside


def guards_hold(array: np.ndarray) -> bool:
    if array.base is None:
        return True
    whole = array.base.view(np.uint8)
    start = array.ctypes.data - array.base.ctypes.data
    return bool((whole[:start] == GUARD).all() and (whole[start + array.nbytes :] == GUARD).all())


@st.composite
def calls(draw: st.DrawFn) -> Call:
    function = draw(
        st.sampled_from(
            ["tier2", "tier2_quantized", "tier1", "tier0", "statistics", "sums", "quantize", "dequantize"]
        )
    )  # fmt: skip
    sizes = draw(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 5000)), max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    block, bits = draw(st.integers(1, 70)), draw(st.sampled_from([4, 8]))

    def role(of: Callable[[int], int] = lambda n: n, dtypes: Any = FLOATS) -> list[np.ndarray]:
        arrays = []
        for n in sizes:
            dtype = np.dtype(draw(st.sampled_from(dtypes)))
            values = rng.normal(size=of(n)) * 10.0 ** rng.integers(-3, 3)
            values = np.abs(values) * 100 if dtype == np.uint8 else values
            arrays.append(placed(values.astype(dtype), draw(st.sampled_from([0, 1, 3, 16]))))
        return arrays

    def codes() -> list[np.ndarray]:
        return role(lambda n: coding.packed_size(n, bits), ("uint8",))

    def scales() -> list[np.ndarray]:
        found = role(lambda n: coding.block_count(n, min(block, max(n, 1))), ("float32",))
        for x in found:
            x[:] = np.abs(x)
        return found

    def number(low: float, high: float) -> Any:
        if draw(st.booleans()):
            return float(rng.uniform(low, high))
        return rng.uniform(low, high, len(sizes))

    threads = {"threads": draw(st.integers(1, 4))}
    if function == "statistics":
        return Call(function, {"gradients": role()}, frozenset(), threads)
    if function == "sums":
        kind = draw(st.sampled_from(sorted(forms.SUMS)))
        roles = {"xs": role(), "ys": None if kind in forms.OF_ONE else role()}
        return Call(function, roles, frozenset(), {"kind": kind, "c": 0.5, **threads})
    coded = {"block": block, "bits": bits, **threads}
    if function in ("quantize", "dequantize"):
        roles = {"values": role(), "codes": codes(), "scales": scales()}
        written = {"values"} if function == "dequantize" else {"codes", "scales"}
        keys = rng.integers(0, 2**32, (len(sizes), 2), np.uint32)
        stochastic = function == "quantize" and draw(st.booleans())
        return Call(function, roles, frozenset(written), coded, keys if stochastic else None)

    roles: dict[str, list[np.ndarray] | None] = {"gradients": role()}
    numbers = {"learning_rate": number(-1, 1), **threads}
    # Where the step goes: into the parameters, into updates, or into the gradients' own memory.
    target = draw(st.sampled_from(["parameters", "updates", "gradients"]))
    roles["updates"] = {"parameters": None, "updates": role()}.get(target, roles["gradients"])
    roles["parameters"] = role() if target == "parameters" or draw(st.booleans()) else None
    written = {"parameters"} if target == "parameters" else {"updates"}
    if target == "gradients":
        written.add("gradients")
    if roles["parameters"]:
        numbers["weight_decay"] = number(0, 1)
    if function == "tier0":
        return Call(function, roles, frozenset(written), numbers)
    if function == "tier1":
        roles["magnitudes"] = role(lambda n: 1, ("float32",))
        numbers |= {"decay": number(0, 1), "scale_decay": draw(st.booleans())}
        if draw(st.booleans()):
            numbers["mean_magnitude"] = number(0, 1)
        return Call(function, roles, frozenset({*written, "magnitudes"}), numbers)
    denominator = draw(st.sampled_from(["root", "magnitude", "none"]))
    roles["nu"] = role() if denominator == "root" else None
    for x in roles["nu"] or ():
        x[:] = np.abs(x)
    long = draw(st.booleans())
    numbers |= {"b1": number(0, 1), "b2": number(0, 1), "eps": 1e-3, "denominator": denominator}
    numbers |= {"mu_correction": number(0.1, 1), "nu_correction": number(0.1, 1)}
    if long:
        numbers |= {"b1_long": number(0, 1), "blend": number(0, 1)}
    if function == "tier2":
        moments = {"mu": role(), "mu_long": role() if long else None}
    else:
        moments = {"mu_codes": codes(), "mu_scales": scales()}
        moments |= {"mu_long_codes": codes(), "mu_long_scales": scales()} if long else {}
        numbers |= {
            "block": block,
            "bits": bits,
            "start": draw(st.sampled_from(["zero", "gradient"])),
        }
    roles |= moments
    return Call(function, roles, frozenset({*written, *moments, "nu"}), numbers)


@examples
@given(calls())
def test_a_call_is_its_tensors_one_by_one(call: Call) -> None:
    """Bit for bit, whatever else is in the call, the dtypes, the memory around them and the number of threads."""
    alone = [call.one(i) for i in range(max(len(role or ()) for role in call.roles.values()))]
    if "gradients" in call.written:  # one memory under two names
        alone = [c._replace(roles={**c.roles, "updates": c.roles["gradients"]}) for c in alone]
    read = [x.tobytes() for x in call.arrays(written=False)]
    table = call()
    assert [x.tobytes() for x in call.arrays(written=False)] == read
    assert all(map(guards_hold, call.arrays()))
    rows = [c() for c in alone]
    for i, c in enumerate(alone):
        for name, role in call.roles.items():
            if role:
                assert role[i].tobytes() == c.roles[name][0].tobytes(), f"{name}[{i}]"
    if table is not None:
        assert table.tobytes() == b"".join(row.tobytes() for row in rows)


# ---- bad calls -----------------------------------------------------------------------------

OTHER_DTYPES = ["float64", "int32", "int8", "bool", "complex64", ">f4", "object", "M8[s]"]


def strided(x: np.ndarray) -> Any:
    assume(x.size > 1)
    return np.repeat(x, 2)[::2]


def misaligned(x: np.ndarray) -> Any:
    assume(x.size > 0 and x.itemsize > 1)
    return np.frombuffer(bytearray(b"0" + x.tobytes()), np.uint8)[1:].view(x.dtype)


def other_dtype(x: np.ndarray, draw: st.DrawFn) -> Any:
    return np.zeros(x.shape, np.dtype(draw(st.sampled_from(OTHER_DTYPES))))


def triple(x: np.ndarray, draw: st.DrawFn) -> Any:
    """Memory by its address, with something wrong about it."""
    good = (x.ctypes.data, x.size, x.dtype.name)
    return draw(
        st.sampled_from(
            [
                (0, x.size + 1, good[2]),
                (-8, *good[1:]),
                (2**70, *good[1:]),
                (good[0], -1, good[2]),
                (good[0], 2**70, good[2]),
                (good[0], x.size + 2, good[2]),
                (*good[:2], "float8"),
                (*good[:2], None),
                (float(good[0]), *good[1:]),
                good[:2],
            ]
        )
    )


BAD_TENSORS: dict[str, Callable[[np.ndarray, st.DrawFn], Any]] = {
    "strided": lambda x, draw: strided(x),
    "misaligned": lambda x, draw: misaligned(x),
    "other dtype": other_dtype,
    "longer": lambda x, draw: np.zeros(x.size + 2, x.dtype),
    "triple": triple,
    "nothing": lambda x, draw: None,
    "text": lambda x, draw: "float32",
    "number": lambda x, draw: 3.0,
    "nested": lambda x, draw: [x],
}
BAD_ROLES: dict[str, Callable[[list[np.ndarray]], Any]] = {
    "one more": lambda role: [*role, role[0]],
    "one less": lambda role: role[:-1],
    "no sequence": lambda role: 7,
    "an array": lambda role: np.zeros((len(role), 2), np.float32),
    "text": lambda role: "mu",
    "a generator": iter,
}
BAD_NUMBERS = [np.nan, np.inf, -np.inf, "much", None, [], [[0.5]] * 7, 1j, 10**400, object()]


@examples
@given(calls(), st.data())
def test_a_bad_tensor_is_an_error_and_nothing_is_written(call: Call, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name, role in call.roles.items() if role] or [""]))
    assume(name)
    role = list(call.roles[name])
    kind = data.draw(st.sampled_from(sorted(BAD_TENSORS)))
    index = data.draw(st.integers(0, len(role) - 1))
    # The first role of a call without others to compare it with may be longer.
    assume(kind not in ("longer", "triple") or len([r for r in call.roles.values() if r]) > 1)
    role[index] = BAD_TENSORS[kind](role[index], data.draw)
    refused(call, {name: role})


@examples
@given(calls(), st.data())
def test_a_bad_role_is_an_error_and_nothing_is_written(call: Call, data: st.DataObject) -> None:
    filled = [name for name, role in call.roles.items() if role]
    assume(len(filled) > 1)
    name = data.draw(st.sampled_from(filled))
    kind = data.draw(st.sampled_from(sorted(BAD_ROLES)))
    refused(call, {name: BAD_ROLES[kind](list(call.roles[name]))})


@examples
@given(calls(), st.data())
def test_memory_that_is_written_twice_is_an_error(call: Call, data: st.DataObject) -> None:
    tensors = [(n, i) for n, role in call.roles.items() for i in range(len(role or ()))]
    full = [(n, i) for n, i in tensors if call.roles[n][i].size]
    written = [place for place in full if place[0] in call.written - {"gradients"}]
    assume(written and len(full) > 1)
    one, i = data.draw(st.sampled_from(written))
    other, j = data.draw(st.sampled_from([place for place in full if place != (one, i)]))
    assume({one, other} != {"gradients", "updates"})
    x, y = call.roles[one][i], call.roles[other][j]
    # Bytes of both, of which some are shared.
    both = np.zeros(2 * (x.nbytes + y.nbytes), np.uint8)
    shift = data.draw(st.integers(0, x.nbytes - 1)) // y.itemsize * y.itemsize
    changed = {one: list(call.roles[one])}
    changed.setdefault(other, list(call.roles[other]))
    changed[one][i] = both[: x.nbytes].view(x.dtype)
    changed[other][j] = both[shift : shift + y.nbytes].view(y.dtype)
    refused(call, changed)


@examples
@given(calls(), st.data())
def test_a_bad_number_is_an_error_and_nothing_is_written(call: Call, data: st.DataObject) -> None:
    name = data.draw(
        st.sampled_from(sorted(call.numbers.keys() - {"scale_decay"}))
    )  # a truth value
    value = data.draw(st.sampled_from(BAD_NUMBERS))
    # `c` is what the reader of a sum wants it to be, None leaves the mean out.
    assume(name != "c" or not isinstance(value, float))
    assume(not (name == "mean_magnitude" and value is None))
    assume(not (value == [] and not any(call.roles.values())))  # one for each of no tensors
    refused(call, {name: value})


def refused(call: Call, changed: dict[str, Any]) -> None:
    before = [x.tobytes() for x in call.arrays()]
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**changed)
    assert str(caught.value)
    assert [x.tobytes() for x in call.arrays()] == before


# ---- the XLA door --------------------------------------------------------------------------

compiled = settings(max_examples=20, suppress_health_check=list(HealthCheck))
SHAPES = st.lists(st.lists(st.integers(0, 6), max_size=3).map(tuple), min_size=1, max_size=3)


@compiled
@given(SHAPES, st.data())
def test_xla_tier2_equals_the_numpy_door(
    shapes: list[tuple[int, ...]], data: st.DataObject
) -> None:
    rng = np.random.default_rng(0)
    dtypes = [data.draw(st.sampled_from(FLOATS)) for _ in shapes]
    wide = [[jnp.asarray(rng.normal(size=s), "float32") for s in shapes] for _ in range(4)]
    g = [x.astype(d) for x, d in zip(wide[0], dtypes, strict=True)]
    mu, long, nu = wide[1], wide[2], [jnp.abs(x) for x in wide[3]]
    has_long = data.draw(st.booleans())
    numbers = {"b1": 0.5, "b2": 0.25, "eps": 0.125}  # what float32 holds
    extra = {"blend": 0.5, "b1_long": 0.75} if has_long else {}
    step = jax.jit(lambda g, mu, nu, long: xla.tier2(g, mu, nu, mu_long=long, **numbers, **extra))
    found = step(g, mu, nu, long if has_long else None)
    host = [[np.array(x) for x in role] for role in (g, mu, nu, long)]
    updates = [np.empty_like(x) for x in host[0]]
    roles = {"mu_long": host[3] if has_long else None, "updates": updates}
    _kernel.tier2(None, *host[:3], learning_rate=-1.0, **roles, **numbers, **extra)
    for theirs, ours in zip(found, (updates, host[1], roles["mu_long"], host[2]), strict=True):
        assert [np.asarray(x).tobytes() for x in theirs or ()] == [x.tobytes() for x in ours or ()]


class Raw(NamedTuple):
    """A handler called without the wrappers: operands, results, aliases and attributes that fit."""

    operands: list[tuple[tuple[int, ...], str]]
    results: list[tuple[tuple[int, ...], str]]
    aliases: dict[int, int]
    attributes: dict[str, Any]
    any_length: bool = False
    """There is nothing that the length of its operand must fit."""


F, U8 = "float32", "uint8"
STEP = {"has_long": False, "has_parameters": False, "denominator": "root"}
CODES = {"block": np.int64(4), "bits": np.int32(4)}
RAW = {
    "tier2": Raw(
        [((1, 9), F), ((8,), F), ((8,), F), ((8,), F)], [((8,), F)] * 3, {2: 1, 3: 2}, STEP
    ),
    "tier2_quantized": Raw(
        [((1, 9), F), ((8,), F), ((4,), U8), ((2,), F), ((8,), F)],
        [((8,), F), ((4,), U8), ((2,), F), ((8,), F)],
        {2: 1, 3: 2, 4: 3},
        {**STEP, **CODES, "start_at_gradient": False},
    ),
    "tier1": Raw(
        [((1, 4), F), ((1,), F), ((8,), F)],
        [((1,), F), ((8,), F)],
        {},
        {"scale_decay": False, "has_parameters": False},
    ),
    "statistics": Raw([((8,), F)], [((1, 4), F)], {}, {}, any_length=True),
    "sums": Raw([((), F), ((8,), F), ((8,), F)], [((1, 2), F)], {}, {"kind": "residual"}),
    "quantize": Raw(
        [((1, 2), "uint32"), ((8,), F)], [((4,), U8), ((2,), F)], {}, {**CODES, "stochastic": False}
    ),
    "dequantize": Raw([((4,), U8), ((2,), F)], [((8,), F)], {}, CODES),
}
WRONG = {
    "kind": ["", "moments", "median"],
    "bits": [0, 5, 8],
    "block": [-1, 0, 1],
    "denominator": ["", "none", "sqrt"],
    "has_long": [True],
    "has_parameters": [True],
}


def call_raw(name: str, raw: Raw) -> Any:
    results = [jax.ShapeDtypeStruct(*spec) for spec in raw.results]
    call = jax.ffi.ffi_call(f"chainrule_{name}", results, input_output_aliases=raw.aliases)
    return jax.block_until_ready(
        call(*(jnp.zeros(*spec) for spec in raw.operands), **raw.attributes)
    )


@pytest.mark.parametrize("name", RAW)
def test_a_handler_takes_what_fits(name: str) -> None:
    call_raw(name, RAW[name])


@pytest.mark.parametrize("name", RAW)
def test_a_handler_refuses_what_does_not_fit(name: str) -> None:
    """It would read or write beyond an end."""
    raw = RAW[name]
    bad = []
    for attribute in WRONG.keys() & raw.attributes.keys():
        kind = type(raw.attributes[attribute])
        bad += [
            raw._replace(attributes={**raw.attributes, attribute: kind(value)})
            for value in WRONG[attribute]
        ]
    for i, (shape, dtype) in enumerate(raw.operands):
        # An operand that a result shares its memory with has the result's shape and dtype, as XLA sees to.
        longer = [] if raw.any_length else [(tuple(n + 3 for n in shape) or (3,), dtype)]
        for spec in (*longer, (shape, "int8")):
            changed = [spec if j == i else old for j, old in enumerate(raw.operands)]
            twin = raw.aliases.get(i)
            results = [spec if j == twin else old for j, old in enumerate(raw.results)]
            bad.append(raw._replace(operands=changed, results=results))
    for i, (shape, dtype) in enumerate(raw.results):
        if i not in raw.aliases.values():
            for spec in ((tuple(n + 3 for n in shape), dtype), (shape, "int8")):
                results = [spec if j == i else old for j, old in enumerate(raw.results)]
                bad.append(raw._replace(results=results))
    for wrong in bad:
        with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID_ARGUMENT"):
            call_raw(name, wrong)


@pytest.mark.parametrize(
    ("name", "operands", "attributes", "message"),
    [
        ("tier2", {2: ((9,), F)}, {}, r"mu\[0\]: must be of 8 elements, got 9"),
        ("tier2", {0: ((1, 8), F)}, {}, "columns of the table: must be 9, got 8"),
        ("tier2", {0: ((2, 9), F)}, {}, "operands|results"),
        ("tier2", {1: ((8,), "int8")}, {}, r"gradients\[0\]: must be float32, .*, got S8; cast it"),
        ("tier2", {2: ((8,), U8)}, {}, r"mu\[0\]: must be float32, bfloat16 or float16, got uint8"),
        ("tier2", {}, {"denominator": "sqrt"}, "denominator: must be one of root, .*, got 'sqrt'"),
        ("tier2", {}, {"denominator": "none"}, "number of operands: must be 2, got 3"),
        ("tier2_quantized", {3: ((1,), F)}, {}, r"mu_scales\[0\]: must be of 2 elements, got 1"),
        ("tier1", {1: ((2,), F)}, {}, "number of magnitudes: must be 1, got 2"),
        ("sums", {2: ((7,), F)}, {}, r"ys\[0\]: must be of 8 elements, got 7"),
        ("sums", {}, {"kind": "median"}, "kind: must be one of moments, .*, got 'median'"),
        ("quantize", {}, {"bits": np.int32(5)}, "bits: must be 4 or 8, got 5"),
        ("dequantize", {}, {"block": np.int64(0)}, "block: must be at least 1, got 0"),
    ],
)
def test_a_handler_says_what_does_not_fit(
    name: str, operands: dict[int, Any], attributes: dict[str, Any], message: str
) -> None:
    """In the words of the NumPy door."""
    raw = RAW[name]
    results = list(raw.results)
    for i in operands.keys() & raw.aliases.keys():
        results[raw.aliases[i]] = operands[i]
    changed = [operands.get(i, spec) for i, spec in enumerate(raw.operands)]
    given = {**raw.attributes, **attributes}
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"chainrule: ({message})"):
        call_raw(name, raw._replace(operands=changed, results=results, attributes=given))
