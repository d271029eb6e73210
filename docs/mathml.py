"""Formulas as MathML, which browsers show by themselves: a page needs no script, and nothing from the network.

A command that latex2mathml does not know stays in its result, backslash and all; here that is a warning, so an error.
"""

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.util import logging

NAME = "mathml"
_log = logging.getLogger(__name__)


def _inline(writer, node):
    writer.body.append(_converted(node, "inline"))
    raise nodes.SkipNode


def _block(writer, node):
    writer.body.append(f'<div class="math">{_converted(node, "block")}</div>\n')
    raise nodes.SkipNode


def _converted(node, display):
    made = convert(node.astext(), display=display)
    if "\\" in made:
        _log.warning("a formula has a command that MathML gets no form of: %s", made, location=node)
    return made


def setup(app):
    app.add_html_math_renderer(NAME, (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
