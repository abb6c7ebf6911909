"""The shipped base model: complete, reproducible where it can be, and able."""

import filecmp
import pathlib

import jax
import numpy as np

import cacovid_jax
from cacovid_jax.models import checkpoints
from cacovid_jax.parallel import mesh as mesh_lib
from cacovid_jax.synthetic import (
  base_models,
  packing,
  pretraining,
  questions,
  world,
)
from configs import synthetic_base

_BASE = pathlib.Path(cacovid_jax.__file__).parent / "assets" / "base_model"


def test_its_tokenizer_is_the_one_that_pretraining_makes(tmp_path):
  config = synthetic_base.get_config()
  pack = pretraining.packing_of(config, tmp_path)
  base_models.of(config).write_files(config, pack, tmp_path)
  names = sorted(path.name for path in tmp_path.iterdir())
  assert "tokenizer.json" in names
  for name in names:
    assert filecmp.cmp(tmp_path / name, _BASE / name, shallow=False), name


def test_it_has_the_sizes_of_its_config():
  config = synthetic_base.get_config()
  shape = checkpoints.load(_BASE).model.config
  assert shape.text.num_layers == config.text.num_layers >= 12
  assert shape.text.hidden_size == config.text.hidden_size
  assert shape.vision.num_layers == config.vision.num_layers


def test_it_answers_questions_about_clips_it_never_saw():
  checkpoint = checkpoints.load(_BASE)
  pack = packing.PackingConfig(
    tokenizer_file=str(_BASE / "tokenizer.json"), seed=123, questions_per_clip=4
  )
  batch = pretraining.held_out(pack, "dense", 6)
  family = base_models.FAMILIES["llava_onevision"]
  made = checkpoint.model, checkpoint.tokenizer
  prompts = base_models.prompts_of(family, *made, pack)
  mesh = mesh_lib.make_mesh(1)
  rules = pretraining.probe_rules(world.SMALL.num_tokens)
  rules = {"random": rules["random_0.10"], "decisive": rules["decisive_0.10"]}
  probe = pretraining.make_probe(prompts, rules, mesh)
  hits = probe({"model": checkpoint.params}, jax.random.key(0), batch)
  assert set(batch["kind"].flat) == set(range(len(questions.SHARES)))
  hits = {name: np.asarray(hit).mean() for name, hit in hits.items()}
  assert hits["vanilla"] >= 0.95
  assert hits["decisive"] >= 0.95
  assert hits["random"] <= hits["vanilla"] - 0.15
