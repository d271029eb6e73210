"""The chains hold no arithmetic, and what is public is documented in one form."""

import ast
import inspect
import pathlib

import pytest

from chainrule import chains, transforms
from registry import CASES

FILES = sorted(pathlib.Path(chains.__file__).parent.glob("*.py"))
ALLOWED = {"chainrule.transforms", "chainrule.chains", "optax", "typing", "collections", "jax"}
PUBLIC = {case.public for case in CASES}


def annotations(tree):
    """The nodes inside type annotations, where `|` is a union."""
    found = set()
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            annotation = getattr(node, field, None)
            found |= set(ast.walk(annotation)) if annotation is not None else set()
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_chain_only_imports_what_it_composes(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = {node.module or ""}
        else:
            continue
        roots = {m if m.startswith("chainrule") else m.split(".")[0] for m in modules}
        assert all(r in ALLOWED or r.startswith("chainrule.chains.") for r in roots), roots


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_chain_is_calls_and_arguments(path):
    tree = ast.parse(path.read_text())
    types = annotations(tree)
    banned = (
        *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp, ast.ClassDef, ast.Lambda),
        *(ast.For, ast.While, ast.comprehension, ast.AugAssign),
    )
    for node in ast.walk(tree):
        assert node in types or not isinstance(node, banned), ast.unparse(node)
        # `jax` is for annotations.
        named = isinstance(node, ast.Name) and node.id in ("jax", "jnp", "np")
        assert node in types or not named, ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_chain_returns_a_chain(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            last = node.body[-1]
            assert isinstance(last, ast.Return) and isinstance(last.value, ast.Call)
            assert ast.unparse(last.value.func) == "chain"


@pytest.mark.parametrize("name", chains.__all__)
def test_a_chain_shows_its_links_as_a_table(name):
    text = inspect.getdoc(getattr(chains, name)) or ""
    assert "| link | atom | equation |" in text


@pytest.mark.parametrize(
    "function",
    sorted(PUBLIC, key=lambda f: f"{f.__module__}.{f.__name__}"),
    ids=lambda f: f"{f.__module__}.{f.__name__}",
)
def test_public_docstrings_have_one_form(function):
    text = inspect.getdoc(function) or ""
    parameters = inspect.signature(function).parameters.values()
    assert text.split("\n\n")[0].endswith(".")
    for part in ("Args:", "Returns:", ">>>"):
        assert part in text
    for parameter in parameters:
        assert f"{parameter.name}: " in text, parameter.name


@pytest.mark.parametrize("name", [n for n in transforms.__all__ if n.endswith("State")])
def test_every_field_of_a_state_is_described(name):
    state = getattr(transforms, name)
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(state)))
    body = tree.body[0].body
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            assert described, f"{name}.{ast.unparse(node.target)}"
