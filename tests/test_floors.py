"""Who may import whom: the floors of `docs/architecture.md`, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"torch", "keras", "tensorflow"}
# Each floor may import itself and those below it; the first that a file lies in counts.
FLOORS: list[tuple[str, set[str], set[str]]] = [
    ("native", {"native"}, FRAMEWORKS),
    ("transforms", {"native", "transforms"}, FRAMEWORKS),
    ("chains", {"native", "transforms", "chains"}, FRAMEWORKS),
    ("bridges/step", {"native", "transforms", "bridges.step"}, FRAMEWORKS),
    ("bridges/lowering", {"native", "bridges.lowering"}, {"keras", "tensorflow", "optax"}),
    ("bridges", {"native", "transforms", "chains", "bridges"}, set()),
]


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor_of(path: Path) -> tuple[set[str], set[str]]:
    place = path.relative_to(ROOT).as_posix()
    return next(rest for folder, *rest in FLOORS if place.startswith(f"{folder}/"))  # pyright: ignore


FILES = [
    p for room in ("native", "transforms", "chains", "bridges") for p in (ROOT / room).rglob("*.py")
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_is_below_it(path: Path) -> None:
    allowed, refused = floor_of(path)
    for name in imports(path):
        package, _, inner = name.partition(".")
        assert package not in refused, f"{path.name} imports {name}"
        if package == "chainrule" and inner.partition(".")[0] in {
            "native",
            "transforms",
            "chains",
            "bridges",
        }:
            assert any(f"{inner}.".startswith(f"{room}.") for room in allowed), (
                f"{path.name} imports {name}"
            )


def test_a_framework_is_imported_by_the_files_of_its_own_bridge() -> None:
    """A name says what a file is for; `import chainrule` and the other bridges must do without the framework."""
    for path in (ROOT / "bridges").glob("*.py"):
        found = {name.partition(".")[0] for name in imports(path)} & {"keras", "tensorflow"}
        assert not found or path.name.startswith("keras_"), f"{path.name} imports {found}"


def test_what_jax_may_take_away_is_imported_where_the_rest_works_without_it() -> None:
    """JAX 0.11 took `jax.experimental.shard_alike` away, and with it `import chainrule`."""
    for path in FILES:
        found = [n for n in imports(path) if n.startswith(("jax.experimental", "jax._src"))]
        only_here = ["jax.experimental.jax2tf"] if path.name == "keras_on_tensorflow.py" else []
        assert found == only_here, f"{path.name} imports {found}"


def test_import_chainrule_leaves_what_only_a_step_needs() -> None:
    """`jax.extend` imports Pallas, a tenth of optax's own time."""
    code = "import sys, optax; before = {*sys.modules}; import chainrule; print(*{*sys.modules} - before)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"jax.extend", "torch", "keras", "chainrule.native.primitives"}
    assert "chainrule.chains" in found.stdout.split()
    assert not heavy & {*found.stdout.split()}
