"""Qwen3-VL's frames, prompts and positions, against the reference's own.

golden/processors.npz holds pixels, sizes and samples of transformers' video
processor, which needs torchvision; texts of prompts come from the installed
transformers.
"""

import json
import types

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl import (
  configuration_qwen3_vl,
  modeling_qwen3_vl,
  processing_qwen3_vl,
)

from cacovid_jax import errors
from cacovid_jax.data import frames as frames_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.inference import prompts as prompts_lib
from cacovid_jax.models import (
  checkpoints,
  qwen2_5_vl_layout,
  qwen3_vl_processor,
  token_grid,
  video_llm,
)
from cacovid_jax.synthetic import tiny_checkpoints
from tests.golden import make_processors as golden
from tests.models import processors_test

GOLDEN = processors_test.GOLDEN
Processor = qwen3_vl_processor.Qwen3VLProcessor
TINY = Processor.tiny()
HUB = {
  "size": {"shortest_edge": 4096, "longest_edge": 25165824},
  "patch_size": 16,
  "temporal_patch_size": 2,
  "merge_size": 2,
  "image_mean": [0.5] * 3,
  "image_std": [0.5] * 3,
  "video_processor_type": "Qwen3VLVideoProcessor",
}


@pytest.mark.parametrize("index", range(len(golden.QWEN3)))
def test_pixels_of_the_reference_within_a_level(index):
  F, h, w, least, most, tokens = golden.QWEN3[index]
  capped = dict(cap_pixels_per_frame=True, max_video_tokens=tokens)
  bounds = dict(min_pixels=least, max_pixels=most)
  processor = Processor(**bounds, **capped if tokens else {})
  got = processor(golden.noise(index, F, h, w), fps=2.0)
  T, H, W = GOLDEN[f"qwen3_{index}_grid_thw"].tolist()
  assert got.grid == processor.grid(F, h, w) == (T, H // 2, W // 2)
  processors_test._check_levels(
    (got.values + 1) * 127.5, GOLDEN[f"qwen3_{index}"]
  )


def test_sizes_of_the_reference():
  for F, h, w, least, most, height, width in GOLDEN["qwen3_sizes"].tolist():
    processor = Processor(min_pixels=least, max_pixels=most)
    assert processor.frame_size(h, w, F) == (height, width)
    if min(height, width) > processor.factor and least < most:
      assert height * width // 1024 <= processor.patch_tokens(F)[1]


def test_frames_of_the_reference():
  clips = zip(GOLDEN["qwen3_clips"], GOLDEN["qwen3_samples"], strict=True)
  rule = frames_lib.FrameRule(64, frames_lib.RATE_RULE)
  for (count, rate), expected in clips:
    got = rule(int(count), count / rate)
    np.testing.assert_array_equal(got, expected[expected >= 0])
    # Whatever the quotient's last bit is.
    assert frames_lib.source_fps(int(count), count / rate) == rate
  assert (rule.num_frames, rule.fewest) == (64, 4)
  assert frames_lib.FrameRule(8).fewest == 8
  with pytest.raises(errors.UserError, match="give its rate, or a fixed"):
    frames_lib.linspace_at(100, 0.0)


def test_limits_are_those_of_the_clips_own_file(tmp_path):
  (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 65536}')
  # Of images: their limits would be a hundredth of a clip's.
  with pytest.raises(errors.UserError, match="no video_preprocessor_config"):
    Processor.from_files(tmp_path)
  path = tmp_path / "video_preprocessor_config.json"
  path.write_text(json.dumps(HUB))
  found = Processor.from_files(tmp_path)
  assert found == Processor(min_pixels=4096, max_pixels=25165824)
  assert found.with_paper_bounds().patch_tokens(32) == (1, 256)
  assert found.with_bounds(5000, 6000).max_pixels == 6000
  assert "cap_pixels_per_frame=False" in found.identity
  path.write_text(json.dumps(HUB | {"cap_pixels_per_frame": True}))
  assert Processor.from_files(tmp_path).cap_pixels_per_frame
  # Without the keys of videos: the class's defaults, as in the reference.
  path.write_text("{}")
  assert Processor.from_files(tmp_path) == Processor()


@pytest.mark.parametrize(
  ("frames", "options", "message"),
  [
    (np.zeros((1, 64, 64, 3), np.uint8), dict(fps=2.0), "show more frames"),
    (np.zeros((2, 64, 64, 3), np.uint8), {}, "give fps"),
    (np.zeros((2, 3, 700, 3), np.uint8), dict(fps=2.0), "longer than 200"),
    (np.zeros((2, 64, 64, 3), np.uint8), dict(fps=0.0), "a positive number"),
  ],
)
def test_clips_that_cannot_be_shown_are_one_line(frames, options, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    TINY(frames, **options)
  assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """Returns (model, tokenizer) of a tiny checkpoint."""
  folder = tmp_path_factory.mktemp("tiny") / "qwen3_vl"
  tiny_checkpoints.write_tiny(folder, "qwen3_vl")
  model = checkpoints.make_model(checkpoints.load_config(folder))
  assert model.read_processor(folder) == TINY
  return model, tokenizer_lib.Tokenizer.from_directory(folder)


def test_patches_of_a_file_without_sizes_are_one_line(tiny, tmp_path):
  (tmp_path / "video_preprocessor_config.json").write_text("{}")
  model = tiny[0]
  frames = np.zeros((4, 64, 64, 3), np.uint8)
  released = model.read_processor(tmp_path)(frames, fps=2.0)
  with pytest.raises(errors.UserError, match="1536 numbers, not 96") as caught:
    model.tower_inputs(released)
  assert "\n" not in str(caught.value)
  assert model.tower_inputs(TINY(frames, fps=2.0)).layout is not None


def _reference_clip(grid, indices, fps):
  """Returns what transformers writes in the placeholder's place."""
  own = processing_qwen3_vl.Qwen3VLProcessor
  stub = types.SimpleNamespace(
    video_token="<|video_pad|>",
    vision_start_token="<|vision_start|>",
    vision_end_token="<|vision_end|>",
    video_processor=types.SimpleNamespace(merge_size=2, temporal_patch_size=2),
    _calculate_timestamps=lambda *x: own._calculate_timestamps(None, *x),
  )
  clip = types.SimpleNamespace(fps=fps, frames_indices=list(indices))
  T, H, W = grid
  given = dict(
    video_grid_thw=np.array([[T, 2 * H, 2 * W]]), video_metadata=[clip]
  )
  return own.replace_video_token(stub, given, 0)


@pytest.mark.parametrize("fps", [2.0, 24.0, 30000 / 1001, 30.0, 60.0])
@pytest.mark.parametrize("outer", [False, True])
def test_prompts_are_the_reference_s(tiny, fps, outer):
  model, tokenizer = tiny
  model = model.with_outer_vision_tags(outer)
  count = 1000
  for taken in (2, 5, 16):
    indices = np.rint(np.linspace(0, count - 1, taken)).astype(int)
    frames = np.zeros((taken, 16, 24, 3), np.uint8)
    rate = frames_lib.source_fps(count, count / fps)
    inputs = TINY(frames, fps=1.0, times=indices / rate)
    grid = inputs.grid
    prompt = model.encode_prompt(
      tokenizer, "Why?", grid, inputs.second_per_grid_t
    )
    clip = _reference_clip(grid, indices, fps)
    # 4.57 replaces the marks of the template, too; 5.10 does not.
    if outer:
      clip = f"<|vision_start|>{clip}<|vision_end|>"
    rendered = tokenizer.render("Why?")
    block = "<|vision_start|><|video_pad|><|vision_end|>"
    assert prompt.ids.tolist() == tokenizer.encode(
      rendered.replace(block, clip)
    )
    rows = np.flatnonzero(prompt.ids == model.config.video_token_id)
    np.testing.assert_array_equal(prompt.video_rows, rows)
    start, end = prompts_lib.question_span(prompt, tokenizer)
    assert tokenizer.decode(prompt.ids[start:end]).strip() == "Why?"
  assert model.told["outer_vision_tags"] is outer


def test_another_rate_changes_the_text_and_no_position(tiny):
  model, tokenizer = tiny
  frames = np.zeros((4, 16, 24, 3), np.uint8)
  found = []
  for fps in (2.0, 1.0):
    inputs = TINY(frames, fps=fps)
    prompt = model.encode_prompt(
      tokenizer, "Why?", inputs.grid, inputs.second_per_grid_t
    )
    found.append((prompt, model.positions(prompt.ids, inputs)))
  (fast, (places, following)), (slow, (others, after)) = found
  assert len(fast.ids) == len(slow.ids) and (fast.ids != slow.ids).any()
  np.testing.assert_array_equal(places, others)
  assert following == after
  # A program takes no times: they would be arguments of it.
  assert model.tower_inputs(inputs).second_per_grid_t == 1.0


@pytest.mark.parametrize("grid", [(1, 1, 1), (3, 2, 3), (4, 3, 2), (2, 1, 5)])
def test_positions_are_the_reference_s(tiny, grid):
  model, tokenizer = tiny
  prompt = model.encode_prompt(tokenizer, "Where?", grid, (0.5,) * grid[0])
  video = video_llm.VideoFeatures(None, grid)
  got, following = model.positions(prompt.ids, video)
  own = modeling_qwen3_vl.Qwen3VLModel
  config = configuration_qwen3_vl.Qwen3VLConfig(
    vision_config=dict(spatial_merge_size=2)
  )
  stub = types.SimpleNamespace(
    config=config,
    get_vision_position_ids=lambda *x, **y: own.get_vision_position_ids(
      None, *x, **y
    ),
  )
  kinds = np.where(prompt.ids == model.config.video_token_id, 2, 0)
  T, H, W = grid
  expected, delta = own.get_rope_index(
    stub,
    torch.from_numpy(prompt.ids.astype(np.int64))[None],
    mm_token_type_ids=torch.from_numpy(kinds)[None],
    video_grid_thw=torch.tensor([[T, 2 * H, 2 * W]]),
    attention_mask=torch.ones((1, len(kinds)), dtype=torch.long),
  )
  np.testing.assert_array_equal(got, expected[:, 0].numpy())
  assert following - len(kinds) == int(delta)


def test_prompts_and_videos_that_do_not_belong_together(tiny):
  model, tokenizer = tiny
  prompt = model.encode_prompt(tokenizer, "Where?", (2, 2, 3), (0.5, 1.5))
  for grid in ((1, 2, 3), (2, 2, 2), (3, 2, 2), None):
    video = grid and video_llm.VideoFeatures(None, grid)
    with pytest.raises(errors.UserError, match="temporal patch"):
      model.positions(prompt.ids, video)
  text = tokenizer.encode("no clip")
  positions, following = model.positions(text, None)
  assert following == len(text) and (positions == np.arange(len(text))).all()
  with pytest.raises(errors.UserError, match="outer_vision_tags is for"):
    video_llm.VideoLLM.with_outer_vision_tags(model, True)
  # A placeholder of an image is no clip's.
  with pytest.raises(errors.UserError, match="stands for the clip"):
    model.encode_prompt(tokenizer, "<|video_pad|>", (1, 1, 1), (0.0,))
  with pytest.raises(errors.UserError, match="an image's placeholder"):
    model.encode_prompt(tokenizer, "See <|image_pad|>", (1, 1, 1), (0.0,))


def test_clips_of_many_lengths_and_shapes_share_buckets():
  processor = Processor(min_pixels=4096, max_pixels=2**22)
  rule = frames_lib.FrameRule(64, frames_lib.RATE_RULE)
  buckets = token_grid.make_buckets((), processor, rule)
  assert len(buckets) <= 5
  used = set()
  for frames in range(4, 65):
    for size in ((720, 1280), (1280, 720), (480, 480), (300, 1000)):
      grid = processor.grid(frames, *size)
      used.add(token_grid.pick(grid, buckets))
  assert used <= set(buckets)


def test_the_table_of_positions_is_interpolated_bilinearly():

  rng = np.random.default_rng(0)
  for height, width, side in ((4, 6, 5), (6, 4, 5), (2, 2, 7), (1, 3, 4)):
    places = np.indices((height, width)).reshape(2, -1)
    index, weight = qwen2_5_vl_layout.interpolate(
      places, np.array([height, width]), side
    )
    table = rng.standard_normal((1, 3, side, side))
    expected = torch.nn.functional.interpolate(
      torch.from_numpy(table),
      (height, width),
      mode="bilinear",
      align_corners=True,
    )
    rows = table.reshape(3, -1).T
    got = (rows[index] * weight[..., None]).sum(axis=0)
    np.testing.assert_allclose(
      got, expected.reshape(3, -1).T.numpy(), atol=1e-6
    )
  same = qwen2_5_vl_layout.interpolate(
    np.indices((5, 5)).reshape(2, -1), np.array([5, 5]), 5
  )
  np.testing.assert_allclose(same.weight[0], 1.0)
  np.testing.assert_array_equal(same.index[0], np.arange(25))
