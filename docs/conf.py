"""How Sphinx builds the documentation: `make docs`, strictly, into build/site, without a network.

Sphinx with MyST rather than MkDocs: MkDocs 1 has no releases any more, and its theme Material ends in May 2027.
"""

import re

from sphinx.application import Sphinx

project = "overnight"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
nitpicky = True
myst_heading_anchors = 3
html_theme = "furo"
html_title = "overnight"
html_show_sphinx = False
html_show_copyright = False
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"top_of_page_buttons": []}
html_static_path = ["static"]
html_css_files = ["site.css"]
pygments_style = "friendly"
pygments_dark_style = "monokai"

_OUTSIDE = re.compile(r"\]\((\.\./[^)#]+\.md)\)")


def _as_files(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Let links to Markdown outside docs/ give the file: it is no page of the site, and on a code host it opens."""
    source[0] = _OUTSIDE.sub(r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    """Register this file's own step."""
    app.connect("source-read", _as_files)
