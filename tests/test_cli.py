"""The `chainrule` command, run as a user runs it."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

import chainrule
from chainrule import chains, transforms
from chainrule.catalogue import atoms, entry
from chainrule.cli import BENCHES, main
from chainrule.pictures import links_of
from registry import ATOMS

SVG = "{http://www.w3.org/2000/svg}"


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
        ["list", "--help"],
        ["bench", "--help"],
        ["doctor", "--help"],
    ],
)
def test_help(arguments, capsys):
    assert main(arguments) == 0
    assert "Usage: chainrule" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "wanted"), [("chainrule sh", "show"), ("chainrule show orth", "orthograd")]
)
def test_a_shell_completes_commands_and_names(words, wanted):
    asked = {"_CHAINRULE_COMPLETE": "complete_bash", "COMP_WORDS": words}
    asked["COMP_CWORD"] = str(words.count(" "))
    command = [sys.executable, "-m", "chainrule"]
    result = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | asked, check=False
    )
    assert wanted in result.stdout.split(), result.stderr


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
    live, fixed, size, source, presets = capsys.readouterr().out.split("\n\n")[2:]
    assert ["b1_base", "0.9", "[0.5,", "1)"] in [line.split() for line in live.splitlines()]
    assert ["debias", "True"] in [line.split() for line in fixed.splitlines()]
    shown = [line.split() for line in presets.splitlines()]
    assert ["original", "debias", "False", "in", "place", "of", "True"] in shown
    assert ["debias_eps", "`eps`", "in", "place", "of", "0.0"] in shown
    assert size.splitlines()[1].startswith("  8 a parameter") and "stam-optimizer" in source


@pytest.mark.parametrize("name", atoms())
def test_show_knows_all_of_an_atom(name):
    known = entry(f"transforms.{name}")
    assert known.equations and known.source and known.summary.endswith(".")
    assert all(argument.meaning for argument in known.arguments)


def test_every_atom_of_the_registry_is_listed(capsys):
    assert main(["list", "--json"]) == 0
    listed = {(e["kind"], e["name"]) for e in json.loads(capsys.readouterr().out)}
    public = {case.public for case in ATOMS} - {transforms.chain, transforms.named_chain}
    assert listed == {("atom", f.__name__) for f in public} | {("chain", n) for n in chains.__all__}


def test_show_prints_an_atom(capsys):
    assert main(["show", "adaptive_beta1"]) == 0
    shown = capsys.readouterr().out
    assert "z = sigma / (tau^2 + 1e-8)" in shown
    assert "adapt_strength       0.2                 [0, 0.5]" in shown
    assert "the STAM repository, version 0.1.0" in shown


@pytest.mark.parametrize("name", ["adam", "stam", "muon", "stam_lite", "grokfast"])
def test_bytes_of_state_are_those_of_a_state(name):
    """The three numbers give the size for lists of matrices that they were not solved from."""
    params = {str(i): np.zeros((8, 96), np.float32) for i in range(5)}
    factory = getattr(chains, name)
    tx = factory(chains.adam()) if name == "grokfast" else factory()
    size = entry(name).state_bytes
    expected = size.parameter * 5 * 8 * 96 + size.tensor * 5 + size.once
    assert transforms.state_bytes(tx.init(params)) == expected


@pytest.mark.parametrize("name", [*chains.__all__, *(f"transforms.{name}" for name in atoms())])
def test_a_picture_has_every_link(name, capsys):
    """Every row of the chain's table that names one atom is the equation of a link of the code."""
    assert main(["show", name, "--svg"]) == 0
    texts = [
        node.text for node in ElementTree.fromstring(capsys.readouterr().out).iter(f"{SVG}text")
    ]
    for link, atom, equation in entry(name).links:
        # COSMIC's tiers are one link of the code; so are Magma's decay and rate.
        if "any chain" not in atom and not link.startswith("tier") and name != "magma":
            assert equation in texts


def test_a_picture_says_which_moments_a_link_keeps_here():
    kept = {link.name: dict(link.lines).get("k") for link in links_of("stam")}
    assert kept["adaptive_beta1"] == "keeps mu" and kept["scale_by_adam"] == "keeps nu"
    assert dict(links_of("casmo")[1].lines)["r"].startswith("reads mu, nu")


def test_doctor_names_what_is_there_and_what_is_missing(capsys, monkeypatch):
    version = importlib.metadata.version

    def without_keras(name):
        if name == "keras":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_keras)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert ["jax", version("jax")] in [line.split() for line in shown.splitlines()]
    assert "a jitted step works\n  yes" in shown
    assert 'pip install "chainrule[keras]"' in shown


def test_bench_runs_a_script_of_the_source_tree(capsys):
    assert main(["bench"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(BENCHES)
    result = run("bench", "jax", "--help")
    if "site-packages" in chainrule.__file__:  # not installed from here: a wheel has no benchmarks
        assert result.returncode == 1 and "source" in result.stderr
    else:
        assert result.returncode == 0 and "--list" in result.stdout


def test_the_site_holds_the_tables_of_links(capsys):
    assert main(["show", "--markdown"]) == 0
    page = pathlib.Path(__file__).parent.parent / "docs" / "chains.md"
    assert capsys.readouterr().out.strip() in page.read_text(), (
        "docs/chains.md: replace the tables of links by the output of `chainrule show --markdown`"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["show", "adan"], "no chain or atom 'adan'; did you mean 'adam'?"),
        (["bench", "tpu"], "No such command 'tpu'"),
        (["show", "stam", "--json", "--svg"], "--json and --svg exclude each other"),
        (["demo", "--seeds", "0"], "'--seeds'"),
        (["plan", "chains.stam()", "gpt2-small", "--bandwidth", "0"], "greater than 0, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.mark.slow
def test_demo_runs_with_the_base_dependencies_and_says_what_to_install(tmp_path):
    """Digits of a font in the place of scikit-learn's, and no figure; every chain learns them."""
    absent = dict.fromkeys(("sklearn", "matplotlib", "equinox", "statsmodels"))
    arguments = ["demo", "--quick", "--epochs", "8", "--json", "numbers.json"]
    code = f"import sys; sys.modules.update({absent}); from chainrule.cli import main; main({arguments})"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.replace("\n", " ").count('pip install "chainrule[demo]"') == 2
    assert [path.name for path in tmp_path.iterdir()] == ["numbers.json"]
    for found in json.loads((tmp_path / "numbers.json").read_text())["runs"]:
        assert min(found["accuracy"]) > 0.5, found["name"]


def test_evidence_without_its_extra_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    assert main(["evidence", "E7"]) == 1
    assert 'pip install "chainrule[evidence]"' in capsys.readouterr().err


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
    for found in runs:
        assert found["name"] in result.stdout
        assert min(found["accuracy"]) > 0.5, found["name"]
        assert found["state_bytes"] > 0
        assert (found["differs"] == "") == (found["name"] == "optax.adamw")
