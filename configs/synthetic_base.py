r"""The base model of the embedded benchmark: a small LLaVA-OneVision.

python -m cacovid_jax.pretrain --config configs/synthetic_base.py \
    --workdir workdirs/base
Smoke test on CPU in two minutes: `configs/synthetic_base.py:debug`.

See cacovid_jax/assets/base_model/README.md for what the shipped one reached.

`:geometry=full`: 32 frames of 14 x 14 tokens, for `configs/synthetic_full.py`;
2.5 M parameters, 5 MB. Two stages of eight frames, then one of 32: 22 minutes
on one H200, 66 % of crowded questions and 75 of plain ones (docs/results.md).

python -m cacovid_jax.pretrain --workdir workdirs/base_full_1 \
    --config configs/synthetic_base.py:geometry=full
python -m cacovid_jax.pretrain --workdir workdirs/base_full_2 \
    --config configs/synthetic_base.py:geometry=full,stage=2
python -m cacovid_jax.pretrain --workdir workdirs/base_full \
    --config configs/synthetic_base.py:geometry=full,stage=3

`:family=qwen3_vl`: a small Qwen3-VL, which sees 32 frames of 224 x 224 pixels
as 16 x 7 x 7 tokens, for `configs/synthetic.py:family=qwen3_vl`, in two stages
that answer 79 and 87 % of dense questions (docs/results.md).

python -m cacovid_jax.pretrain --workdir workdirs/base_qwen3_vl_1 \
    --config configs/synthetic_base.py:family=qwen3_vl
python -m cacovid_jax.pretrain --workdir workdirs/base_qwen3_vl \
    --config configs/synthetic_base.py:family=qwen3_vl,stage=2
"""

import ml_collections

from cacovid_jax.synthetic import questions, world
from configs import common


def get_config(arg=None):
  arg = common.parse_arg(
    arg, debug=False, geometry="small", family="llava_onevision", stage="1"
  )  # fmt: skip
  common.check_size(arg.geometry, ("small", "full"))
  families = ("llava_onevision", "qwen3_vl")
  # At the paper's geometry there is one.
  common.check_size(arg.family, families[: 1 + (arg.geometry == "small")])
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
  if arg.geometry == "full":
    _make_full(config, arg.debug, arg.stage)
  if arg.family != "llava_onevision":
    config.family = arg.family
    _make_qwen3_vl(config, arg.debug)
  stages = "12" if "family" in config else "1"
  stages = "123" if arg.geometry == "full" else stages
  common.check_size(arg.stage, tuple(stages))
  if arg.stage != "1":
    name = arg.geometry if arg.geometry == "full" else arg.family
    first = f"base_{name}{'_debug' * arg.debug}_{int(arg.stage) - 1}"
    _go_on(config.pretrain, f"workdirs/{first}/base_model", arg.debug)
    if arg.geometry == "full" and arg.stage == "2":
      config.pretrain.weights.asked, config.pretrain.lr = 1.0, 1.2e-3
      config.pretrain.asked_questions = 1 if arg.debug else 2
    elif arg.geometry == "full" and not arg.debug:
      config.pretrain.num_steps = 1600
  return config


def _make_qwen3_vl(config, debug):
  """Takes Qwen3-VL's tower and decoder, as deep and as wide."""
  config.vocab_size = 608
  del config.vision.image_size
  config.vision.patch_size = 16
  config.vision.num_positions = 14 * 14
  config.vision.deep_layers = (0,) if debug else (1, 2)
  config.text.rope_sections = (2, 1, 1) if debug else (6, 5, 5)
  config.pretrain.norm_scale, config.pretrain.norm_rate = 1.5, 10.0
  config.pretrain.num_steps = 2 if debug else 3300


def _go_on(pretrain, first, debug):
  """Has the first layer, a policy's begin, match tokens and questions."""
  pretrain.init = first
  pretrain.weights.asked, pretrain.packing.ramp_steps = 4.0, 1
  pretrain.packing.text_answer_share = (0.2, 0.2)
  if not debug:
    pretrain.num_steps, pretrain.asked_questions = 2200, 4
    pretrain.lr, pretrain.warmup_steps = 8e-4, 150


def _make_full(config, debug, stage):
  """Takes the paper's frames of 14 x 14 tokens, and what is asked there.

  Eight of them at first, where a step takes as long and answers four times as
  many questions; 32 in the last stage.
  """
  config.vocab_size = 640
  config.vision.image_size = world.FULL.image_size
  config.text.max_positions = 8192
  pretrain, packing = config.pretrain, config.pretrain.packing
  names = ("full", "plain") if stage == "3" else ("full8", "plain8")
  full = world.VARIANTS[names[0]]
  packing.variants, packing.dense_objects = names, full.num_objects
  # From a hundredth to a tenth of the tokens; with those of a question an even
  # number, or cuDNN's attention would not differentiate.
  pretrain.min_keep = full.stage.num_tokens // 100
  pretrain.num_keep = full.stage.num_tokens // 20 * 2
  pretrain.probe_clips = 1 if debug else 32
  packing.kind_shares = full.kind_shares
  packing.max_decisive = 128
  packing.question_length = 112
  packing.text_only_length = 256
  packing.batch_size, packing.text_only = (1, 2) if debug else (64, 128)
  if debug:
    pretrain.asked_questions = 1
  else:
    pretrain.num_steps, packing.ramp_steps = 3000, 1500
  if stage == "3" and not debug:  # A clip has four times the tokens.
    packing.batch_size, packing.text_only = 16, 64


def _pretrain(debug):
  """Returns the training's settings."""
  return dict(
    seed=0,
    init="",  # A base model to begin from, of an earlier run; empty draws one.
    num_steps=2 if debug else 7000,
    lr=1.2e-3,
    warmup_steps=1 if debug else 300,
    weight_decay=0.05,
    norm_scale=1.0,  # Of Qwen3's norms of queries and keys, in the beginning.
    norm_rate=1.0,  # Times lr, is theirs.
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
