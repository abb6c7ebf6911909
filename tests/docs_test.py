"""Pages: links lead somewhere, commands exist, Python runs as it stands."""

import importlib
import json
import pathlib
import re
import shlex
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.numpy

from cacovid_jax import compressors, errors
from cacovid_jax import config as config_lib
from cacovid_jax.compressors import base
from cacovid_jax.policy import loading
from cacovid_jax.synthetic import build, render, world

ROOT = pathlib.Path(__file__).parent.parent
DOCS = ROOT / "docs"
# Folders whose names begin so hold what `make docs` wrote.
SITE = [
  path
  for path in sorted(DOCS.rglob("*"))
  if path.suffix in (".md", ".ipynb")
  and not any(part.startswith("_") for part in path.relative_to(DOCS).parts)
]
PAGES = [
  *(
    ROOT / f"{name}.md"
    for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")
  ),
  *sorted((ROOT / "cacovid_jax" / "assets").rglob("*.md")),
  *SITE,
]


def name_of(path):
  return path.relative_to(ROOT).as_posix()


def read(path):
  """Returns a page's Markdown; of a notebook that of its cells."""
  text = path.read_text(encoding="utf-8")
  if path.suffix == ".md":
    return text
  cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "markdown"]
  return "\n\n".join("".join(cell["source"]) for cell in cells)


each_page = pytest.mark.parametrize("path", PAGES, ids=name_of)


# Links.


def slug(heading):
  """Returns what a heading is linked by."""
  return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def prose(text):
  """Returns a page without its blocks of code."""
  return re.sub(r"(?ms)^ *```.*?^ *```$", "", text)


def broken_links(path, text):
  """Returns the targets of a page's links that are not there."""
  broken = []
  for target in re.findall(r"\]\(([^)]+)\)", prose(text)):
    if target.startswith("https://"):
      continue
    place, _, anchor = target.partition("#")
    there = path.parent / place if place else path
    if not there.is_file():
      broken.append(target)
    elif anchor:
      page = text if there == path else read(there)
      headings = re.findall(r"(?m)^#+ (.+)$", prose(page))
      if anchor not in map(slug, headings):
        broken.append(target)
  return broken


@each_page
def test_links_lead_somewhere(path):
  assert broken_links(path, read(path)) == []


def test_broken_links_are_noticed():
  text = (
    "# A b\n[x](#a-b) [x](#a) [x](runs.md#the-report) [x](runs.md#x) [x](y)"
  )
  found = broken_links(DOCS / "index.md", text)
  assert found == ["#a", "runs.md#x", "y"]


def test_the_index_lists_every_page():
  index = (DOCS / "index.md").read_text(encoding="utf-8")
  listed = []
  for tree in re.findall(r"```\{toctree\}\n(.*?)```", index, re.S):
    for line in tree.splitlines():
      if line and not line.startswith(":"):
        listed += DOCS.glob(f"{line}.*")
  pages = [path for path in SITE if path != DOCS / "index.md"]
  assert sorted(listed) == pages


def test_the_readme_is_short():
  assert (ROOT / "README.md").stat().st_size <= 10_000


# Commands.


def runs(module):
  """Returns whether `python -m` runs a dotted name."""
  path = ROOT / module.replace(".", "/")
  return path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def commands(text):
  """Yields the words of each `python -m` command, in blocks and in lines."""
  blocks = re.findall(r"(?ms)^ *```bash\n(.*?)```", text)
  lines = [
    line for block in blocks for line in block.replace("\\\n", " ").splitlines()
  ]
  lines += [
    code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose(text))
  ]
  for line in lines:
    if line.startswith("python -m ") and "..." not in line:
      yield shlex.split(line, comments=True)[2:]


def unknown_flags(words):
  """Returns what a command does not take of these words; "" if it takes all."""
  name, *arguments = words
  # Capitals stand for a config of the reader's.
  if re.search(r"--help|--config[ =](?!configs/)", " ".join(arguments)):
    return ""
  if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists():
    name += ".__main__"
  module = importlib.import_module(name)
  if not hasattr(module, "COMMAND"):
    return ""  # Reads its words itself.
  try:
    module.COMMAND.parse(words)
  except errors.UserError as error:
    return str(error)
  return ""


@each_page
def test_commands_exist(path, capsys):
  text = read(path)
  makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
  targets = set(re.findall(r"(?m)^([a-z][\w-]*):", makefile))
  assert set(re.findall(r"(?m)(?:^\s*|`)make ([a-z][\w-]*)", text)) <= targets
  for module in re.findall(
    r"python -m ((?:cacovid_jax|experiments|tests)[\w.]*)", text
  ):
    assert runs(module), module
  for words in commands(text):
    # A name without flags is a mention.
    if words[0].startswith(("cacovid_jax", "experiments")) and words[1:]:
      assert not unknown_flags(words), words
  assert not capsys.readouterr().err  # Hints at new names.


@each_page
def test_configs_exist(path):
  specs = re.findall(r"configs/\w+\.py(?::[\w=,]*\w)?", read(path))
  for spec in {*specs} - {"configs/NAME.py"}:
    config_lib.load(ROOT / spec)


def test_unknown_commands_are_noticed():
  (words,) = commands("```bash\npython -m cacovid_jax.answer --clip x\n```")
  assert unknown_flags(words).startswith("unknown flag --clip")
  assert "--seedz" in unknown_flags(["experiments.sweep", "--seedz=1"])
  assert not runs("cacovid_jax.no_command")


# Python.


def blocks(path):
  """Returns the Python blocks of a page."""
  found = re.findall(r"(?ms)^( *)```python\n(.*?)^ *```$", read(path))
  return [re.sub(f"(?m)^{indent}", "", code) for indent, code in found]


def block(page, words):
  """Returns the one Python block of a page that holds these words."""
  (found,) = [code for code in blocks(ROOT / page) if words in code]
  return found


@each_page
def test_python_compiles(path):
  for code in blocks(path):
    compile(code, path.name, "exec")


def test_the_example_keeps_a_tenth_of_the_tokens(capsys):
  code = block("docs/asking.md", "selection.select(")
  exec(compile(code, "asking", "exec"), {})
  out = capsys.readouterr().out
  assert out.startswith("keeps 78 of 784 video tokens: [")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder with a clip where the pages look for one."""
  folder = tmp_path_factory.mktemp("clips")
  scene = world.sample_scene(np.random.default_rng(0), world.VARIANTS["sparse"])
  (folder / "workdirs").mkdir()
  for name in ("clip.mp4", "workdirs/clip.mp4"):
    build.encode(str(folder / name), render.clip(scene, 32))
  return folder


@pytest.mark.parametrize(
  "page, place, kept",
  [
    ("README.md", 1, ["784", "196", "78"]),
    ("docs/asking.md", 1, ["784", "78"]),
  ],
)
def test_a_clip_is_asked(folder, monkeypatch, capsys, page, place, kept):
  monkeypatch.chdir(folder)
  exec(compile(block(page, "answerer.Answerer("), page, "exec"), {})
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[place] for line in lines] == kept


def test_a_policy_of_ones_own(tmp_path):
  path = tmp_path / "my_policy.py"
  path.write_text(block("docs/extending/policy.md", "class MyPolicy("))
  found, digest, _ = loading.find_policy({"module": f"{path}:MyPolicy"})
  assert found.__name__ == "MyPolicy" and len(digest) == 64


def test_a_compressor_of_ones_own(tmp_path):
  path = tmp_path / "my_rule.py"
  path.write_text(block("docs/extending/compressor.md", "def strongest("))
  method = compressors.get(f"{path}:strongest")
  features = jax.random.normal(jax.random.key(0), (12, 4))
  inputs = base.CompressorInputs(features=features, grid=(3, 2, 2))
  kept = method.select(inputs, num_keep=5)
  norms = np.linalg.norm(features, axis=-1)
  np.testing.assert_array_equal(kept.index, np.sort(np.argsort(-norms)[:5]))


def test_a_trained_compressor_of_ones_own(tmp_path):
  path = tmp_path / "my_scorer.py"
  path.write_text(block("docs/extending/compressor.md", "class Scorer("))
  weights = tmp_path / "head.safetensors"
  head = np.array([0, 1, 0, 0], np.float32)
  safetensors.numpy.save_file({"head": head}, weights)
  method = compressors.get(f"{path}:Scorer?weights={weights}")
  features = jax.random.normal(jax.random.key(0), (12, 4))
  inputs = base.CompressorInputs(features=features, grid=(3, 2, 2))
  kept = method.select(inputs, num_keep=5, params=method.load())
  best = np.sort(np.argsort(-np.asarray(features[:, 1]))[:5])
  np.testing.assert_array_equal(kept.index, best)


def test_a_reader_of_ones_own(tmp_path):
  space = {}
  code = block("docs/extending/benchmark.md", "read_name = ")
  exec(compile(code, "benchmark", "exec"), space)
  row = dict(id="7", question="Who?", video="v", option=["A. Ann", "B. Bo"])
  rows = [row | {"answer": 1}, row | {"id": "8", "answer": 5}]
  pa.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "q.parquet")
  (tmp_path / "videos").mkdir()
  (tmp_path / "videos" / "v.mp4").touch()
  (found,) = space["read_name"](
    str(tmp_path / "q.parquet"), str(tmp_path), on_bad_row="skip"
  )
  assert (found.id, found.answer, found.video) == ("7", "B", "videos/v.mp4")
  assert found.prompt == "Who?\nA. Ann\nB. Bo"
  with pytest.raises(errors.UserError, match="row 2, field 'answer'"):
    space["read_name"](str(tmp_path / "q.parquet"), str(tmp_path))


# Figures.


def test_figures_are_those_that_the_script_draws(monkeypatch):
  monkeypatch.syspath_prepend(str(DOCS / "figures"))
  draw = importlib.import_module("draw")
  monkeypatch.delitem(sys.modules, "draw")
  for name, picture in draw.figures().items():
    there = (DOCS / "figures" / name).read_text(encoding="utf-8")
    assert there == picture, f"{name}: run python docs/figures/draw.py"
    assert f"(figures/{name})" in read(DOCS / "architecture.md"), name
