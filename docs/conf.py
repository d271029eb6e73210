"""The site: `make docs`. Pages that are made of the code are in `docs/_made` before the build reads the rest."""

import os
import pathlib
import sys

os.environ.setdefault("KERAS_BACKEND", "jax")
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))

import made  # noqa: E402 -- found on the path set above

import chainrule  # noqa: E402 -- after the environment set above

project = "chainrule"
author = copyright = "chainrule contributors"
version = release = chainrule.__version__
extensions = ["myst_nb", "mathml"]
html_math_renderer = "mathml"
exclude_patterns = ["_build", "notebooks/scripts"]
nb_execution_mode = "off"  # `make notebooks` executes them
myst_enable_extensions = ["attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
add_module_names = False
python_maximum_signature_line_length = 60
html_theme = "furo"
html_title = "chainrule"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_show_sourcelink = False

made.write(HERE / "_made")


def setup(app):
    """Links to files beside `docs` are right where the tree is read; on the site those files are among `_made`."""

    def on_site(app, name, source):
        source[0] = source[0].replace("](../CONTRIBUTING.md)", "](_made/contributing.md)")

    def with_level(app, page, template, context, tree):
        """Captions of the navigation are headings, which a screen reader wants to know the level of."""
        navigation = context.get("furo_navigation_tree", "")
        context["furo_navigation_tree"] = navigation.replace(
            'role="heading"', 'role="heading" aria-level="2"'
        )

    app.connect("source-read", on_site)
    app.connect("html-page-context", with_level, priority=900)  # after the theme's own
