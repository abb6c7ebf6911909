r"""CaCoVID on the embedded benchmark, one GPU.

python -m cacovid_jax.prepare --out workdirs/data --variants dense,sparse \
    --clips 1600,100,320,320
python -m cacovid_jax.train --config configs/synthetic_small.py:seed=0 \
    --workdir workdirs/small_s0
Smoke test on CPU: `configs/synthetic_small.py:debug`.
"""

from cacovid_jax.training import defaults
from configs import common


def get_config(arg=None):
  arg = common.parse_arg(
    arg, debug=False, seed=42, variant="dense", ratio=0.05, reward="accuracy"
  )
  config = defaults.get_config()
  config.seed = arg.seed
  config.total_steps = 2 if arg.debug else 400
  config.videos_per_step = 1 if arg.debug else 16
  config.iterations = 2 if arg.debug else 5
  config.log_every = 1 if arg.debug else 10
  config.sampling.ratio = arg.ratio
  config.sampling.num_combinations = 4 if arg.debug else 32
  config.ratio.adaptive = False
  config.optimizer.lr_heads = 3e-4
  config.optimizer.lr_layer = 3e-4
  config.objective.log_ratio_clamp = 1.1
  # A letter and the end of the turn.
  config.rollout.max_new_tokens = 2
  config.rollout.reward = arg.reward
  dtype = "float32" if arg.debug else "bfloat16"
  config.model.path = "cacovid_jax/assets/base_model"
  config.model.dtype = config.policy.dtype = dtype
  config.data.root = f"workdirs/data/{arg.variant}"
  config.data.tfds = "tfds"
  config.data.num_frames = 16
  config.data.max_text_tokens = 64
  config.data.feature_cache = "workdirs/features"
  config.data.decisive_file = "decisive.jsonl"
  config.data.num_workers = 0 if arg.debug else 12
  config.data.memory_items = 2000
  return config
