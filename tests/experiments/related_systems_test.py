"""The related systems' experiment: its smallest form, and mistakes."""

import json

import pytest

from cacovid_jax import errors
from cacovid_jax.related import clips as clips_lib
from experiments import related_systems
from tests.experiments import commands

CONFIG = "configs/related_systems.py:debug"


def test_the_smallest_run_writes_a_table_and_a_picture_and_goes_on(tmp_path):
  flags = dict(config=CONFIG, workdir=tmp_path, systems=["law", "infotok"])
  commands.run(related_systems, **flags)
  out = json.loads((tmp_path / "results.json").read_text())
  assert set(out["systems"]) == {"law", "infotok"}
  for name in out["systems"]:
    text = (tmp_path / f"{name}.md").read_text()
    assert "| case | arm |" in text and "| to show |" in text
    assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
  before = (tmp_path / "infotok.jsonl").read_bytes()
  commands.run(related_systems, **flags)
  assert (tmp_path / "infotok.jsonl").read_bytes() == before
  # Of one system alone, the others' results stay.
  commands.run(related_systems, **flags | {"systems": "law"})
  again = json.loads((tmp_path / "results.json").read_text())
  assert again["systems"] == out["systems"]


def test_unknown_systems_and_other_configs_are_one_line(tmp_path):
  with pytest.raises(errors.UserError, match="no system 'hqc'; there"):
    commands.run(related_systems, config=CONFIG, systems=["hqc"])
  commands.run(related_systems, config=CONFIG, workdir=tmp_path, systems="law")
  with pytest.raises(errors.UserError, match="law.jsonl"):
    commands.run(
      related_systems,
      config=CONFIG.replace(":debug", ""),
      workdir=tmp_path,
      systems="law",
    )


@pytest.mark.parametrize(
  "given, told",
  [
    ("hcq.batch=0", "config.hcq.batch is 0; it must be a whole number"),
    ("emcl.fit.lr=-1", "config.emcl.fit.lr is -1"),
    ("adaptok.mean_levels=(2, -4)", "config.adaptok.mean_levels"),
    ("clips.variant=denser", "config.clips.variant is 'denser'"),
    ("seeds=(-1,)", "config.seeds"),
    ("quecc_llm.sizes=(('denser', 1),)", "config.quecc_llm.sizes"),
    ("vqtoken.sizes=(('dense', 0),)", "config.vqtoken.sizes"),
  ],
)
def test_settings_of_no_sense_are_one_line(given, told, tmp_path):
  key, _, value = given.partition("=")
  flags = dict(config=CONFIG, workdir=tmp_path, systems="law")
  with pytest.raises(errors.UserError) as caught:
    commands.run(related_systems, **flags, **{f"config.{key}": value})
  assert told in str(caught.value) and "\n" not in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_each_size_of_codes_has_a_bound(tmp_path):
  with pytest.raises(errors.UserError, match="has 1 sizes and hcq.bounds 2;"):
    commands.run(
      related_systems,
      config=CONFIG,
      workdir=tmp_path,
      systems="hcq",
      **{"config.hcq.bounds": "(0.1, None)"},
    )


def test_captions_that_are_missing_are_one_line():
  known = {"a": ["There is a red moon."], "b": []}
  assert clips_lib.captions_of(known, ["a"]) == ["There is a red moon."]
  for names, told in ((["a", "b"], "of b of 2 clips"), ([], "of all clips")):
    with pytest.raises(errors.UserError, match=told):
      clips_lib.captions_of(known, names)
