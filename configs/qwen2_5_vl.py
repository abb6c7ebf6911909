r"""CaCoVID on Qwen2.5-VL, 32 frames: `:size=7b` or `:size=3b`.

Weights: Qwen/Qwen2.5-VL-7B-Instruct
and Qwen/Qwen2.5-VL-3B-Instruct
in checkpoints/qwen2_5_vl_SIZE. Rows: Video-R1 in datasets/video_r1; its
filtered.json, without what the model answers unseen, is written by
`cacovid_jax.preparation.blind_filter`.

python -m cacovid_jax.train --config configs/qwen2_5_vl.py:size=3b \
    --workdir workdirs/qwen2_5_vl_3b
python -m cacovid_jax.evaluate --config configs/qwen2_5_vl.py:size=3b \
    --policy workdirs/qwen2_5_vl_3b --benchmark videomme \
    --data datasets/videomme --workdir workdirs/qwen2_5_vl_3b/videomme

The other benchmarks: --benchmark longvideobench, mlvu_dev, mlvu_test, each
with a folder and a workdir of its own; all four and their average:
experiments.main_table. Several GPUs: `:devices=8`, one video each; several
machines: experiments/launch.

In seconds on a CPU, with random weights:

python -m cacovid_jax.prepare --out workdirs/tiny --clips 2,0,2,0 \
    --nodecisive --tiny_models qwen2_5_vl
python -m cacovid_jax.train --config configs/qwen2_5_vl.py:debug \
    --workdir workdirs/tiny/run
python -m cacovid_jax.evaluate --config configs/qwen2_5_vl.py:debug \
    --workdir workdirs/tiny/run

Paper, 3B: mean accuracy of LongVideoBench, MLVU dev, MLVU test and VideoMME, in
%, and as a share of vanilla's 55.6: 54.2 (97.5) at a ratio of 25 %, 53.9 (96.9)
at 20 %, 52.5 (94.4) at 15 %, 52.0 (93.4) at 10 %. It has no numbers of 7B in
its main tables.
Ours: not run here: needs the weights.
"""

from configs import common


def get_config(arg=None):
  return common.released(arg, family="qwen2_5_vl", sizes=("3b", "7b"))
