r"""CaCoVID on LLaVA-OneVision, 32 frames: `:size=7b` or `:size=0_5b`.

Weights: llava-hf/llava-onevision-qwen2-7b-ov-hf and -0.5b-ov-hf
in checkpoints/llava_onevision_SIZE. Rows: Video-R1 in datasets/video_r1; its
filtered.json, without what the model answers unseen, is written by
`cacovid_jax.preparation.blind_filter`.

python -m cacovid_jax.train --config configs/llava_onevision.py:size=7b \
    --workdir workdirs/llava_onevision_7b
python -m cacovid_jax.evaluate --config configs/llava_onevision.py:size=7b \
    --policy workdirs/llava_onevision_7b --benchmark videomme \
    --data datasets/videomme --workdir workdirs/llava_onevision_7b/videomme

As the public code trains; `:size=7b,recipe=ours` is the paper's text where the
two differ (docs/recipes.md). The four benchmarks and their average:
experiments.main_table. Several GPUs: `:devices=8`, one video each; several
machines: experiments/launch. In seconds on a CPU, with random weights:

python -m cacovid_jax.prepare --out workdirs/tiny --clips 2,0,2,0 \
    --nodecisive --tiny_models llava_onevision
python -m cacovid_jax.train --config configs/llava_onevision.py:debug \
    --workdir workdirs/tiny/run

Paper, 7B: mean accuracy of LongVideoBench, MLVU dev, MLVU test and VideoMME, in
%, and as a share of vanilla's 56.4: 55.8 (98.9) at a ratio of 25 %, 55.3 (98.1)
at 20 %, 55.0 (97.5) at 15 %, 54.2 (96.1) at 10 %. It has no numbers of 0.5B.
Ours: not run here: needs the weights.
"""

from configs import common


def get_config(arg=None):
  return common.released(arg, family="llava_onevision", sizes=("7b", "0_5b"))
