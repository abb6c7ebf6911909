"""Batches of the base model's training: questions packed behind a clip."""

import dataclasses
import multiprocessing
import os
import select
import signal
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from cacovid_jax import errors
from cacovid_jax.synthetic import packing, questions, world
from cacovid_jax.synthetic import tokenizer as tokenizer_training


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  tokenizer_training.train(packing.corpus(20), 576, folder)
  return str(folder / "tokenizer.json")


@pytest.fixture(scope="module")
def config(tokenizer_file):
  return packing.PackingConfig(
    tokenizer_file=tokenizer_file,
    batch_size=2,
    questions_per_clip=3,
    text_only=2,
    num_steps=4,
    ramp_steps=2,
  )


@pytest.fixture(scope="module")
def packer(config):
  return packing.Packer(config)


def scene_of(variant, seed=0):
  rng = np.random.default_rng(seed)
  return world.sample_scene(rng, world.VARIANTS[variant])


def assert_equal(first, second):
  assert set(first) == set(second)
  for name in first:
    np.testing.assert_array_equal(first[name], second[name], name)


def test_a_batch_is_a_function_of_seed_and_step(config, packer):
  assert_equal(packer.batch(3), packing.Packer(config).batch(3))
  other = packing.Packer(dataclasses.replace(config, seed=1)).batch(3)
  assert not np.array_equal(packer.batch(3)["ids"], other["ids"])
  assert not np.array_equal(packer.batch(3)["ids"], packer.batch(2)["ids"])


def test_worker_processes_change_nothing(config):
  alone = list(packing.batches(config, first_step=2, num_workers=0))
  shared = list(packing.batches(config, first_step=2, num_workers=1))
  assert len(alone) == len(shared) == 2
  for first, second in zip(alone, shared, strict=True):
    assert_equal(first, second)


def test_packed_text_reads_as_the_prompt_of_an_evaluation(packer, config):
  tokenizer = tokenizers.Tokenizer.from_file(config.tokenizer_file)
  scene = scene_of("dense")
  clip = packer.clip(np.random.default_rng(5), scene, 0.0)
  asked = questions.sample_questions(np.random.default_rng(5), scene, 3)
  for row, question in enumerate(asked):
    ids, target = clip["ids"][row], clip["target"][row]
    letter = questions.LETTERS[question.answer]
    answer = tokenizer.decode(ids[target].tolist(), skip_special_tokens=False)
    assert answer == f"{letter}<|im_end|>"
    start = int(target.argmax())
    prompt = tokenizer.decode(ids[:start].tolist(), skip_special_tokens=False)
    lines = [f"{a}. {b}" for a, b in zip("ABCD", question.options, strict=True)]
    assert prompt == (
      "\n"
      + "\n".join([question.text, *lines])
      + "\n Please provide only the single option letter (e.g., A, B, C, D,"
      " etc.).<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = question.tokens(scene)
    kept = clip["decisive"][row]
    assert kept[kept >= 0].tolist() == tokens[: config.max_decisive]
    assert questions.KINDS[clip["kind"][row]] == question.kind
  assert not clip["in_words"].any()


def test_answers_in_words_name_the_right_option(packer, config):
  tokenizer = tokenizers.Tokenizer.from_file(config.tokenizer_file)
  clip = packer.clip(np.random.default_rng(6), scene_of("sparse"), 1.0)
  assert clip["in_words"][clip["kind"] >= 0].all()
  for ids, target in zip(clip["ids"], clip["target"], strict=True):
    if target.any():
      answer = tokenizer.decode(ids[target].tolist())
      prompt = tokenizer.decode(ids[: int(target.argmax())].tolist())
      assert any(
        line.endswith(f". {answer}") for line in prompt.splitlines()
      ), answer


def test_labels_are_the_attributes_of_each_tokens_owner(packer):
  scene = scene_of("dense", 2)
  labels = packer.clip(np.random.default_rng(0), scene, 0.0)["labels"]
  owners = world.token_owners(scene).reshape(-1)
  assert labels.shape == (world.SMALL.num_tokens, 3)
  for token in range(0, world.SMALL.num_tokens, 5):
    expected = (
      scene.attributes[owners[token]].tolist()
      if owners[token] >= 0
      else [-1] * 3
    )
    assert labels[token].tolist() == expected


def test_a_told_scene_names_all_its_objects_in_order():
  scene = scene_of("sparse", 3)
  lines = packing.describe(scene).splitlines()
  assert len(lines) == len(scene.attributes)
  order = np.argsort(scene.life[:, 0], kind="stable")
  for line, obj in zip(lines, order, strict=True):
    color, pattern, shape = scene.attributes[obj]
    words = line.split()
    assert words[:3] == [
      world.COLOR_NAMES[color],
      world.PATTERNS[pattern],
      world.SHAPES[shape],
    ]
    assert words[3:] == [questions.place_of(scene, obj)[0]]


def test_scenes_grow_to_the_configs_density(packer, config):
  rng = np.random.default_rng(0)
  early = [packer._world(rng, 0).num_objects[1] for _ in range(30)]
  late = [
    packer._world(rng, config.ramp_steps).num_objects[1] for _ in range(30)
  ]
  assert max(early) < max(late)
  assert max(late) == config.dense_objects[1]


def test_a_text_that_does_not_fit_is_refused(config):
  small = packing.Packer(dataclasses.replace(config, question_length=20))
  with pytest.raises(ValueError, match="do not fit into 20"):
    small.batch(0)


def test_a_signal_to_all_processes_loses_no_batch(config):
  stream = packing.batches(config, first_step=2, num_workers=1)
  first = next(stream)
  for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGTERM)
  assert_equal(first, packing.Packer(config).batch(2))
  assert_equal(next(stream), packing.Packer(config).batch(3))
  stream.close()
  assert not multiprocessing.active_children()


def test_workers_end_with_a_killed_trainer(config, tmp_path):
  path = tmp_path / "trainer.py"
  path.write_text(
    "import multiprocessing\n"
    "from cacovid_jax.synthetic import packing\n"
    "if __name__ == '__main__':\n"
    "  config = packing.PackingConfig(\n"
    f"    tokenizer_file={config.tokenizer_file!r}, batch_size=1,\n"
    "    questions_per_clip=1, text_only=1, num_steps=9)\n"
    "  stream = packing.batches(config, first_step=0, num_workers=1)\n"
    "  next(stream)\n"
    "  (worker,) = multiprocessing.active_children()\n"
    "  print(worker.pid, flush=True)\n"
    "  input()\n"
  )
  with subprocess.Popen(
    [sys.executable, path],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
  ) as trainer:
    worker = int(trainer.stdout.readline())
    watched = os.pidfd_open(worker)
    trainer.kill()
  # Readable once that process has ended; a minute is far above what it takes.
  assert select.select([watched], [], [], 60)[0]
  os.close(watched)


def test_a_worker_that_is_ended_is_told(config):
  stream = packing.batches(config, first_step=0, num_workers=1)
  next(stream)
  for worker in multiprocessing.active_children():
    worker.kill()
  with pytest.raises(errors.UserError, match="num_workers"):
    list(stream)


def test_kinds_are_drawn_as_often_as_said(config):
  shares = (1e-6, 1.0, 1e-6, 1e-6, 1e-6)
  packer = packing.Packer(dataclasses.replace(config, kind_shares=shares))
  kinds = packer.clip(np.random.default_rng(0), scene_of("dense"), 0.0)["kind"]
  assert (kinds == questions.KINDS.index("where")).all()
