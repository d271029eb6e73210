"""The README's step times are those that its commands last kept with `--json`."""

import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "speed" / "results"
README = (ROOT / "README.md").read_text()
NAMES = {
    "torch's own AdamW, tensor by tensor": "torch loop",
    "chains.magma(optax.adamw(...)), compiled": "chains.magma(adamw), compiled",
    "magma": "chains.magma(adamw)",
}
"""Rows of the README -> what the benchmark calls them, where that is another name."""


def kept(benchmark: str, table: str) -> dict[str, dict[str, object]]:
    found = json.loads((RESULTS / f"{benchmark}.json").read_text())
    return {row["name"]: row for row in found[table]["rows"]}


def rows(header: str) -> list[list[str]]:
    """The cells of the table that has this header."""
    lines = README[README.index(header) :].splitlines()
    table = lines[2 : next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table
    ]


@pytest.mark.parametrize("cells", rows("| step | against |"), ids=lambda cells: cells[0])
def test_steps_of_the_torch_bridge(cells):
    name, against, *ratios = cells
    for table, ratio in zip(("gpt", "small"), ratios, strict=True):
        group = "adamw" if "optax.adamw," in name or "torch's" in name else "chains"
        row = kept("torch", f"{group}-{table}")[NAMES.get(name, name)]
        assert (f"{row['ratio']:.2f}", row["against"]) == (ratio, f"torch {against}")


@pytest.mark.parametrize("cells", rows("| method | source |"), ids=lambda cells: cells[0])
def test_steps_of_chains_in_jax(cells):
    name, ratios = NAMES.get(cells[0], f"chains.{cells[0]}"), cells[-1].split(", ")
    for table, ratio in zip(("gpt", "small"), ratios, strict=ratios != [""]):
        row = kept("jax", table).get(name)
        assert ratio == ("" if row is None else f"{row['ratio']:.2f}")
