"""The site and the README: every block of code is run, every command parsed, every public name is in the reference."""

import importlib
import importlib.util
import logging
import os
import pathlib
import re
import shlex
import sys
import tomllib

import optax
import pytest
import typer

from chainrule import chains, cli
from chainrule.catalogue import entry

ROOT = pathlib.Path(__file__).parent.parent
OWN_TESTS = (
    "keras",
    "three-frameworks",
    "torch",
)  # tests/bridges/test_docs.py, tests/bridges/keras/test_docs.py
DOCS = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "guide").glob("*.md")]
PAGES = [*sorted(path for path in DOCS if path.stem not in OWN_TESTS), ROOT / "README.md"]
BLOCK = re.compile(r"^( *)```(\S*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(path, *languages):
    return [text for _, language, text in BLOCK.findall(path.read_text()) if language in languages]


@pytest.fixture
def quiet_log():
    logger = logging.getLogger("chainrule")
    handlers, level = list(logger.handlers), logger.level
    yield
    logger.handlers[:], logger.level = handlers, level


def needs_torch(value, needed):
    """A parameter of a test that is skipped without torch if it needs torch."""
    absent = needed and not importlib.util.find_spec("torch")
    return pytest.param(value, marks=pytest.mark.skipif(absent, reason="it needs torch"))


@pytest.mark.parametrize(
    "path",
    [
        needs_torch(p, "torch" in "".join(blocks(p, "python")).lower())
        for p in PAGES
        if blocks(p, "python")
    ],
    ids=lambda p: p.stem,
)
def test_the_blocks_of_a_page_are_one_program(path, quiet_log, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks(path, "python")), str(path), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_block_says_what_it_is(path):
    languages = {language for _, language, _ in BLOCK.findall(path.read_text())}
    assert languages <= {"python", "text", "{toctree}"}, languages
    assert not re.search(r"^    (from|import) ", path.read_text(), re.MULTILINE), (
        "code that no test runs"
    )


def commands():
    """Every command of the package and of make in a block or in backquotes, with its page."""
    for path in [*DOCS, ROOT / "README.md"]:
        text = path.read_text()
        found = re.findall(r"`((?:chainrule|make) [^`]*)`", text)
        for block in blocks(path, "text"):
            found += [
                line for line in block.splitlines() if line.startswith(("chainrule ", "make "))
            ]
        yield from ((path.stem, " ".join(command.split())) for command in found)


@pytest.mark.parametrize(("page", "command"), sorted(set(commands())))
def test_a_command_of_a_page_is_one(page, command):
    name, *words = shlex.split(command, comments=True)
    if name == "make":
        targets = {word for word in words if "=" not in word}
        assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    elif "NAME" not in words and len(words) > 1 and "..." not in words:
        commands = typer.main.get_command(cli.app).commands
        commands[words[0]].make_context(words[0], words[1:])
    else:
        assert words[0] in typer.main.get_command(cli.app).commands


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_an_extra_of_a_page_is_one(path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"pip install \"?(?:\.|chainrule)\[([^\]]*)\]", path.read_text()):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_the_calls_beside_the_originals_are_calls():
    made = 0
    for page in ("migrate-adamw", "from-originals", "from-torch-muon"):
        text = (ROOT / "docs" / "guide" / f"{page}.md").read_text()
        for call in re.findall(r"\| `(chains\.[^|]*\))` \|$", text, re.MULTILINE):
            assert hasattr(eval(call, {"chains": chains, "optax": optax}), "update"), call
            made += 1
    assert made >= 20


@pytest.fixture(scope="module")
def made():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        yield importlib.import_module("made")
    finally:
        sys.path.remove(str(ROOT / "docs"))


@pytest.mark.parametrize(
    "module",
    [
        needs_torch(module, module == "chainrule.torch_optimizers")
        for module in ("chainrule.chains", "chainrule.transforms", "chainrule.torch_optimizers")
    ],
)
def test_every_public_name_is_in_the_reference(module, made):
    assert module in made.MODULES
    page = made._page(module, "")
    for name in importlib.import_module(module).__all__:
        assert re.search(
            rf"^:+{{py:(class|function|data)}} {re.escape(module)}\.{name}\b", page, re.MULTILINE
        ), name


def test_every_public_module_is_in_the_reference(made):
    """A module of the package with `__all__` that is neither there nor a room's inside is forgotten."""
    package = ROOT / "src" / "chainrule"
    rooms = {p.name for p in package.iterdir() if p.is_symlink()} - {"chains", "transforms"}
    found = {
        f"chainrule.{path.relative_to(package).with_suffix('')}".replace(os.sep, ".").removesuffix(
            ".__init__"
        )
        for path in [*package.glob("*.py"), *package.glob("*/__init__.py")]
        if "\n__all__ = [" in path.read_text() and path.parent.name not in rooms
    }
    assert {name.replace("chainrule.__init__", "chainrule") for name in found} == set(made.MODULES)


def test_the_readme_says_of_a_method_what_is_computed():
    """Bytes of state, and the verdict of the first claim about the method in the report."""
    readme = (ROOT / "README.md").read_text()
    report = (ROOT / "benchmarks" / "evidence" / "results" / "REPORT.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \| (\d+) \| ([^|]*) \|", readme, re.MULTILINE)
    assert [name for name, *_ in rows] == sorted(
        chains.__all__, key=[name for name, *_ in rows].index
    )
    for name, size, evidence in rows:
        assert entry(name).state_bytes.parameter == int(size), name
        if evidence:
            experiment, verdict = evidence.split(" ", 1)
            word = name.replace("muon", "muon over adamw")
            claims = [line for line in report.splitlines() if line.startswith(f"| [{experiment}]")]
            claim = next(line for line in claims if re.search(rf"\b{word}\b", line))
            assert f"**{verdict}**" in claim, name
    assert len(readme.splitlines()) <= 150
