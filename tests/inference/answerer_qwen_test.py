"""Answers of a Qwen2.5-VL checkpoint, whose grid follows the clip's shape."""

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cacovid_jax.compressors import simple
from cacovid_jax.data import frames, video
from cacovid_jax.evals.report import answer as answer_page
from cacovid_jax.inference import answerer as answerer_lib
from cacovid_jax.models import checkpoints, generation, processors
from tests.evals import report_test, tiny
from tests.models import mrope_loop

FRAMES, NEW = 3, 3
QUESTION = "Which shape appears first?"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """Returns a random checkpoint, complete with tokenizer and processor."""
  return tiny.write_qwen_checkpoint(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """Returns a clip of 96 x 64 pixels, 9 frames, 1.5 s."""
  path = tmp_path_factory.mktemp("clips") / "wide.mp4"
  rng = np.random.default_rng(0)
  with av.open(str(path), "w") as container:
    stream = container.add_stream("libx264", rate=6)
    stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
    for _ in range(9):
      blocks = rng.integers(0, 256, (4, 6, 3), dtype=np.uint8)
      image = np.kron(blocks, np.ones((16, 16, 1), np.uint8))
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


@pytest.fixture(scope="module")
def asked(directory, clip, tmp_path_factory):
  """Returns (the model, what it said)."""
  checkpoint = checkpoints.load(directory)
  folder = tmp_path_factory.mktemp("policy")
  policy = tiny.write_policy(folder / "policy", checkpoint)
  with answerer_lib.Answerer(
    directory, policy, num_frames=FRAMES, max_new_tokens=NEW
  ) as model:
    found = model.ask(clip, QUESTION, ratios=(0.25,), warm_up=False)
    even = model.ask(
      clip, QUESTION, ratios=(0.25,), method="uniform", warm_up=False
    )
    yield model, found, even


def test_answers_are_those_of_the_model_alone(asked, clip):
  model, _, found = asked
  config, params = model.checkpoint.model.config, model.checkpoint.params
  # 96 x 64 pixels are 12 x 8 = 96 tokens of 8 pixels, enlarged to 128 at least.
  T, H, W = found.grid
  assert T == 2 and 128 <= H * W <= 256 and 1.3 < W / H < 1.7
  shown = video.read_frames(clip, frames.eval_linspace(9, FRAMES))
  processor = processors.Qwen2_5VLProcessor(
    patch_size=4,
    min_pixels=128 * 64,
    max_pixels=256 * 64,
    mean=tuple(tiny.QWEN_STATISTICS["image_mean"]),
    std=tuple(tiny.QWEN_STATISTICS["image_std"]),
  )
  inputs = processor(shown, fps=FRAMES / 1.5)
  assert inputs.grid == found.grid
  inputs = model.checkpoint.model.tower_inputs(inputs)
  prompt = model.checkpoint.tokenizer.encode_prompt(QUESTION, T * H * W)
  # A slice of two frames, two a second, lasts a second.
  positions, following = mrope_loop.positions(
    prompt.ids, config.video_token_id, found.grid, 1.0, 2, "4.50"
  )
  index = simple.even_positions(T * H * W, T * H * W // 4)
  np.testing.assert_array_equal(found.answers[0].trace.index, index)
  dropped = set(range(T * H * W)) - set(index.tolist())
  rows = np.array(
    [i for i in range(prompt.length) if i - prompt.video_rows[0] not in dropped]
  )

  @jax.jit
  def answer(params, inputs):
    vlm = model.checkpoint.model
    features = vlm.encode(params, inputs).features
    x = vlm.embed_prompt(
      params, jnp.asarray(prompt.ids), features, prompt.video_rows
    )
    return generation.greedy(
      vlm,
      params,
      x[rows][None],
      jnp.asarray(positions[:, rows], jnp.int32)[None],
      jnp.array([len(rows)]),
      jnp.array([following]),
      max_new_tokens=NEW,
      eos_ids=model.checkpoint.eos_ids,
      pad_id=model.checkpoint.pad_id,
    )

  ids = answer(params, inputs)[0]
  expected = model.checkpoint.tokenizer.decode(ids).strip()
  assert found.answers[0].text == expected and expected


def test_a_policy_chooses_on_this_grid(asked):
  _, found, even = asked
  answer = found.answers[0]
  assert answer.method == "cacovid"
  assert answer.kept == even.answers[0].kept == found.num_video // 4
  assert answer.trace.token_gap.shape == (found.num_video,)
  assert answer.trace.frame_gap.shape == (2,)
  assert not np.array_equal(answer.trace.index, even.answers[0].trace.index)


def test_page_shows_one_picture_a_slice(asked, tmp_path):
  model, found, _ = asked
  answer_page.write(tmp_path / "report.html", model, found)
  page = (tmp_path / "report.html").read_text("utf-8")
  outline = report_test.Outline(page)
  pictures = [a for t, a in outline.tags if t == "img" and "src" in a]
  assert len(pictures) == 2
  paths = [a["d"] for a in outline.classed("kept") if "d" in a]
  kept = sum(len(report_test.squares(path)) for path in paths)
  assert kept == found.answers[0].kept
  assert outline.data()["viewer"]["clips"][0]["labels"] == ["1–2", "3–4"]
