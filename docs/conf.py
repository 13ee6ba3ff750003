"""The documentation site: ``make docs``. Pages are Markdown; the reference comes out of the docstrings."""

import proac_cuda

project = "proac_cuda"
version = release = proac_cuda.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
smartquotes = False  # quotes are code's, for the most part
html_theme = "furo"
html_extra_path = ["pages"]  # the page that explains the loss
html_show_copyright = False
html_title = f"proac_cuda {version}"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = (
    "none"  # docstrings say more than annotations do; and this leaves one signature of several overloads
)
autodoc_preserve_defaults = True
napoleon_use_rtype = False
