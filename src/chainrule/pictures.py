"""A chain as a picture: its links from the call in its source, and on which road information travels between them."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

import jax.numpy as jnp

from chainrule import chains, transforms
from chainrule.catalogue import atoms, entry, example, found
from chainrule.transforms._protocols import is_state

_CHAR, _LINE, _GAP, _PAD = 6.7, 17, 26, 12
_MOMENTS = ("mu", "nu", "trace")
_STYLE = (
    "text{font:11px ui-monospace,monospace;fill:#1f2328}.n{font-weight:bold;font-size:12px}"
    ".k{fill:#0a6640}.r{fill:#8a4600}.box{fill:#fff;stroke:#57606a}.any{stroke-dasharray:4 3}"
    ".road{stroke:#0550ae;stroke-width:1.5;fill:none;marker-end:url(#a)}.group{fill:none;stroke:#afb8c1}"
)


@dataclasses.dataclass(frozen=True)
class Link:
    """A box: what it is called, what stands under its name, and the chains inside it."""

    name: str
    lines: tuple[tuple[str, str], ...] = ()
    """Each a class of `_STYLE` and a text."""
    branches: tuple[tuple[str, tuple["Link", ...]], ...] = ()


def links_of(name: str) -> tuple[Link, ...]:
    """The links of a chain, or an atom alone.

    >>> [link.name for link in links_of("stam")]
    ['adaptive_beta1', 'scale_by_adam', 'decoupled_weight_decay', 'optax.scale_by_learning_rate']
    """
    kind, name = found(name)
    if kind == "atom":
        made = example(getattr(transforms, name))
        return (_atom(name, "", _kept(made.init({"w": jnp.zeros((2, 2))}))),)
    kept = _kept(example(getattr(chains, name)).init({"w": jnp.zeros((2, 2))}))
    factory = inspect.unwrap(getattr(chains, name))
    equations = [(row[1], row[2]) for row in entry(f"chains.{name}").links]
    [function] = ast.parse(textwrap.dedent(inspect.getsource(factory))).body
    assert isinstance(function, ast.FunctionDef)
    made = function.body[-1]
    assert isinstance(made, ast.Return) and isinstance(made.value, ast.Call)
    return _chain(made.value, vars(inspect.getmodule(factory)), equations, kept)


def _kept(state: Any) -> dict[str, list[str]]:
    """The moments in each state inside `state`, by the name of its class."""
    found: dict[str, list[str]] = {}
    if is_state(state):
        fields = state._asdict()
        found[type(state).__name__] = [name for name in _MOMENTS if fields.get(name) is not None]
    children = (
        state.values() if isinstance(state, dict) else state if isinstance(state, tuple) else ()
    )
    for child in children:
        found |= _kept(child)
    return found


def _chain(
    call: ast.expr,
    names: dict[str, Any],
    equations: list[tuple[str, str]],
    kept: dict[str, list[str]],
) -> tuple[Link, ...]:
    """The links of `chain(...)`; of another call, that one."""
    if isinstance(call, ast.Call) and ast.unparse(call.func) == "chain":
        return tuple(link for arg in call.args for link in _chain(arg, names, equations, kept))
    if not isinstance(call, ast.Call):
        return (Link(ast.unparse(call), (("", "any chain, ours or optax's"),)),)
    if ast.unparse(call.func) == "optax.partition" and isinstance(call.args[0], ast.Dict):
        branches = tuple(
            (str(ast.literal_eval(key)), _chain(value, names, equations, kept))
            for key, value in zip(call.args[0].keys, call.args[0].values, strict=True)
            if key is not None
        )
        return (Link("optax.partition", branches=branches),)
    called = ast.unparse(call.func)
    name = getattr(names.get(called), "__name__", called)
    return (_atom(name, _taken(equations, name), kept),)


def _taken(equations: list[tuple[str, str]], name: str) -> str:
    """The equation of the next row of the chain's table that names an atom; it is used up."""
    for row in equations:
        if f"{name}`" in row[0] or f"{name}(" in row[0]:
            equations.remove(row)
            return row[1]
    return ""


def _atom(name: str, equation: str, kept: dict[str, list[str]]) -> Link:
    lines = [("", equation)] if equation else []
    if name in atoms():
        known = entry(f"transforms.{name}")
        if not equation:
            lines += [("", line.strip()) for line in known.equations.splitlines()[:4]]
        if known.reads:
            lines.append(("r", f"reads {', '.join(known.reads)}"))
        moments = kept.get(f"{name.title().replace('_', '')}State", [])
        if moments:
            lines.append(("k", f"keeps {', '.join(moments)}"))
    return Link(name, tuple(lines))


def _size(links: Sequence[Link]) -> tuple[float, float]:
    sizes = [_box(link) for link in links]
    return max(w for w, _ in sizes), sum(h for _, h in sizes) + _GAP * (len(links) - 1)


def _box(link: Link) -> tuple[float, float]:
    texts = [(link.name, 7.6), *((text, _CHAR) for _, text in link.lines)]
    width = max(len(text) * char for text, char in texts) + 2 * _PAD
    height = _LINE * len(texts) + _PAD
    if link.branches:
        inner = [_size(links) for _, links in link.branches]
        width = max(width, sum(w for w, _ in inner) + _PAD * (len(inner) + 1))
        height += max(h for _, h in inner) + _LINE + _GAP
    return width, height


def _text(x: float, y: float, kind: str, text: str) -> str:
    return (
        f'<text x="{x:.0f}" y="{y:.0f}"{f" class={kind!r}" if kind else ""}>{escape(text)}</text>'
    )


def _road(x: float, y: float) -> str:
    return f'<path class="road" d="M{x:.0f} {y:.0f}v{_GAP - 5}"/>'


def _drawn(links: Sequence[Link], x: float, y: float, width: float) -> list[str]:
    parts: list[str] = []
    for i, link in enumerate(links):
        _, height = _box(link)
        if i:
            parts.append(_road(x + width / 2, y - _GAP))
        kind = "box" if link.name in atoms() or "." in link.name else "box any"
        parts.append(
            f'<rect class="{kind}" x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{height:.0f}" rx="4"/>'
        )
        for row, (style, text) in enumerate((("n", link.name), *link.lines)):
            parts.append(_text(x + _PAD, y + _LINE * (row + 1), style, text))
        across = x + _PAD
        for label, inner in link.branches:
            w, _ = _size(inner)
            parts.append(_text(across, y + 2 * _LINE + 4, "r", label))
            parts += _drawn(inner, across, y + 2 * _LINE + _PAD, w)
            across += w + _PAD
        y += height + _GAP
    return parts


def svg(name: str) -> str:
    """The picture of a chain or atom: updates go down the blue arrows; what a link reads and keeps stands in it.

    >>> svg("stam").startswith("<svg")
    True
    """
    links = links_of(name)
    width, height = _size(links)
    head = f"{found(name)[1]}: gradients go in at the top, updates come out at the bottom"
    width = max(width, 7 * 12)
    middle = _PAD + width / 2
    top = _PAD + _LINE + _GAP
    total = top + height + _GAP + _LINE + _PAD
    body = [
        _text(middle - 14, _PAD + _LINE - 4, "", "grad"),
        _road(middle, top - _GAP),
        *_drawn(links, _PAD, top, width),
        _road(middle, top + height),
        _text(middle - 24, top + height + _GAP + _LINE - 4, "", "updates"),
    ]
    w, h = width + 2 * _PAD, total
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" '
        f'height="{h:.0f}"><title>{escape(head)}</title><style>{_STYLE}</style><defs><marker id="a" viewBox="0 0 8 8" '
        'refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#0550ae"/>'
        f'</marker></defs><rect width="100%" height="100%" rx="6" fill="#f6f8fa"/>{"".join(body)}</svg>\n'
    )
