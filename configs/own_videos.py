r"""A policy for one's own videos: a folder of clips and a table of questions.

python -m cacovid_jax.train --config configs/own_videos.py:data=FOLDER \
    --workdir workdirs/own
python -m cacovid_jax.evaluate --config configs/own_videos.py:data=FOLDER \
    --workdir workdirs/own

FOLDER holds the clips and questions.csv or questions.json, with the columns of
docs/own_videos.md. Without a model, the small one of the embedded benchmark is
trained for, from its shipped policy, on two CPU cores: enough to see that the
folder is read well, and no model of real videos. `:data=FOLDER,model=DIR` takes
a checkpoint directory and the paper's settings; `:debug` is done in a minute.
"""

from cacovid_jax import base_config
from configs import common

_ASSETS = "cacovid_jax/assets"


def get_config(arg=None):
  arg = common.parse_arg(arg, data="videos", model="", debug=False)
  config = base_config.get_config()
  config.data.root = arg.data
  config.data.reader = "own"
  config.data.feature_cache = "workdirs/own_features"
  config.total_steps = 2 if arg.debug else 500
  config.log_every = 1 if arg.debug else 10
  config.ckpt.every_steps = 1 if arg.debug else 100
  config.model.path = arg.model or f"{_ASSETS}/base_model"
  if not arg.model:
    # The settings of the shipped model, see configs/synthetic.py.
    config.model.dtype = config.policy.dtype = "float32"
    config.data.num_frames = 16
    config.iterations = 3
    config.sampling.ratio = 0.1
    config.ratio.adaptive = False
    config.objective.log_ratio_clamp = 1.1
    config.objective.kl_weight = 0.1
    config.optimizer.lr_heads = 3e-4
    config.optimizer.lr_layer = 3e-6
    config.policy.num_halvings = 0
    config.policy.init = f"{_ASSETS}/policy/policy.safetensors"
    config.rollout.max_new_tokens = 8
  if arg.debug:
    config.iterations = 1
    config.sampling.num_combinations = 4
  config.evals.benchmark = "own"
  config.evals.methods = ("cacovid", "cacovid_untrained", "uniform", "divprune")
  config.evals.oracles = ()
  config.evals.ratios = (0.1,) if arg.debug else (0.25, 0.1)
  config.evals.select_on = "none"
  config.evals.num_examples = 2 if arg.debug else 8
  return config
