"""Every recorded variant is followed by a test module of this folder, or listed with a reason."""

import importlib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.golden.not_followed import NOT_FOLLOWED, reason_not_to_follow
from tests.golden.replay import FOLDER, recording

MODULES = sorted(
    path.stem for path in Path(__file__).parent.glob("test_*.py") if path.stem != "test_complete"
)
RECORDINGS = sorted(path.stem for path in FOLDER.glob("*.npz"))


def followed_files() -> set[str]:
    modules = [importlib.import_module(f"tests.golden.{name}") for name in MODULES]
    return {file for module in modules for file in module.FILES}


@pytest.mark.parametrize("name", RECORDINGS)
def test_followed_or_listed(name):
    listed = [v for v in recording(name).variants if reason_not_to_follow(name, v)]
    assert name in followed_files() or len(listed) == len(recording(name).variants) > 0


@pytest.mark.parametrize("row", NOT_FOLLOWED, ids=lambda row: f"{row.file}-{row.variant}")
def test_every_row_matches_a_variant_and_has_a_reason(row):
    variants = [(file, v) for file in RECORDINGS for v in recording(file).variants]
    assert any(fnmatch(file, row.file) and fnmatch(v, row.variant) for file, v in variants)
    assert len(row.reason) > 20
