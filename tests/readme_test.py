"""The README's Python, run as it stands."""

import pathlib
import re

import jax
import numpy as np
import safetensors.numpy

from cacovid_jax import compressors
from cacovid_jax.compressors import base
from cacovid_jax.synthetic import build, render, world

README = pathlib.Path(__file__).parent.parent / "README.md"


def block(words):
  """Returns the one Python block of the README that holds these words."""
  text = README.read_text(encoding="utf-8")
  blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  (found,) = [code for code in blocks if words in code]
  return found


def test_the_example_keeps_a_tenth_of_the_tokens(capsys):
  exec(compile(block("selection.select("), "README", "exec"), {})
  out = capsys.readouterr().out
  assert out.startswith("keeps 78 of 784 video tokens: [")


def test_a_compressor_of_ones_own(tmp_path):
  path = tmp_path / "my_rule.py"
  path.write_text(block("def strongest("))
  method = compressors.get(f"{path}:strongest")
  features = jax.random.normal(jax.random.key(0), (12, 4))
  inputs = base.CompressorInputs(features=features, grid=(3, 2, 2))
  kept = method.select(inputs, num_keep=5)
  norms = np.linalg.norm(features, axis=-1)
  np.testing.assert_array_equal(kept.index, np.sort(np.argsort(-norms)[:5]))


def test_a_trained_compressor_of_ones_own(tmp_path):
  path = tmp_path / "my_scorer.py"
  path.write_text(block("class Scorer("))
  weights = tmp_path / "head.safetensors"
  head = np.array([0, 1, 0, 0], np.float32)
  safetensors.numpy.save_file({"head": head}, weights)
  method = compressors.get(f"{path}:Scorer?weights={weights}")
  features = jax.random.normal(jax.random.key(0), (12, 4))
  inputs = base.CompressorInputs(features=features, grid=(3, 2, 2))
  kept = method.select(inputs, num_keep=5, params=method.load())
  best = np.sort(np.argsort(-np.asarray(features[:, 1]))[:5])
  np.testing.assert_array_equal(kept.index, best)


def test_an_answer_in_five_lines(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  rng = np.random.default_rng(0)
  scene = world.sample_scene(rng, world.VARIANTS["sparse"])
  build.encode("clip.mp4", render.clip(scene, 32))
  exec(compile(block("answering.Answerer("), "README", "exec"), {})
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[1] for line in lines] == ["784", "78"]


def test_every_page_that_it_links_to_exists():
  text = README.read_text(encoding="utf-8")
  for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
    assert (README.parent / target).exists(), target
