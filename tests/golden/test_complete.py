"""Every recorded variant is a parameter of some test of this folder, or listed with a reason."""

import importlib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.golden.not_followed import NOT_FOLLOWED, reason_not_to_follow
from tests.golden.replay import FOLDER, Case, recording

pytest.importorskip("torch", reason="some of the files that follow recordings need it")
MODULES = sorted(
    path.stem for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_complete"
)
RECORDINGS = sorted(path.stem for path in FOLDER.glob("*.npz"))


def followed() -> set[Case]:
    """The cases that the tests of this folder are parametrised over."""
    found = set()
    for name in MODULES:
        for test in vars(importlib.import_module(f"tests.golden.{name}")).values():
            marks = [m for m in getattr(test, "pytestmark", ()) if m.name == "parametrize"]
            given = [value for mark in marks for value in mark.args[1]]
            found |= {x for value in given for x in getattr(value, "values", ()) if type(x) is Case}
    return found


FOLLOWED = followed()


def missed(name: str, followed: set[Case]) -> list[str]:
    """The variants of a file that are neither followed nor listed."""
    return [
        variant
        for variant in recording(name).followable
        if Case(name, variant) not in followed and reason_not_to_follow(name, variant) is None
    ]


@pytest.mark.parametrize("name", RECORDINGS)
def test_every_variant_is_followed_or_listed(name):
    assert recording(name).followable
    assert missed(name, FOLLOWED) == []


@pytest.mark.parametrize("name", RECORDINGS)
def test_a_variant_that_no_test_follows_any_more_is_missed(name):
    dropped = next(case for case in sorted(FOLLOWED) if case.recording == name)
    assert missed(name, FOLLOWED - {dropped}) == [dropped.variant]


@pytest.mark.parametrize("row", NOT_FOLLOWED, ids=lambda row: f"{row.file}-{row.variant}")
def test_every_row_matches_a_variant_and_has_a_reason(row):
    matching = [
        Case(file, variant)
        for file in RECORDINGS
        for variant in recording(file).followable
        if fnmatch(file, row.file) and fnmatch(variant, row.variant)
    ]
    assert matching and not FOLLOWED & set(matching)
    assert len(row.reason) > 20
