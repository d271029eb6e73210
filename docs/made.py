"""Pages made of the code: the reference from docstrings, pictures of chains, and what stands elsewhere in the tree."""

import ast
import html
import importlib
import inspect
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

from chainrule import chains, pictures
from chainrule.catalogue import entries, sections, written

ROOT = pathlib.Path(__file__).parent.parent
MODULES = {
    "chainrule": "The algebra's entrance, the bridges, plans, states of other libraries.",
    "chainrule.chains": "The named optimizers.",
    "chainrule.transforms": "The atoms, and what composes, reads and moves their states.",
    "chainrule.torch_optimizers": "Chains as classes of torch.",
    "chainrule.keras_optimizers": "Chains as classes of Keras.",
    "chainrule.callbacks": "Loggers of `chainrule.metrics`.",
}
"""Every module with public names -> what its page says first."""


def write(folder: pathlib.Path) -> None:
    """Writes all pages that are made of the code."""
    for module, summary in MODULES.items():
        _save(folder / "reference" / f"{module}.md", _page(module, summary))
    for name in chains.__all__:
        _save(folder / "pictures" / f"{name}.svg", pictures.svg(name))
    gallery = "\n\n".join(
        f"## {name}\n\n![The links of {name}](pictures/{name}.svg)" for name in chains.__all__
    )
    _save(
        folder / "gallery.md",
        "# A gallery of chains\n\nDrawn from the code by `chainrule show NAME --svg`: updates go down the arrows; "
        f"*reads* is what a link takes by name, *keeps* the moments that later links may read.\n\n{gallery}\n",
    )
    _save(folder / "evidence.md", _evidence(folder))
    _save(folder / "performance.md", _performance())
    _save(folder / "command.md", _command())
    _save(folder / "changelog.md", (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](../"))
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    _save(folder / "contributing.md", contributing.replace("](docs/", "](../"))


def _save(path: pathlib.Path, text: str) -> None:
    """Writes a file unless it holds that text: Sphinx reads again what is newer than its output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _evidence(folder: pathlib.Path) -> str:
    """The report of `chainrule evidence`, whose figures stay where they are."""
    results = ROOT / "benchmarks" / "evidence" / "results"
    text = (results / "REPORT.md").read_text()
    where = os.path.relpath(results, folder)
    text = re.sub(r'<a id="(e\d+)"></a>\n', r"(\1)=\n", text)
    return re.sub(r"\]\((E\d+\.png)\)", rf"]({where}/\1)", text)


def _performance() -> str:
    """The rows that the speed tables printed, of every file that `--json` made."""
    parts = [
        "# Speed\n\nMilliseconds a step, and ratios of one run: medians over rounds in which contenders take turns. "
        "Another machine gives other figures; `chainrule bench` has the same tables there."
    ]
    for path in sorted((ROOT / "benchmarks" / "speed" / "results").glob("*.json")):
        for table, found in json.loads(path.read_text()).items():
            machine, used = found["processor"], found["versions"]
            rows = [
                f"| {row['name']} | {row['ms']:.2f} | {_ratio(row['ratio'])} | {row['against']} |"
                for row in found["rows"]
            ]
            parts.append(
                f"## {path.stem}, {table}\n\n`chainrule bench {path.stem}`: {found['title']}, on {machine['name']} "
                f"({machine['cores']} cores), {', '.join(f'{name} {version}' for name, version in used.items())}.\n\n"
                "| step | ms | ratio | to |\n| --- | --- | --- | --- |\n" + "\n".join(rows)
            )
    return "\n\n".join(parts) + "\n"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _command() -> str:
    """What `chainrule --help` says, command by command, written by Typer."""
    command = [
        sys.executable,
        "-m",
        "typer",
        "chainrule.cli",
        "utils",
        "docs",
        "--name",
        "chainrule",
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return html.unescape(made).replace("# `chainrule`", "# The command line", 1)


def _page(module: str, summary: str) -> str:
    room = importlib.import_module(module)
    names = sorted(room.__all__, key=str.lower)
    parts = [_documented(module, name, getattr(room, name)) for name in names]
    return (
        f"# {module}\n\n{summary}\n\n```{{py:module}} {module}\n```\n\n"
        "```{py:currentmodule} None\n```\n\n"  # the names below are whole
        + "\n\n".join(parts)
        + "\n"
    )


def _documented(module: str, name: str, value: Any) -> str:
    """A name's heading and its directive."""
    full = f"{module}.{name}"
    if inspect.ismodule(value):
        return f"## {name}\n\n{{py:mod}}`{full}` has a page of its own."
    heading = f"## {name}\n\n"
    if inspect.isclass(value):
        return heading + _class(full, value)
    if callable(value) and not hasattr(value, "__dataclass_fields__"):
        return heading + _directive("function", f"{full}{_signature(value)}", _body(full, value))
    doc = _below(module, name)
    return heading + _directive("data", full, f"{doc}\n\n`{written(value)}`")


def _class(full: str, made: type) -> str:
    tuple_like = issubclass(made, tuple)
    signature = "" if tuple_like else _signature(made)
    inner = [_body(full, made)]
    described = _fields(made) if tuple_like else {}
    inner += [f"- `{field}`: {what}" for field, what in described.items()]
    for name, method in vars(made).items():
        if (
            name.startswith("_")
            or not inspect.getdoc(getattr(made, name))
            or isinstance(method, type)
        ):
            continue
        if isinstance(method, property):
            inner.append(_directive("property", name, _body(f"{full}.{name}", method), 4))
        elif callable(getattr(made, name)) and inspect.isroutine(getattr(made, name)):
            bound = _signature(
                getattr(made, name), skip_self=not isinstance(method, (classmethod, staticmethod))
            )
            inner.append(
                _directive(
                    "method", f"{name}{bound}", _body(f"{full}.{name}", getattr(made, name)), 4
                )
            )
    return _directive("class", f"{full}{signature}", "\n\n".join(inner), 6)


def _directive(kind: str, signature: str, body: str, fence: int = 5) -> str:
    marks = ":" * fence
    return f"{marks}{{py:{kind}}} {signature}\n\n{body}\n{marks}"


def _signature(value: Any, *, skip_self: bool = False) -> str:
    """Names and defaults; what they are the arguments' list says."""
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())[1 if skip_self else 0 :]
    plain = [
        p.replace(
            annotation=p.empty, default=p.empty if p.default is p.empty else _Shown(p.default)
        )
        for p in parameters
    ]
    return str(signature.replace(parameters=plain, return_annotation=signature.empty))


class _Shown:
    """A default that prints as `written` says."""

    def __init__(self, value: Any) -> None:
        text = written(value)
        self.text = text if "<" not in text and len(text) < 60 else "..."

    def __repr__(self) -> str:
        return self.text


def _body(full: str, value: Any) -> str:
    """A docstring as Markdown; a public name without one ends the build."""
    doc = inspect.getdoc(value)
    if not doc:
        raise ValueError(f"{full} is public and has no docstring")
    text, parts = sections(doc)
    made = [_markdown(text)]
    for title, name in (("Args", "Arguments"), ("Raises", "Raises")):
        if title in parts:
            rows = [f"- `{key}`: {_markdown(what)}" for key, what in entries(parts[title]).items()]
            made.append(f"**{name}**\n\n" + "\n".join(rows))
    for title in ("Returns", "References"):
        if title in parts:
            made.append(f"**{title}**\n\n{_markdown(_linked(parts[title]))}")
    if "" in parts:
        made.append(f"```pycon\n{parts['']}\n```")
    return "\n\n".join(made)


def _markdown(text: str) -> str:
    return text.replace(r"\(", "$").replace(r"\)", "$")


def _linked(text: str) -> str:
    return re.sub(r"(?<![<(])(https?://[^\s,)]+)", r"<\1>", text)


def _trees(value: Any) -> ast.Module:
    return ast.parse(inspect.cleandoc("\n" + inspect.getsource(value)))


def _strings_below(body: list[ast.stmt]) -> dict[str, str]:
    """Assigned names -> the string that stands under each."""
    found: dict[str, str] = {}
    for node, below in itertools.pairwise(body):
        targets = (
            node.targets
            if isinstance(node, ast.Assign)
            else [node.target]
            if isinstance(node, ast.AnnAssign)
            else []
        )
        if targets and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(targets[0])] = inspect.cleandoc(str(below.value.value)).replace(
                "\n", " "
            )
    return found


def _fields(state: type) -> dict[str, str]:
    [node] = _trees(state).body
    assert isinstance(node, ast.ClassDef)
    return _strings_below(node.body)


def _below(module: str, name: str) -> str:
    """What the source says under the assignment of a constant, in whichever file of the module it is."""
    for path in pathlib.Path(importlib.import_module(module).__file__ or "").parent.glob("*.py"):
        found = _strings_below(ast.parse(path.read_text()).body)
        if name in found:
            return found[name]
    raise ValueError(f"{module}.{name} is public and has no string under its assignment")
