"""The tokenizer that is trained for the embedded benchmark's base model."""

import json

import pytest

from cacovid_jax import errors
from cacovid_jax.data import tokenizer as tokenizer_lib
from cacovid_jax.models import processors
from cacovid_jax.synthetic import tokenizer as tokenizer_training
from tests.data import tokenizers_for_tests as toks


def test_the_order_of_the_texts_does_not_matter(tmp_path):
  tokenizer_training.train(toks.TEXTS, 330, tmp_path / "a")
  tokenizer_training.train(toks.TEXTS[::-1], 330, tmp_path / "b")
  names = sorted(path.name for path in (tmp_path / "a").iterdir())
  assert names == [
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
  ]
  for name in names:
    first = (tmp_path / "a" / name).read_bytes()
    assert first == (tmp_path / "b" / name).read_bytes(), name


def test_special_tokens_get_the_last_ids_and_no_merges(tmp_path):
  texts = ["<|im_start|>user\n<video>\nWhat?<|im_end|>\n"] * 50
  trained = tokenizer_training.train(texts, 300, tmp_path)
  size = trained.get_vocab_size()
  assert size <= 300
  ids = [trained.token_to_id(t) for t in tokenizer_training.SPECIAL_TOKENS]
  assert ids == list(range(size - 5, size))
  model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
  merged = {"".join(pair) for pair in model["merges"]}
  assert "user" in merged
  assert not any("im_" in token or "video" in token for token in merged)


def test_every_text_can_be_encoded(tmp_path):
  trained = tokenizer_training.train(["abc"], 261, tmp_path)
  text = "Ω ≠ 漢字\t\x00 it's 2026\r\n"
  ids = trained.encode(text, add_special_tokens=False).ids
  assert trained.decode(ids) == text


def test_processor_files_carry_the_image_size(tmp_path):
  toks.write(tmp_path, image_size=56)
  got = processors.LlavaOnevisionProcessor.from_files(tmp_path)
  assert got == processors.LlavaOnevisionProcessor(image_size=56)


def test_a_vocabulary_without_room_for_all_bytes_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match="give at least 261"):
    tokenizer_training.train(["abc"], 260, tmp_path)


def test_the_directory_is_what_our_own_reader_takes(tmp_path):
  tokenizer = tokenizer_lib.Tokenizer.from_directory(toks.write(tmp_path))
  assert tokenizer.vocab_size == 320
  assert tokenizer.letter_id("A") >= 0
