"""Step times in README and docs are those that their commands last kept with `--json`, losses those of the evidence."""

import json
import pathlib
import re

import pytest

from chainrule.evidence import conclusions

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "speed" / "results"
README = (ROOT / "README.md").read_text()
GPU = (ROOT / "docs" / "guide" / "gpu.md").read_text()
SCALING = (ROOT / "docs" / "scaling.md").read_text()
NAMES = {
    "torch's own AdamW, tensor by tensor": "torch loop",
    "chains.magma(optax.adamw(...)), compiled": "chains.magma(adamw), compiled",
    "magma": "chains.magma(adamw)",
}
"""Rows of the README -> what the benchmark calls them, where that is another name."""


def kept(benchmark: str, table: str) -> dict[str, dict[str, object]]:
    found = json.loads((RESULTS / f"{benchmark}.json").read_text())
    return {row["name"]: row for row in found[table]["rows"]}


def rows(header: str, text: str = README) -> list[list[str]]:
    """The cells of the table that has this header."""
    lines = text[text.index(header) :].splitlines()
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


def test_muon_in_bfloat16():
    text = README[README.index("`chains.muon` with bfloat16") :].partition(" A first")[0]
    names = [f"chains.muon, bf16, {way}" for way in ("compiled", "eager")]
    told = re.findall(r"\d\.\d\d", text)
    assert told == [f"{kept('torch', 'muon')[name]['ratio']:.2f}" for name in names]


def test_first_compiled_steps():
    text = README[README.index("A first\ncompiled step") :].partition(";")[0]
    found = kept("torch", "compilation")
    names = [
        f"{name}, gpt, {of}" for name in ("optax.adamw", "chains.stam") for of in ("cold", "warm")
    ]
    told = re.findall(r"(\d\.\d) s", text)
    assert told == [f"{float(str(found[name]['ms'])) / 1000:.1f}" for name in names]


def test_fused_steps_in_jax():
    text = README[README.index("`chainrule.fused(tx)`") :].partition("\n\n")[0]
    found = kept("jax", "fused-gpt")
    names = [f"{name}{way}" for name in ("optax.adamw", "chains.stam") for way in (", fused", "")]
    assert re.findall(r"\d\.\d\d", text) == [f"{found[name]['ratio']:.2f}" for name in names]


def two_digits(table: str, name: str) -> str:
    return f"{kept('sharded', table)[name]['ratio']:.2f}"


@pytest.mark.parametrize(
    "cells", rows("| a step on DTensors |", SCALING), ids=lambda cells: cells[0]
)
def test_steps_on_two_ranks(cells):
    name, large, small, least = cells
    table = re.sub(r"optax\.|\(.*|,.*", "", name)
    found = [two_digits(f"{table}-{of}", name) for of in ("gpt", "small")]
    told = two_digits(f"{table}-small", f"{name}, bare + all-reduces") if least else ""
    assert [*found, told] == [large, small, least]


def test_others_on_two_ranks():
    names = {"chains.muon, eager": "chains.muon, bf16, eager", "dion.Muon": "dion.Muon"}
    names["chains.muon, compiled"] = "chains.muon, bf16, compiled"
    found = rows("| Muon on DTensors |", SCALING)
    assert found == [[name, two_digits("muon-matrices", names[name])] for name, _ in found]
    fused = [two_digits(f"adamw-{of}", "torch fused AdamW") for of in ("gpt", "small")]
    assert f"fused AdamW takes {fused[0]} and {fused[1]} of" in SCALING


def on_a_gpu() -> dict[str, str]:
    records = json.loads((ROOT / "benchmarks" / "gpu-h200.json").read_text())
    timed = [record for record in records if "ms" in record]
    return {record["name"]: f"{record['ms']:.2f}, {record['ratio']:.2f}" for record in timed}


@pytest.mark.parametrize(
    ("header", "lists", "called"),
    [
        ("| a step, replayed |", ("gpt", "small", "1.3B"), "{}, replayed"),
        ("| a step of `chains.muon` |", ("matrices", "wide"), "chains.muon, {}"),
        ("| a compiled step in a graph |", ("gpt", "small"), "{}, compiled, graph"),
    ],
)
def test_steps_on_a_gpu(header, lists, called):
    names = {
        "chains.magma(optax.adamw(...))": called.format("chains.magma(adamw)"),
        "optax.adamw, gradients always elsewhere": "optax.adamw, replayed, copies",
        "torch's fused AdamW in a graph": "torch fused, graph",
    }
    found = on_a_gpu()
    for name, *cells in rows(header, GPU):
        short = name.replace("bfloat16 products", "bf16").replace("float32 products", "f32")
        benchmark = names.get(name, called.format(short))
        assert cells == [found.get(f"{of}: {benchmark}", "") for of in lists]


def test_losses_of_moments_in_codes():
    (path,) = (ROOT / "benchmarks" / "evidence" / "results").glob("E13-*.json")
    document = json.loads(path.read_text())
    text = (ROOT / "docs" / "guide" / "quantise-state.md").read_text()

    def told(arm: str) -> str:
        losses = conclusions.values(document, arm, "loss")
        assert len(losses) == 10
        return f"{losses.mean():.3f} ± {losses.std(ddof=1):.3f}"

    for name, *cells in rows("| moments of | float32 |", text):
        arms = [f"{name.lower()}{of}" for of in ("", ", 8 bits", ", 4 bits")]
        assert cells == [told(arm) for arm in arms]
    assert f"worse here ({told('adam, 4 bits, stochastic').split()[0]})" in text
