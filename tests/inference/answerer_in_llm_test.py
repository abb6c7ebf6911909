"""Methods that act inside the language model, asked about one clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax import compressors, errors
from cacovid_jax.compressors import base, layerwise
from cacovid_jax.data import frames, video
from cacovid_jax.inference import answerer as answerer_lib
from cacovid_jax.models import prompt_batch
from tests.evals import tiny

QUESTION = "What colour is it?"
NEW = 3
LAYERS = 3  # Of the tiny checkpoint.


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  path = tmp_path_factory.mktemp("clips") / "clip.mp4"
  tiny.write_clip(path, seed=11, num_frames=12)
  return path


@pytest.fixture(scope="module")
def answerer(checkpoint_dir):
  with answerer_lib.Answerer(
    checkpoint_dir, num_frames=tiny.FRAMES, max_new_tokens=NEW
  ) as made:
    yield made


def by_hand(checkpoint, checkpoint_dir, path, text, method, ratio):
  """Returns (answer, tokens left), without any of the evaluation."""
  model, params = checkpoint.model, checkpoint.params
  count = video.probe(path).num_frames
  shown = video.read_frames(path, frames.eval_linspace(count, tiny.FRAMES))
  inputs = model.read_processor(checkpoint_dir)(shown)
  prompt = checkpoint.tokenizer.encode_prompt(text, tiny.NUM_VIDEO)

  @jax.jit
  def answer(params, inputs):
    found = model.encode(params, inputs, signals=("vision_attention",))
    x = model.embed_prompt(
      params, jnp.asarray(prompt.ids), found.features, prompt.video_rows
    )
    inputs = base.CompressorInputs(
      features=found.features[None],
      grid=tiny.GRID,
      vision_attention=found.signals["vision_attention"][None],
    )
    rows = prompt_batch.whole(
      prompt_batch.PromptBatch(
        x[None],
        jnp.arange(len(x))[None, None],
        jnp.array([len(x)]),
        jnp.asarray(prompt.video_rows)[None],
        jnp.array([len(x)]),
      )
    )
    return layerwise.generate(
      model, params, method, rows, inputs, jnp.array([len(x)]),
      ratio=ratio, max_new_tokens=NEW,
      eos_ids=checkpoint.eos_ids, pad_id=checkpoint.pad_id,
    )  # fmt: skip

  ids, trace = answer(params, inputs)
  left = np.asarray(trace.index[0])[np.asarray(trace.mask[0])]
  return checkpoint.tokenizer.decode(ids[0]).strip(), left


@pytest.mark.parametrize("spec", ["fastv", "flashvid?num_segments=2"])
def test_answers_are_those_of_the_method_alone(
  answerer, checkpoint, checkpoint_dir, clip, spec
):
  asked = answerer.ask(
    clip, QUESTION, ratios=(0.5,), method=spec, warm_up=False
  )
  (found,) = asked.answers
  text, left = by_hand(
    checkpoint, checkpoint_dir, clip, asked.question.prompt,
    compressors.get(spec), 0.5,
  )  # fmt: skip
  assert found.text == text
  np.testing.assert_array_equal(found.trace.index, left)
  # fastv: (0.5 * 3 - 1) / 2 of 64 tokens.
  assert found.kept == len(left)
  assert spec != "fastv" or found.kept == 16
  assert {"embed", "answer"} <= set(found.milliseconds)


def test_a_rule_that_counts_on_the_host(answerer, clip):
  asked = answerer.ask(
    clip, QUESTION, ratios=(0.5,), warm_up=False,
    method="framefusion?mode=bucketed&threshold=0.9",
  )  # fmt: skip
  (found,) = asked.answers
  assert found.method == "framefusion?mode=bucketed&threshold=0.9"
  assert 1 <= found.kept <= 32


@pytest.mark.parametrize(
  "method,ratio,match",
  [
    ("fastv", 0.25, "fastv: .*infeasible.* use at least 0.34"),
    ("fastv?layer=3&scale_layers=False", 0.9, "none of the model's 3 layers"),
    ("framefusion?mode=quick", 0.5, "use 'exact-mask' or 'bucketed'"),
    ("fastv?head=2", 0.5, "no option 'head'"),
  ],
)
def test_what_cannot_be_is_one_line_before_anything_runs(
  answerer, clip, monkeypatch, method, ratio, match
):
  def never(*unused):
    raise AssertionError("the model ran")

  monkeypatch.setattr(answerer.source(tiny.GRID), "_encode", never)
  answerer.source(tiny.GRID).clear()
  with pytest.raises(errors.UserError, match=match) as caught:
    answerer.ask(clip, QUESTION, ratios=(1.0, ratio), method=method)
  assert "\n" not in str(caught.value)
