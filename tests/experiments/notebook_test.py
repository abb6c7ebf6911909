"""The notebook runs from its first cell to its last, and carries no outputs."""

import os
import pathlib

import nbclient
import nbformat
import pytest

import tests

ROOT = pathlib.Path(__file__).parent.parent.parent
PATH = ROOT / "docs" / "clip_to_policy.ipynb"


@pytest.fixture(scope="module")
def notebook():
  return nbformat.read(PATH, as_version=4)


def test_it_is_stored_without_outputs(notebook):
  nbformat.validate(notebook)
  cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
  assert len(cells) > 5
  for cell in cells:
    assert cell.outputs == [] and cell.execution_count is None
  assert set(notebook.metadata) == {"kernelspec", "language_info"}


def test_its_short_form_ends_with_a_policy(notebook, tmp_path, monkeypatch):
  for name, value in {
    "NOTEBOOK_SHORT": "1",
    "NOTEBOOK_WORKDIR": str(tmp_path),
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": tests.xla_flags(),
    # Otherwise a user's own start-up files would run as well.
    "IPYTHONDIR": str(tmp_path / "ipython"),
  }.items():
    monkeypatch.setenv(name, value)
  client = nbclient.NotebookClient(
    notebook,
    timeout=600,
    # Where someone would open it.
    resources={"metadata": {"path": str(PATH.parent)}},
  )
  client.execute()
  outputs = [
    output for cell in notebook.cells for output in cell.get("outputs", ())
  ]
  assert not [output for output in outputs if output.output_type == "error"]
  pictures = [o for o in outputs if "image/png" in o.get("data", {})]
  # The clip, kept tokens of two rules, frame scores, rewards, the new policy's.
  assert len(pictures) == 6
  told = "".join(o.text for o in outputs if o.output_type == "stream")
  assert "100% kept: 784 tokens" in told and "10% kept:  78 tokens" in told
  assert (tmp_path / "policy2" / "policy" / "policy.safetensors").exists()
  assert os.path.getsize(tmp_path / "policy2" / "metrics.jsonl")
