"""How Sphinx makes pages of the notebooks, the READMEs and the figures: `make site`.

The sources are the repository's own files, as they are; nothing runs, and what the pages need lies beside them.
"""

import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxTranslator

project = "spikesink"
root_doc = "README"
include_patterns = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "notebooks/*.ipynb",
    "figures/README.md",
    "figures/*/README.md",
]
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # what a cell displays is read as what is written between cells
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "spikesink"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/favicon.svg"
html_copy_source = False
templates_path = ["."]
html_additional_pages = {"index": "index.html"}  # a server's first page leads to the README's
html_math_renderer = "mathml"

CONTENTS = """

```{toctree}
:hidden:
:glob:
:caption: Notebooks

notebooks/*
```

```{toctree}
:hidden:
:glob:
:caption: Figures and claims

figures/README
figures/*/README
```

```{toctree}
:hidden:
:caption: Models

docs/families
```

```{toctree}
:hidden:
:caption: Taking part

CONTRIBUTING
```
"""


def adapt(app: Sphinx, docname: str, source: list[str]) -> None:
    """Give the README the list of pages that the sidebar shows; write anchors as pages have them, in lower case."""
    source[0] = re.sub(r"(?<=\.ipynb#)[\w-]+", lambda anchor: anchor[0].lower(), source[0])
    if docname == root_doc:
        source[0] += CONTENTS


def mathml(self: SphinxTranslator, node) -> None:
    """Write a formula as MathML, which browsers draw without a script from elsewhere."""
    self.body.append(convert(node.astext(), display="block" if node.tagname == "math_block" else "inline"))
    raise SkipNode


def setup(app: Sphinx) -> None:
    """Connect the two."""
    app.connect("source-read", adapt)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
