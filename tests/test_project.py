"""The files around the code say what is true: citation, workflows, wheels, templates."""

import inspect
import pathlib
import re
import tomllib

import pytest

import chainrule
from chainrule import chains, transforms
from chainrule.catalogue import sections

yaml = pytest.importorskip("yaml", reason="flax brings it")
ROOT = pathlib.Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path):
    return yaml.safe_load(path.read_text())


def test_the_citation_is_of_this_version():
    citation = read(ROOT / "CITATION.cff")
    assert citation["version"] == chainrule.__version__
    released = f"## [{chainrule.__version__}] - {citation['date-released']}"
    assert released in (ROOT / "CHANGELOG.md").read_text().splitlines()
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert all(reference["url"].startswith("https://") for reference in citation["references"])


def test_the_citation_has_every_source_that_a_docstring_links_to():
    cited = {reference["url"] for reference in read(ROOT / "CITATION.cff")["references"]}
    for room in (chains, transforms):
        for name in room.__all__:
            references = sections(inspect.getdoc(getattr(room, name)) or "")[1].get(
                "References", ""
            )
            assert set(re.findall(r"https://[^\s,]+", references)) <= cited, name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_there_is(path):
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for job in read(path)["jobs"].values():
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step)
            tool, *words = step.get("run", "pipx").split()
            if tool == "make":
                assert words[0] in targets
            else:
                assert tool in ("git", "pipx") or (ROOT / tool).is_file(), tool


def test_the_matrix_begins_at_the_oldest_supported_versions():
    project = PYPROJECT["project"]
    rows = read(ROOT / ".github" / "workflows" / "checks.yml")["jobs"]["versions"]["strategy"][
        "matrix"
    ]["include"]
    assert f">={rows[0]['python']}" == project["requires-python"]
    oldest = dict(word.split("==") for word in rows[0]["with"].split())
    for name, version in oldest.items():
        [bound] = [
            d.partition(">=")[2] for d in project["dependencies"] if d.startswith(f"{name}>=")
        ]
        assert version in (bound, f"{bound}.0")


def test_wheels_are_built_for_every_python_that_is_classified():
    classified = {
        c.rpartition(" ")[2].replace(".", "")
        for c in PYPROJECT["project"]["classifiers"]
        if re.search(r":: 3\.\d+$", c)
    }
    built = {
        name.removeprefix("cp").removesuffix("-*")
        for name in PYPROJECT["tool"]["cibuildwheel"]["build"]
    }
    matrix = read(ROOT / ".github" / "workflows" / "checks.yml")["jobs"]["versions"]["strategy"][
        "matrix"
    ]["include"]
    assert built == classified == {row["python"].replace(".", "") for row in matrix}


def test_templates_and_hooks_parse():
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = read(path)
        assert form["name"] and form["description"]
        assert all(field["type"] in ("textarea", "input", "markdown") for field in form["body"])
    [repository] = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert {hook["entry"].split()[0] for hook in repository["hooks"]} <= {
        ".venv/bin/ruff",
        ".venv/bin/pyright",
    }


def test_on_windows_links_are_checked_out_as_links_and_the_kernel_is_left_out():
    """The first step comes before the checkout, and the setting is the one that CMakeLists.txt reads."""
    job = read(ROOT / ".github/workflows/wheels.yml")["jobs"]["wheels"]
    assert "windows-latest" in job["strategy"]["matrix"]["os"]
    assert job["steps"][0]["run"] == "git config --global core.symlinks true"
    (setting,) = PYPROJECT["tool"]["cibuildwheel"]["windows"]["config-settings"].items()
    name = setting[0].removeprefix("cmake.define.")
    assert setting[1] == "OFF" and f"option({name} " in (ROOT / "CMakeLists.txt").read_text()
