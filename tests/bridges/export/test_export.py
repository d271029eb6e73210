"""Exported files: equal to the bridge to the bit, for other lists of parameters than any that was traced."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from chainrule.bridges.export import CannotExport, export
from exported import ALIKE, OTHER_SHAPES, SHAPES, check, check_style, exported, load, without_kernel
from optax_cases import NAMED, OptaxCase
from registry import CHAINS, Case

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),  # optax's own
    pytest.mark.filterwarnings("ignore:export. this chain tells parameters apart by name"),
]

REFUSED = {
    "cosmic": "tiered_state moves parameters between tiers",
    "magma, around a direction": "`exclude` function _is_scale matches none",
    "optax.adafactor": "this chain has no one program",
    "optax.lbfgs": "evaluates the loss by itself",
    "optax.sm3": "this chain has no one program",
    "optax.contrib.dpsgd": "this chain has no one program",
    "optax.contrib.galore": "scale_by_galore",
    "optax.contrib.sophia": "evaluates the loss by itself",
}
"""By case how the message says why no file can hold it."""
POWERS = {"optax.contrib.madgrad"}
"""torch's powers are other ones at the end of a tensor than in its vectors: parts would differ in the last bit."""
MATRICES = ((96, 96), (448, 500), (400, 1700), (3, 100, 130), (2, 390, 391), (5,))
"""On either side of where Newton-Schulz takes other products."""
QUICK = {"stam", "optax.adamw"}


def cases() -> list[Any]:
    """Every second of optax's is for `make long`."""
    slow, long = pytest.mark.slow, [pytest.mark.slow, pytest.mark.long]
    all_cases = [*((case, slow) for case in CHAINS), *zip(NAMED, itertools.cycle([slow, long]))]
    return [
        pytest.param(case, id=case.name, marks=[] if case.name in QUICK else marks)
        for case, marks in all_cases
    ]


@pytest.mark.parametrize("case", cases())
def test_a_file_goes_the_way_of_the_bridge(
    case: Case | OptaxCase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_kernel(monkeypatch)
    if case.name in REFUSED:
        with pytest.raises(CannotExport, match=REFUSED[case.name]):
            export(case.make(), "float32", tmp_path / "exported.py")
        return
    cls = exported(case.make(), tmp_path, parts=case.name not in POWERS)
    for shapes in (SHAPES, OTHER_SHAPES):
        check(case.make(), cls, shapes)
    whole = load(tmp_path / "exported.py").Exported
    check(case.make(), whole, ALIKE)
    if "newton_schulz_steps" in (tmp_path / "exported.py").read_text():
        check(case.make(), whole, MATRICES, steps=2)


@pytest.mark.slow
def test_ruff_and_pyright_find_nothing_in_the_file_of_any_chain(tmp_path: Path) -> None:
    taken = [case for case in CHAINS if case.name not in REFUSED]
    for number, case in enumerate(taken):
        export(case.make(), "float32", tmp_path / f"file_{number}.py")
    assert len(taken) >= 10
    check_style(tmp_path)


def test_how_many_of_the_named_optimizers_are_exported() -> None:
    assert len([case for case in NAMED if case.name not in REFUSED]) >= 40
