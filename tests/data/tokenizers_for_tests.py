"""A tokenizer directory for tests."""

import json

import tokenizers

from cacovid_jax.synthetic import tokenizer as tokenizer_training

TEXTS = (
  "user\nWhat colour is the square?\nA. red\nB. blue\nassistant\nA",
  "user\nWhich shape appears first?\nA. circle\nB. star\nassistant\nB",
  " Please provide only the single option letter (e.g., A, B, C, D, etc.).",
)

# The form of Qwen2's tokenizer: a plain string and a default system turn.
STRING_TEMPLATE = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] !="
  " 'system' %}{{ '<|im_start|>system\nYou are a helpful"
  " assistant.<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] +"
  " '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The form of the hub's LLaVA-OneVision processors.
HUB_TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
  "{# Videos first #}{% for content in message['content'] |"
  " selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
  "{% if message['role'] != 'assistant' %}{% for content in"
  " message['content'] | selectattr('type', 'equalto', 'text') %}"
  "{{ '\n' + content['text'] }}{% endfor %}{% else %}{% for content in"
  " message['content'] | selectattr('type', 'equalto', 'text') %}"
  "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}"
  "{% endfor %}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The form of the hub's Qwen2.5-VL processors: a default system turn, content
# items in the order given, counters that only matter with several clips.
QWEN_TEMPLATE = (
  "{% set clips = namespace(value=0) %}{% for message in messages %}"
  "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
  "You are a helpful assistant.<|im_end|>\n{% endif %}"
  "<|im_start|>{{ message['role'] }}\n"
  "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
  "{% else %}{% for item in message['content'] %}"
  "{% if item['type'] == 'video' or 'video' in item %}"
  "{% set clips.value = clips.value + 1 %}{% if add_vision_id %}Video"
  " {{ clips.value }}: {% endif %}"
  "<|vision_start|><|video_pad|><|vision_end|>"
  "{% elif 'text' in item %}{{ item['text'] }}{% endif %}{% endfor %}"
  "<|im_end|>\n{% endif %}{% endfor %}"
  "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TOKENS = (
  "<|endoftext|>",
  "<|im_start|>",
  "<|im_end|>",
  "<|vision_start|>",
  "<|vision_end|>",
  "<|image_pad|>",
  "<|video_pad|>",
)


def write_qwen(directory, drop=()):
  """Writes a small tokenizer of Qwen2.5-VL, without the tokens of `drop`."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(TEXTS, trainer)
  tokenizer.add_special_tokens([t for t in QWEN_TOKENS if t not in drop])
  tokenizer.save(str(directory / "tokenizer.json"))
  files = {
    "config.json": {
      "model_type": "qwen2_5_vl",
      "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
      "max_position_embeddings": 128,
    },
    "tokenizer_config.json": {
      "eos_token": "<|im_end|>",
      "pad_token": "<|endoftext|>",
      "chat_template": STRING_TEMPLATE,
      "tokenizer_class": "PreTrainedTokenizerFast",
    },
    "chat_template.json": {"chat_template": QWEN_TEMPLATE},
  }
  for name, entry in files.items():
    (directory / name).write_text(json.dumps(entry))
  return directory


def write(directory, vocab_size=320, template=None, **options):
  """Writes a small tokenizer; `template` replaces every chat template."""
  tokenizer_training.train(TEXTS, vocab_size, directory, **options)
  if template is not None:
    (directory / "chat_template.jinja").unlink()
    (directory / "chat_template.json").unlink()
    path = directory / "tokenizer_config.json"
    entry = json.loads(path.read_text())
    entry["chat_template"] = template
    path.write_text(json.dumps(entry))
  return directory
