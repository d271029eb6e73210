"""Every numeric argument has bounds, and a value outside them, or a wrong choice, is a clear error."""

import inspect
import math

import pytest

import chainrule
from chainrule.transforms._checks import BOUNDS
from harness import random_tree
from registry import CASES, CHAINS, every_case


def numeric_arguments(function):
    def numeric(default):
        return isinstance(default, (int, float)) and not isinstance(default, bool)

    parameters = inspect.signature(function).parameters.values()
    optional = [p.name for p in parameters if p.default is None and p.name in BOUNDS]
    return [p.name for p in parameters if numeric(p.default)] + optional


def outside(bounds):
    """Values just outside an interval, and NaN."""
    values = [math.nan]
    if math.isfinite(bounds.low):
        values.append(bounds.low if bounds.open_low else bounds.low - 0.25)
    if bounds.open_high or math.isfinite(bounds.high):
        values.append(bounds.high if bounds.open_high else bounds.high + 0.25)
    return values


@every_case
def test_every_numeric_argument_has_bounds(case):
    without = {name for name in numeric_arguments(case.public) if name not in BOUNDS}
    assert without == set(case.unbounded), f"put {without} into BOUNDS, or into Case.unbounded"


@every_case
def test_a_number_out_of_bounds_is_an_error_at_construction(case):
    for name in set(numeric_arguments(case.public)) & set(BOUNDS):
        for value in outside(BOUNDS[name]):
            with pytest.raises(ValueError, match=rf"\w+: `{name}` must be .*, got"):
                case.make({**case.settings[0], name: value})


@pytest.mark.parametrize("case", CHAINS, ids=[case.name for case in CHAINS])
def test_a_number_out_of_bounds_cannot_be_set(case):
    state = case.make().init(random_tree(case.shapes, 0))
    for name in set(chainrule.hyperparams(state)) & set(BOUNDS):
        for value in outside(BOUNDS[name]):
            with pytest.raises(ValueError, match=rf"set_hyperparams: `{name}` must be in .*, got"):
                chainrule.set_hyperparams(state, **{name: value})


@pytest.mark.parametrize(
    ("case", "setting", "error", "message"),
    [
        pytest.param(case, *error, id=f"{case.name}-{index}")
        for case in CASES
        for index, error in enumerate(case.errors)
    ],
)
def test_other_bad_arguments_are_errors(case, setting, error, message):
    with pytest.raises(error, match=message):
        case.make(setting).init(random_tree(case.shapes, 0))


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name) for case in CASES if case.alone is not None],
)
def test_a_missing_input_is_named_with_its_remedies(case):
    params = random_tree(case.shapes, 0)
    tx = case.alone()
    with pytest.raises(ValueError, match=case.missing):
        tx.update(random_tree(case.shapes, 1), tx.init(params), params)
