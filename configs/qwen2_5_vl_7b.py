r"""CaCoVID on Qwen2.5-VL-7B, 32 frames.

Weights: Qwen/Qwen2.5-VL-7B-Instruct
in checkpoints/qwen2_5_vl_7b. Rows: Video-R1 in datasets/video_r1;
its filtered.json, without what the model answers unseen, is written by
`cacovid_jax.preparation.blind_filter`.

python -m cacovid_jax.train --config configs/qwen2_5_vl_7b.py \
    --workdir workdirs/qwen2_5_vl_7b
python -m cacovid_jax.evaluate --config configs/qwen2_5_vl_7b.py \
    --policy workdirs/qwen2_5_vl_7b --benchmark videomme \
    --data datasets/videomme --workdir workdirs/qwen2_5_vl_7b/videomme

The other benchmarks: --benchmark longvideobench, mlvu_dev, mlvu_test, each
with a folder and a workdir of its own; all four and their average:
experiments.main_table. Several GPUs: `:devices=8`, one video each; several
machines: experiments/launch.

In seconds on a CPU, with random weights:

python -m cacovid_jax.prepare --out workdirs/tiny --clips 2,0,2,0 \
    --nodecisive --tiny_models qwen2_5_vl
python -m cacovid_jax.train --config configs/qwen2_5_vl_7b.py:debug \
    --workdir workdirs/tiny/qwen2_5_vl_7b
python -m cacovid_jax.evaluate --config configs/qwen2_5_vl_7b.py:debug \
    --workdir workdirs/tiny/qwen2_5_vl_7b

Paper: no numbers of this size in its main tables.
Ours: not run here: needs the weights.
"""

from configs import common


def get_config(arg=None):
  return common.released(
    arg, path="checkpoints/qwen2_5_vl_7b", family="qwen2_5_vl"
  )
