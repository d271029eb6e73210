"""docs/torch.md, run as it stands."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "torch.md"


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="needs torch, which `make versions` leaves out")
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {"__name__": "page"})
    shown = capsys.readouterr().out
    assert (
        "0.weight  (50, 8)  adam   excluded" in shown
        and "1.weight  (8, 8)   muon   a matrix" in shown
    )
