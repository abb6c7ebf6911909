"""The installed transformers as an oracle of sizes, pixels, texts and ids.

Its video processors need torchvision, so that what they give is stored (see
models/processors_test.py); the image processor on PIL does the same to one
frame.
"""

import json

import numpy as np
import pytest
import transformers
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

from cacovid_jax.data import chat_template as chat_template_lib
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import processors

from . import tokenizers_for_tests as toks

TURNS = [
  {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
  {
    "role": "user",
    "content": [
      {"type": "text", "text": "Look: "},
      {"type": "video"},
      {"type": "text", "text": "What <b>colour</b>?\n\n 'é' 好"},
    ],
  },
  {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
  {"role": "user", "content": [{"type": "text", "text": "And\tthen?"}]},
]


def test_sides_are_those_of_the_reference():
  rng = np.random.default_rng(0)
  for _ in range(3000):
    height, width = (int(x) for x in np.exp(rng.uniform(0, 8.5, 2)))
    if max(height, width) > 200 * min(height, width):
      continue
    factor = int(rng.choice([8, 28, 32]))
    low, high = sorted(int(x) for x in rng.integers(1, 2000, 2) * factor**2)
    assert processors.smart_resize(
      height, width, factor=factor, min_pixels=low, max_pixels=high
    ) == image_processing_pil_qwen2_vl.smart_resize(
      height, width, factor, low, high
    )


@pytest.mark.parametrize(
  "height, width", [(150, 100), (40, 61), (56, 84), (1000, 300)]
)
def test_pixels_of_a_still_are_those_of_the_image_processor(
  tmp_path, height, width
):
  reference = image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(
    min_pixels=9 * 784, max_pixels=12 * 784, image_mean=[0.4, 0.5, 0.6]
  )
  reference.save_pretrained(tmp_path)
  config = processors.Qwen2_5VLProcessor.from_files(tmp_path)
  assert config.mean == (0.4, 0.5, 0.6)
  assert config.max_pixels == 12 * 784
  rng = np.random.default_rng(height)
  frame = rng.integers(0, 256, (height, width, 3), np.uint8)
  expected = reference(images=[frame], return_tensors="np")
  got = config(frame[None])
  T, H, W = got.grid
  assert [[T, 2 * H, 2 * W]] == expected["image_grid_thw"].tolist()
  assert got.values.shape == expected["pixel_values"].shape
  # One level: the order of PIL's passes is its own (see frames.resize_frame).
  difference = np.abs(got.values - expected["pixel_values"])
  levels = difference.reshape(len(difference), 3, -1).max(axis=(0, 2))
  assert (levels < 1.001 / 255 / np.array(config.std)).all()


@pytest.mark.parametrize(
  "template", [toks.QWEN_TEMPLATE, toks.HUB_TEMPLATE, None]
)
@pytest.mark.parametrize("generation", [True, False])
def test_conversations_are_rendered_alike(tmp_path, template, generation):
  toks.write(tmp_path, template=template)
  ours = tokenizer_lib.Tokenizer.from_directory(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  text, _ = chat_template_lib.read(tmp_path)
  assert ours.render_messages(TURNS, generation) == theirs.apply_chat_template(
    TURNS, chat_template=text, tokenize=False, add_generation_prompt=generation
  )


@pytest.mark.parametrize(
  "text",
  [
    "{{ messages | tojson }}{{ bos_token }}{{ eos_token }}",
    "{{ messages | tojson(indent=2) }}",
    "  {%- for m in messages %}\n  {{ m.role }}\n  {% endfor %}\n x",
    "{% for m in messages %}{{ loop.index0 ~ m['role'] }}{% if loop.last %}."
    "{% else %}{% continue %}{% endif %}{% endfor %}",
    "{{ messages[1:] | map(attribute='role') | join(', ') | title }}",
  ],
)
def test_the_environment_is_that_of_the_reference(tmp_path, text):
  toks.write(tmp_path, template=text)
  ours = tokenizer_lib.Tokenizer.from_directory(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  assert ours.render_messages(TURNS) == theirs.apply_chat_template(
    TURNS, tokenize=False, add_generation_prompt=True
  )


def test_ids_of_a_qwen_prompt_are_those_of_the_reference(tmp_path):
  toks.write_qwen(tmp_path)
  ours = tokenizer_lib.Tokenizer.from_directory(tmp_path)
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  question = "Which shape?\nA. circle\nB. star 好"
  entry = json.loads((tmp_path / "chat_template.json").read_text())
  content = [{"type": "video"}, {"type": "text", "text": question}]
  text = theirs.apply_chat_template(
    [{"role": "user", "content": content}],
    chat_template=entry["chat_template"],
    tokenize=False,
    add_generation_prompt=True,
  )
  # As the reference's processor expands it: t h w / 4 copies, no newline.
  text = text.replace("<|video_pad|>", "<|video_pad|>" * (2 * 4 * 6 // 4))
  got = ours.encode_prompt(question, 12)
  assert got.ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]


def test_ids_of_the_papers_evaluation_are_those_of_the_reference(tmp_path):
  toks.write(tmp_path, template=toks.STRING_TEMPLATE)
  ours = tokenizer_lib.Tokenizer.from_directory(tmp_path, template="tokenizer")
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
  question = "Which shape?\nOnly give the best option.\nBest option: ("
  text = theirs.apply_chat_template(
    [{"role": "user", "content": f"<video>\n{question}"}],
    tokenize=False,
    add_generation_prompt=True,
  )
  assert ours.render(question) == text
  # 2 frames of 4 x 4 tokens and the newline.
  text = text.replace("<video>", "<video>" * 33)
  got = ours.encode_prompt(question, 32)
  assert got.ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
