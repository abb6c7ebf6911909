"""The README's Python, run as it stands."""

import pathlib
import re

import jax
import numpy as np

from cacovid_jax import compressors

README = pathlib.Path(__file__).parent.parent / "README.md"


def blocks():
  """Returns the Python blocks of the README."""
  text = README.read_text(encoding="utf-8")
  return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_example_keeps_a_tenth_of_the_tokens(capsys):
  exec(compile(blocks()[0], "README", "exec"), {})
  out = capsys.readouterr().out
  assert out.startswith("keeps 78 of 784 video tokens: [")


def test_a_compressor_of_ones_own(tmp_path):
  path = tmp_path / "my_rule.py"
  path.write_text(blocks()[1])
  method = compressors.get(f"{path}:strongest")
  features = jax.random.normal(jax.random.key(0), (12, 4))
  kept = method.compress(features, grid=(3, 2, 2), num_keep=5)
  norms = np.linalg.norm(features, axis=-1)
  np.testing.assert_array_equal(kept.index, np.sort(np.argsort(-norms)[:5]))


def test_every_page_that_it_links_to_exists():
  text = README.read_text(encoding="utf-8")
  for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
    assert (README.parent / target).exists(), target
