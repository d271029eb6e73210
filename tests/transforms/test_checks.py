"""Bounds and trees: what is refused, with which words, and what passes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainrule.transforms._checks import (
    BOUNDS,
    Interval,
    check_bounds,
    check_choice,
    check_params,
    require,
    require_params,
    zeros_like,
)

ANY = st.floats(allow_nan=True, allow_infinity=True)


@given(st.floats(-5, 5), st.floats(0, 5), st.booleans(), st.booleans(), ANY)
def test_an_interval_is_its_inequalities(low, width, open_low, open_high, x):
    high = low + width
    inside = (x > low if open_low else x >= low) and (x < high if open_high else x <= high)
    assert (x in Interval(low, high, open_low, open_high)) == inside


def test_an_interval_prints_as_in_mathematics():
    assert str(Interval(0, 1, open_high=True)) == "[0, 1)"
    assert str(Interval(0, math.inf, open_low=True, open_high=True)) == "(0, inf)"
    assert str(Interval(-math.inf, 0.5, open_low=True)) == "(-inf, 0.5]"


@pytest.mark.parametrize("name", BOUNDS)
def test_no_bounds_admit_nan_or_infinity(name):
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^owner: `{name}` must be in "):
            check_bounds("owner", **{name: value})


def test_an_unknown_name_takes_any_finite_number():
    check_bounds("owner", whatever=-1e30)
    with pytest.raises(ValueError, match=r"`whatever` must be in \(-inf, inf\), got nan"):
        check_bounds("owner", whatever=math.nan)


@pytest.mark.parametrize("number", [2, 2.0, np.float32(2), np.int64(2), np.array(2.0)], ids=repr)
def test_numbers_of_python_and_numpy_are_checked(number):
    with pytest.raises(ValueError, match=r"`b1` must be in \[0, 1\), got 2"):
        check_bounds("owner", b1=number)


def test_what_is_no_number_passes():
    check_bounds(
        "owner", b1=None, b2="auto", eps=True, decay=lambda count: 2.0, tau=jnp.float32(-1)
    )
    jax.jit(lambda b1: check_bounds("owner", b1=b1) or b1)(2.0)


def test_choices_are_listed():
    check_choice("owner", "kind", "a", ("a", None))
    with pytest.raises(ValueError, match=r"owner: `kind` must be one of 'a', None, got 'b'"):
        check_choice("owner", "kind", "b", ("a", None))


def test_parameters_of_other_dtypes_are_named_with_a_remedy():
    message = r"owner: parameter \['layer'\]\['ids'\] has dtype int32.*`optax.masked` or `optax.partition`"
    with pytest.raises(TypeError, match=message):
        check_params("owner", {"layer": {"ids": jnp.arange(3), "w": jnp.ones(2)}})
    check_params(
        "owner", {"half": jnp.ones(2, jnp.bfloat16), "complex": jnp.ones(2, jnp.complex64)}
    )
    with pytest.raises(TypeError, match="complex64, expected a real floating-point dtype"):
        check_params("owner", jnp.ones(2, jnp.complex64), real=True)


def test_zeros_like_keeps_or_takes_a_dtype():
    params = {"a": jnp.ones((2, 3), jnp.bfloat16), "hole": None, "masked": optax.MaskedNode()}
    assert zeros_like("owner", params)["a"].dtype == jnp.bfloat16
    assert zeros_like("owner", params, jnp.float32)["a"].dtype == jnp.float32
    assert jax.tree.structure(zeros_like("owner", params)) == jax.tree.structure(params)


def test_missing_inputs_are_named():
    assert require("owner", "mu", 1, "do this") == 1
    with pytest.raises(ValueError, match=r"owner: needs `mu`, which no earlier link.*; do this"):
        require("owner", "mu", None, "do this")
    with pytest.raises(
        ValueError, match=r"owner: needs the parameters; call `update\(updates, state"
    ):
        require_params("owner", None)
