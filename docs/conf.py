"""How the documentation is built: ``python -m sphinx -W docs docs/_build/html``.

The examples are shown without being run. ``-D plot_gallery=1`` runs them and puts their pictures on the pages; leave
out ``-W`` then, because sphinx warns of the type of that option whatever is written.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pathkernel
from pathkernel.callbacks import versions

project = "pathkernel"
author = "the pathkernel developers"
copyright = "2026, the pathkernel developers"  # the name that sphinx asks for
version = release = pathkernel.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]

# Pages are Markdown; mathematics is written between dollars.
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]  # sphinx-gallery's configuration holds functions, which sphinx cannot pickle

# The reference: one generated page for every name that an autosummary lists.
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's tables say more than the signature
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
default_role = "py:obj"  # `PathKernel` in a docstring links to its page

# Frameworks that are not installed are mocked: the pages of the callbacks come out the same with and without them.
autodoc_mock_imports = [name for name in ("lightning", "transformers", "skorch") if find_spec(name) is None]
if autodoc_mock_imports:
    versions.check_version = lambda distribution: None

# Examples that need a framework are run where it is.
NEEDED = {"05_lightning": "lightning"}
left_out = "|".join(example for example, framework in NEEDED.items() if find_spec(framework) is None) or "$"

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "auto_examples",
    "filename_pattern": rf"[/\\](?!{left_out})\d+[^/\\]*\.py$",  # examples are numbered, not prefixed by plot_
    "plot_gallery": False,
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,  # its pages load scripts from the network
    "remove_config_comments": True,
}

# MathJax 3.2.2, one file with its fonts (npm: mathjax, es5/tex-svg.js), so that formulas need no network.
mathjax_path = "mathjax/tex-svg.js"

html_theme = "pydata_sphinx_theme"
html_title = "pathkernel"
html_static_path = ["_static"]
html_css_files = ["pathkernel.css"]
html_sidebars = {"index": []}  # nothing to show there
html_theme_options = {
    "header_links_before_dropdown": 4,  # the four sections, in one row
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
}
html_show_sourcelink = False


def without_docstrings_of_frameworks(
    app: Any, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """Hooks that a framework calls are its business: a callback's page has the names that the callback documents."""
    ours = getattr(member, "__module__", None) or ""
    return True if ours.startswith("pathkernel.callbacks") and not getattr(member, "__doc__", None) else None


def without_requests_of_scikit_learn(
    app: Any, what: str, name: str, member: Any, skip: bool, options: Any
) -> bool | None:
    """`set_fit_request` and its like are made by scikit-learn, with docstrings that link to its own pages."""
    made = name.startswith("set_") and name.endswith("_request")
    return True if made and getattr(member, "__module__", "").startswith("sklearn.") else None


def setup(app: Any) -> None:
    app.connect("autodoc-skip-member", without_docstrings_of_frameworks)
    app.connect("autodoc-skip-member", without_requests_of_scikit_learn)
