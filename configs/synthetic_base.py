r"""The base model of the embedded benchmark: a small LLaVA-OneVision.

python -m cacovid_jax.pretrain --config configs/synthetic_base.py \
    --workdir workdirs/base
Smoke test on CPU in two minutes: `configs/synthetic_base.py:debug`.

See cacovid_jax/assets/base_model/README.md for what the shipped one reached.
"""

import ml_collections

from cacovid_jax.synthetic import questions
from configs import common


def get_config(arg=None):
  arg = common.parse_arg(arg, debug=False)
  config = ml_collections.ConfigDict()
  config.vocab_size = 576
  # Widths divisible by 16, so that the policy's heads can halve four times.
  config.vision = dict(
    hidden_size=32 if arg.debug else 128,
    intermediate_size=64 if arg.debug else 256,
    num_layers=1 if arg.debug else 4,
    num_heads=4,
    image_size=112,
    patch_size=8,
  )
  # Twelve thin layers, so that methods which act inside the decoder have a
  # depth to act in.
  config.text = dict(
    hidden_size=32 if arg.debug else 128,
    intermediate_size=64 if arg.debug else 256,
    num_layers=2 if arg.debug else 12,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8 if arg.debug else 32,
    rope_theta=1e4,
    max_positions=4096,
  )
  config.dtype = "float32" if arg.debug else "bfloat16"
  # "xla" needs rematerialisation: it stores every attention map.
  config.attention = "xla" if arg.debug else "cudnn"
  config.remat = False
  config.pretrain = _pretrain(arg.debug)
  return config


def _pretrain(debug):
  """Returns the training's settings."""
  return dict(
    seed=0,
    num_steps=2 if debug else 7000,
    lr=1.2e-3,
    warmup_steps=1 if debug else 300,
    weight_decay=0.05,
    min_keep=16,  # Tokens kept in the pruned loss: uniform over this range.
    num_keep=78,
    # Shares of its rows: decisive tokens missing, others on objects, merged.
    lossy_share=0.2,
    crowded_share=0.4,
    merged_share=0.5 if debug else 0.2,
    asked_questions=2,  # Questions of a clip that the asked loss looks at.
    weights=dict(
      full=1.0, pruned=1.0, told=0.5, labels=1.0, size=0.1, asked=1.0
    ),
    packing=dict(
      batch_size=2 if debug else 64,
      questions_per_clip=2 if debug else 8,
      text_only=2 if debug else 128,
      sparse_share=0.4,
      kind_shares=questions.SHARES,
      dense_objects=(128, 136),
      text_answer_share=(0.5, 0.2),
      ramp_steps=2400,
    ),
    log_every=1 if debug else 200,
    probe_every=2 if debug else 1750,
    probe_clips=1 if debug else 64,
    num_workers=0 if debug else 26,
  )
