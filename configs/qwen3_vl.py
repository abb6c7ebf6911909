r"""CaCoVID on Qwen3-VL, 32 frames: `:size=2b`, `:size=4b` or `:size=8b`.

Weights: Qwen/Qwen3-VL-2B-Instruct, -4B-Instruct and -8B-Instruct
in checkpoints/qwen3_vl_SIZE.

python -m cacovid_jax.train --config configs/qwen3_vl.py:size=2b \
    --workdir workdirs/qwen3_vl_2b

Rows, the benchmarks, several GPUs and a run in seconds on a CPU are as in
configs/llava_onevision.py, with the names of this file and family.

The paper has no numbers of this model.
Ours: not run here: needs the weights.
"""

from configs import common


def get_config(arg=None):
  return common.released(arg, family="qwen3_vl", sizes=("2b", "4b", "8b"))
