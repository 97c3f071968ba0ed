"""How the site looks and where its links lead; `python -m paperlib site` lays the pages out and builds it.

Pages ask for nothing from outside: formulas are MathML, badges are their words.
"""

import itertools
import re
from textwrap import indent

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError

import paperlib

project, author, version = "paperlib", "The paperlib authors", paperlib.__version__
copyright = author
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "sphinx.ext.githubpages",
]
default_role = "code"  # `x` in a docstring
smartquotes = False  # --option is no dash

nb_execution_mode = "off"  # stored outputs are what a published run has made
nb_render_markdown_format = "myst"  # links in outputs are followed, too
nb_ipywidgets_js = {}  # would come from outside
myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 4

autodoc_member_order = "bysource"
add_module_names = False
autosummary_generate = False  # modules have their pages
viewcode_follow_imported_members = False  # it would list a page of builtins, and make none

html_theme = "pydata_sphinx_theme"
html_math_renderer = "mathml"
html_title = "paperlib"
html_copy_source = False
html_context = {"default_mode": "auto"}  # dark where the reader's system is
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_sidebars = {"index": [], "docs/*": []}  # have nothing below them
html_theme_options = {
    "header_links_before_dropdown": 4,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}

PICTURE = re.compile(r'<picture>(.*?)<img src="([^"]+)"[^>]* alt="([^"]*)">\s*</picture>', flags=re.S)
SOURCE = re.compile(r'srcset="([^"]+)"')
IMAGE_FROM_OUTSIDE = re.compile(r"!\[([^\]]*)\]\(https?://[^)]*\)")
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)")
ANCHOR = re.compile(r'<a id=\\?"[\w-]+\\?"></a>')  # the heading below it has that name


def as_page(app, docname: str, source: list[str]) -> None:
    """A page, or a notebook's JSON, as the site shows it: pictures by theme, nothing from outside, links to modules,
    folders and README to their pages."""

    def to_page(match: re.Match) -> str:
        path = match[1].replace("README.md", "index.md")
        if (app.srcdir / docname).parent.joinpath(path).is_dir():
            path = f"{path.rstrip('/')}/index.rst"
        return "](" + re.sub(r"\.py$", ".rst", path)

    text = IMAGE_FROM_OUTSIDE.sub(r"\1", PICTURE.sub(by_reader, source[0]))
    source[0] = LINK.sub(to_page, ANCHOR.sub("", text))


def by_reader(match: re.Match) -> str:
    """All versions of a picture, each shown by its theme and on its width (site.css)."""
    shown = []
    for path in (*SOURCE.findall(match[1]), match[2]):
        theme, width = "dark" if "-dark" in path else "light", "narrow" if "-narrow" in path else "wide"
        shown.append(f"![{match[3]}]({path}){{.only-{theme} .{width}}}")
    return "\n".join(shown)


def as_rst(app, what, name, thing, options, lines: list[str]) -> None:
    """Docstrings are plain text: columns stay columns, and |x| is no substitution."""
    parts = ["\n".join(part) for filled, part in itertools.groupby(lines, bool) if filled]
    shown = [f"::\n\n{indent(part, '  ')}" if "   " in part else part.replace("|", r"\|") for part in parts]
    lines[:] = "\n\n".join([*shown, ""]).split("\n")


def without_fields(app, what, name, thing, options, signature, returns) -> tuple[str, str] | None:
    """The fields of a pydantic model, with their ranges, would fill a screen."""
    return ("", "") if "Annotated" in (signature or "") else None


def visit_math(translator, node) -> None:
    """A formula as MathML, which browsers draw without a script."""
    block = node.tagname == "math_block"
    try:
        drawn = tex2mathml(re.sub(r"\\big\b", r"\\bigl", node.astext()), as_block=block)
    except Exception as error:
        raise ExtensionError(f"{node.source}: {node.astext()}: {error}") from error
    translator.body.append(f'<div class="math">{drawn}</div>' if block else drawn)
    raise nodes.SkipNode


def setup(app) -> None:
    app.connect("source-read", as_page)
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("autodoc-process-signature", without_fields)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
