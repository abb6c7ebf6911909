"""The site: `make docs` builds it into docs/_build/html."""

import pathlib
import re
import sys

from pygments.lexers.special import TextLexer
from sphinx.highlighting import lexers

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import cacovid_jax  # noqa: E402

project = "cacovid_jax"
author = "The cacovid_jax authors"
release = cacovid_jax.__version__

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = "cacovid_jax"
html_show_copyright = False
lexers["csv"] = TextLexer()

# Headings are link targets, as on GitHub.
myst_heading_anchors = 3
# The notebook is stored without outputs; a test runs it.
nb_execution_mode = "off"

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Has an environment of its own.
autodoc_mock_imports = ["lmms_eval"]
napoleon_use_ivar = True
napoleon_use_rtype = False


def setup(app):
  """Reads docstrings as the plain text that they are, before napoleon."""
  app.connect("autodoc-process-docstring", _as_plain_text, priority=400)
  app.connect("autodoc-skip-member", _is_told_above)


def _is_told_above(app, what, name, obj, skip, options):
  """Skips fields of named tuples: their class has told what they are."""
  return True if type(obj).__name__ == "_tuplegetter" else None


def _as_plain_text(app, what, name, obj, options, lines):
  """Marks code up, escapes what reStructuredText takes for markup."""
  text = "\n".join(lines)
  if what == "module":
    parts = [
      part if _is_prose(part) else "::\n\n" + re.sub("(?m)^", "  ", part)
      for part in re.split(r"\n{2,}", text.strip("\n"))
    ]
  else:
    parts = [text]
  lines[:] = "\n\n".join(map(_escape, parts)).split("\n")


def _is_prose(part):
  return not re.search(r"(?m)^\s", part)


def _escape(part):
  if part.startswith("::\n"):
    return part
  pieces = re.split(r"`+([^`]+)`+", part)
  for number, piece in enumerate(pieces):
    if number % 2:
      # Code ends at a word's end only: `Question`s.
      behind = r"\ " if re.match(r"\w", pieces[number + 1]) else ""
      shown = re.sub(r"^ | $", "␣", piece)  # Code has no space at its ends.
      pieces[number] = f"``{shown}``{behind}"
    else:
      pieces[number] = re.sub(r"([*|\\]|_\b)", r"\\\1", piece)
  return "".join(pieces)
