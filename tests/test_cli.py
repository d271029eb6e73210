"""The `chainrule` command, run as a user runs it."""

import json
import subprocess
import sys

import pytest

import chainrule
from chainrule import chains


def run(*arguments, cwd=None):
    command = [sys.executable, "-m", "chainrule", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("arguments", [("--help",), ("demo", "--help"), ("show", "--help")])
def test_help(arguments):
    result = run(*arguments)
    assert result.returncode == 0
    assert result.stdout.startswith("usage: chainrule")


def test_version():
    assert run("--version").stdout == f"chainrule {chainrule.__version__}\n"


def test_show_lists_every_chain():
    listed = [line.split()[0] for line in run("show").stdout.splitlines()]
    assert listed == chains.__all__


@pytest.mark.parametrize("name", chains.__all__)
def test_show_prints_links_and_hyperparameters(name, capsys):
    from chainrule.cli import main

    assert main(["show", name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{name}: ")
    rows = [line for line in shown.splitlines() if line.startswith("|")]
    assert len(rows) >= 3, "the docstring holds no table of links"
    assert "live hyperparameters" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: command"),
        (("show", "sgdd"), "invalid choice: 'sgdd'"),
        (("demo", "--seeds", "0"), "must be at least 1, got 0"),
        (("demo", "--epochs", "-3"), "must be at least 1, got -3"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr


def test_demo_without_its_extra_says_what_to_install(capsys, monkeypatch):
    from chainrule.cli import main

    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["demo"]) == 1
    assert "pip install 'chainrule[demo]'" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_trains_every_chain(tmp_path):
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
    runs = json.loads((tmp_path / "numbers.json").read_text())["runs"]
    assert [run["name"].partition("(")[0] for run in runs] == ["optax.adamw", *chains.__all__]
    for entry in runs:
        assert entry["name"] in result.stdout
        assert min(entry["accuracy"]) > 0.5, entry["name"]
        assert entry["state_bytes"] > 0
