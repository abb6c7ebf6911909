"""A tokenizer directory for tests."""

import json

from cacovid_jax.data import tokenizer_training

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
