"""The text of `chainrule list` and `chainrule show`."""

import dataclasses
import json

from chainrule import chains
from chainrule.catalogue import Argument, Entry, atoms, entry


def columns(rows: list[list[str]]) -> str:
    """Rows as aligned text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  "
        + "   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def everything() -> list[Entry]:
    """Every chain, then every atom."""
    return [entry(f"chains.{name}") for name in chains.__all__] + [
        entry(f"transforms.{name}") for name in atoms()
    ]


def listed(*, as_json: bool = False) -> str:
    """Chains and atoms, each with the first sentence of its documentation."""
    if as_json:
        rows = [{"name": e.name, "kind": e.kind, "summary": e.summary} for e in everything()]
        return json.dumps(rows, indent=1)
    of_kind = {
        kind: columns([[e.name, e.summary] for e in everything() if e.kind == kind])
        for kind in ("chain", "atom")
    }
    return "\n\n".join(f"{kind}s\n{rows}" for kind, rows in of_kind.items())


def chains_only() -> str:
    """Every chain and the first sentence of its documentation."""
    return columns([[name, entry(name).summary] for name in chains.__all__])


def markdown() -> str:
    """Every chain's table of links, as the site has it."""
    made: list[str] = []
    for name in chains.__all__:
        known = entry(name)
        rows = [["link", "atom", "equation"], ["---"] * 3, *known.links]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        made.append(f"## {name}\n\n{known.summary}\n\n{table}")
    return "\n\n".join(made)


def _presets(known: Entry) -> list[list[str]]:
    rows: list[list[str]] = []
    for preset, changed in known.presets.items():
        lines = [[argument, what] for argument, what in changed.items()] or [["nothing", ""]]
        rows += [[preset if i == 0 else "", *line] for i, line in enumerate(lines)]
    return rows


def shown(name: str, *, as_json: bool = False) -> str:
    """One chain or atom: links or equations, arguments with defaults and ranges, state, source, presets."""
    known = entry(name)
    if as_json:
        return json.dumps(dataclasses.asdict(known), indent=1)
    given = [a for a in known.arguments if a.default and a.name != "preset"]
    rest = "other arguments" if known.kind == "chain" else "arguments"
    blocks = [
        ("links", columns(known.links) if known.links else ""),
        ("equations", "\n".join(f"  {line}" for line in known.equations.splitlines())),
        ("wraps", "\n".join(f"  {a.name}" for a in known.arguments if not a.default)),
        ("live hyperparameters", _table([a for a in given if a.live])),
        (rest, _table([a for a in given if not a.live])),
        ("reads", f"  {', '.join(known.reads)}" if known.reads else ""),
        ("state", columns([list(field) for field in known.state]) if known.state else ""),
        ("bytes of state at the start, of float32 matrices", f"  {known.state_bytes}"),
        ("source", f"  {known.source}" if known.source else ""),
        ("departure", f"  {known.departure}" if known.departure else ""),
        ("presets", columns(_presets(known)) if known.presets else ""),
    ]
    return "\n\n".join(
        [f"{known.name}: {known.summary}", *(f"{title}\n{text}" for title, text in blocks if text)]
    )


def _table(arguments: list[Argument]) -> str:
    return columns([[a.name, a.default, a.bounds] for a in arguments]) if arguments else ""
