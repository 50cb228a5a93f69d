"""Sphinx's settings for the site. ``scripts/build_site.py`` writes the folder of sources, and calls Sphinx."""

from docutils import nodes
from docutils.utils.math import latex2mathml

import minivlm

project = "minivlm"
author = copyright = "The minivlm authors"
version = release = minivlm.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are stored executed
nb_ipywidgets_js = {}  # otherwise every page with a widget asks a CDN
nb_mime_priority_overrides = [
    ("html", "text/html", 0)
]  # with alt text, sharp, and with the widgets that need no kernel
suppress_warnings = ["myst.header"]  # the questions of a chapter are headings of the fourth level

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "pydata_sphinx_theme"
html_title = "minivlm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["theme.js"]
html_extra_path = ["_extra"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "header_links_before_dropdown": 7,
    "search_bar_text": "Search the course",
    "navigation_with_keys": False,
}
html_context = {"default_mode": "auto"}
html_sidebars = {"index": []}
math_renderer = html_math_renderer = "mathml"


def inline_formula(translator, node: nodes.math) -> None:
    """A formula as MathML, which browsers draw without a script."""
    translator.body.append(mathml(node, as_block=False))
    raise nodes.SkipNode


def displayed_formula(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula" tabindex="0">{mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def mathml(node: nodes.Element, as_block: bool) -> str:
    return latex2mathml.tex2mathml(node.astext(), as_block=as_block)


def code_in_docstring(app, what, name, obj, options, lines: list[str]) -> None:
    """An indented block after a paragraph is code, as in Markdown: without ``::`` it would be a quotation."""
    for i in reversed(range(2, len(lines))):
        before, blank, line = lines[i - 2 : i + 1]
        is_text = before and before[0] not in " .:"
        if is_text and not before.endswith("::") and not blank and line.startswith("    "):
            lines[i:i] = ["::", ""]


def hide_from_robots(app, pagename, templatename, context, doctree) -> None:
    """Solutions are for whoever looks for them here, not for search engines."""
    if pagename.startswith("notebooks/solutions/"):
        context["metatags"] = context.get("metatags", "") + '\n<meta name="robots" content="noindex">'


def setup(app):
    app.add_html_math_renderer("mathml", (inline_formula, None), (displayed_formula, None))
    app.connect("autodoc-process-docstring", code_in_docstring, priority=900)  # after napoleon
    app.connect("html-page-context", hide_from_robots)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
