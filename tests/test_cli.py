"""The `chainrule` command, run as a user runs it."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import chainrule
from chainrule import chains
from chainrule.cli import main


def run(*arguments, cwd=None):
    command = [sys.executable, "-m", "chainrule", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_runs_as_a_module():
    result = run("--version")
    assert (result.returncode, result.stdout) == (0, f"chainrule {chainrule.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["demo", "--help"],
        ["show", "--help"],
        ["evidence", "--help"],
        ["convert", "--help"],
    ],
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(arguments)
    assert capsys.readouterr().out.startswith("usage: chainrule")


def test_show_lists_every_chain(capsys):
    assert main(["show"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == chains.__all__


@pytest.mark.parametrize("name", chains.__all__)
def test_show_prints_links_and_hyperparameters(name, capsys):
    assert main(["show", name]) == 0
    sections = capsys.readouterr().out.split("\n\n")
    assert sections[0].startswith(f"{name}: ")
    title, *links = sections[1].splitlines()
    assert title == "links"
    assert len(links) >= 2, "the docstring has no table of links"


def test_show_names_defaults(capsys):
    assert main(["show", "stam"]) == 0
    live, fixed, presets = capsys.readouterr().out.split("\n\n")[2:]
    assert ["b1_base", "0.9"] in [line.split() for line in live.splitlines()]
    assert ["debias", "True"] in [line.split() for line in fixed.splitlines()]
    shown = [line.split() for line in presets.splitlines()]
    assert ["original", "debias", "False", "in", "place", "of", "True"] in shown
    assert ["debias_eps", "`eps`", "in", "place", "of", "0.0"] in shown


def test_readme_holds_the_tables_of_links(capsys):
    assert main(["show", "--markdown"]) == 0
    readme = pathlib.Path(__file__).parent.parent / "README.md"
    assert capsys.readouterr().out.strip() in readme.read_text(), (
        "README.md: replace the tables of links by the output of `chainrule show --markdown`"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: command"),
        (["show", "sgdd"], "invalid choice: 'sgdd'"),
        (["demo", "--seeds", "0"], "must be at least 1, got 0"),
        (["demo", "--epochs", "-3"], "must be at least 1, got -3"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_demo_without_its_extra_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 1
    assert "pip install 'chainrule[demo]'" in capsys.readouterr().err


def test_evidence_without_its_extra_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    assert main(["evidence", "E7"]) == 1
    assert "pip install 'chainrule[evidence]'" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_measures_mechanisms_and_trains_every_chain(tmp_path):
    result = run(
        "demo",
        "--quick",
        "--epochs",
        "8",
        "--out",
        "figure.png",
        "--json",
        "numbers.json",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    for mechanism in numbers["mechanisms"]:
        for name in mechanism.keys() - {"title"}:
            assert np.isfinite(mechanism[name]).all(), name
    casmo = numbers["mechanisms"][0]
    right, wrong = (np.mean(casmo[f"AGAR, {kind} labels"], 1) for kind in ("right", "wrong"))
    assert (right[1:4] > wrong[1:4]).all()  # while the network learns what labels have in common
    runs = numbers["runs"]
    assert [run["name"].partition("(")[0] for run in runs] == ["optax.adamw", *chains.__all__]
    for entry in runs:
        assert entry["name"] in result.stdout
        assert min(entry["accuracy"]) > 0.5, entry["name"]
        assert entry["state_bytes"] > 0
        assert (entry["differs"] == "") == (entry["name"] == "optax.adamw")
