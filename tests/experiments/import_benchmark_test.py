"""The import benchmark: sizes, files, a table, nothing left behind."""

import os

import numpy as np
import pytest
from absl.testing import flagsaver

from cacovid_jax import errors
from cacovid_jax.models import checkpoints, llava_onevision
from cacovid_jax.synthetic import tiny_checkpoints
from experiments import import_benchmark

TINY = llava_onevision.LlavaOnevisionConfig.tiny()


@pytest.mark.parametrize("gigabytes", [2, 16])
def test_the_model_has_about_the_size_asked_for(gigabytes):
  config = import_benchmark.config_of_size(gigabytes * 1e9)
  shapes = checkpoints.source_shapes(config).values()
  size = 2 * sum(int(np.prod(shape)) for shape in shapes)
  # To half a decoder layer.
  assert abs(size - gigabytes * 1e9) < 0.3e9
  full = llava_onevision.LlavaOnevisionConfig.llava_onevision_7b()
  assert config.text.hidden_size == full.text.hidden_size
  assert config.vision.num_layers <= full.vision.num_layers
  assert config.text.num_layers <= full.text.num_layers


def test_a_given_directory_is_measured_and_kept(tmp_path, capsys):
  tiny_checkpoints.write_random(str(tmp_path), TINY)
  before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
  with flagsaver.flagsaver(directory=str(tmp_path), repeats=2):
    import_benchmark.main(["import_benchmark"])
  printed = capsys.readouterr().out
  assert "read GB/s" in printed and "median" in printed
  after = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
  assert after == before


def test_what_it_makes_it_deletes(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(import_benchmark, "config_of_size", lambda size: TINY)
  workdir = tmp_path / "made"
  with flagsaver.flagsaver(scratch=str(workdir), repeats=1):
    import_benchmark.main(["import_benchmark"])
  assert "GB to cpu" in capsys.readouterr().out
  assert not workdir.exists()


def test_a_folder_with_files_is_left_alone(tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with flagsaver.flagsaver(scratch=str(tmp_path)):
    with pytest.raises(errors.UserError, match="is not empty"):
      import_benchmark.main(["import_benchmark"])
  assert os.listdir(tmp_path) == ["notes.txt"]


def test_the_table_tells_shares_and_the_worst_memory():
  turns = [
    import_benchmark.Measured(read=1.0, load=2.0, memory=10**9),
    import_benchmark.Measured(read=2.0, load=2.0, memory=2 * 10**9),
    import_benchmark.Measured(read=1.0, load=1.25, memory=None),
  ]
  table = import_benchmark.report(4 * 10**9, turns)
  cells = {column.header: list(column.cells) for column in table.columns}
  assert cells["share"] == ["50%", "100%", "80%", "80%"]
  assert cells["read GB/s"] == ["4.00", "2.00", "4.00", "4.00"]
  assert cells["import GB/s"] == ["2.00", "2.00", "3.20", "2.00"]
  assert cells["memory GB"] == ["1.00", "2.00", "unknown", "2.00"]


def test_memory_is_measured(tmp_path):
  before = import_benchmark._anonymous_bytes()
  if before is None:  # Told on Linux alone.
    assert not os.path.exists("/proc/self/status")
    return
  with import_benchmark._peak() as peak:
    block = np.ones(2 * 10**7)
    import_benchmark.time.sleep(0.05)
    del block
  assert 1.4e8 < peak() - before < 3e8
