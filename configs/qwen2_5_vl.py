r"""CaCoVID on Qwen2.5-VL, 32 frames: `:size=7b` or `:size=3b`.

Weights: Qwen/Qwen2.5-VL-7B-Instruct and -3B-Instruct
in checkpoints/qwen2_5_vl_SIZE.

python -m cacovid_jax.train --config configs/qwen2_5_vl.py:size=3b \
    --workdir workdirs/qwen2_5_vl_3b

Rows, recipes, the benchmarks, several GPUs and a run in seconds on a CPU are as
in configs/llava_onevision.py, with the names of this file and family.

Paper, 3B: mean accuracy of LongVideoBench, MLVU dev, MLVU test and VideoMME, in
%, and as a share of vanilla's 55.6: 54.2 (97.5) at a ratio of 25 %, 53.9 (96.9)
at 20 %, 52.5 (94.4) at 15 %, 52.0 (93.4) at 10 %. It has no numbers of 7B in
its main tables.
Ours: not run here: needs the weights.
"""

from configs import common


def get_config(arg=None):
  return common.released(arg, family="qwen2_5_vl", sizes=("3b", "7b"))
