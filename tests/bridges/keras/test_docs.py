"""The blocks of docs/keras.md are one program that runs on each backend."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.keras

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "keras.md"


def test_the_page_runs(capsys):
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == PAGE.read_text().count("```") // 2  # no block is left out
    namespace = {"__name__": "docs"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    shown = capsys.readouterr().out
    assert "head/kernel" in shown and "give it once" in shown
    steps = {name: int(namespace[name].optimizer.iterations) for name in ("trained", "loaded")}
    assert steps == {"trained": 6, "loaded": 8}  # 64 rows in batches of 32: two an epoch


def test_three_frameworks_make_the_same_steps():
    page = PAGE.parent / "guide" / "three-frameworks.md"
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "docs"})


def test_each_original_class_is_called_as_the_table_says():
    calls = re.findall(r"^\| `[^`]+` \| `(optimizers\.[^`]+)` \|$", PAGE.read_text(), re.MULTILINE)
    assert len(calls) == 5
    from chainrule import keras_optimizers

    for call in calls:
        optimizer = eval(call, {"optimizers": keras_optimizers})
        assert type(optimizer).__name__ in call
