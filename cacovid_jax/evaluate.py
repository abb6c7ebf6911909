r"""Evaluates token selection: what a video model answers from fewer tokens.

python -m cacovid_jax.evaluate --config configs/x.py --workdir W
python -m cacovid_jax.evaluate --checkpoint DIR --data DIR --workdir W \
    --policy TRAINING_WORKDIR --methods cacovid,random --ratios 0.25,0.1
python -m cacovid_jax.evaluate --benchmark videomme --data VIDEO_MME ...

A config's `model`, `data` and `evals` sections are read; flags win over them.
Without --policy, that of the workdir is taken, if a policy was trained there.
A method that cannot be run at a ratio keeps its row, which says why. An
evaluation that was stopped goes on when the same command is given again. Writes
results.json, timings.json and report.html into the workdir.

Several processes or hosts share the work of one workdir: the same command on
each, with --shard=0/4 to --shard=3/4. The last one to finish writes the table;
where a network file system hid its peers from it, any of the commands given
again does.
"""

import os

from absl import flags

from cacovid_jax import config as config_lib
from cacovid_jax import errors
from cacovid_jax.evals import benchmarks, evaluation, shards
from cacovid_jax.policy import loading

config_lib.define_flag()
_SHARD = flags.DEFINE_string(
  "shard", "0/1", "I/N: this is process I of N, from 0, that share the work."
)
_FLAGS = {
  "checkpoint": "Base model: a Hugging Face LLaVA-OneVision directory.",
  "policy": (
    "Policies, comma-separated: training workdirs or .safetensors files,"
    " optionally NAME=PATH, PATH?module=F.py:CLASS; the first is the main one."
  ),
  "benchmark": (
    "What is asked: " + ", ".join(benchmarks.names()) + "; prepared is"
    " data in VideoMME's columns, the others are as they were released."
  ),
  "data": "Folder of the benchmark: questions and clips.",
  "media": "Folder of the clips, below --data or absolute; empty is --data.",
  "workdir": "Where answers, results and the report go.",
  "methods": "Rows, comma-separated; see cacovid_jax.compressors.names().",
  "oracles": "Oracle rows, comma-separated; empty for none.",
  "ratios": "Retention ratios, comma-separated.",
  "seeds": "Evaluation seeds, comma-separated.",
  "split": "Of the benchmark; by default its first one, as a rule the test.",
  "on_bad_row": "raise, or skip to leave unfit rows out and list them.",
  "on_missing": (
    "raise if clips are not there, or count to count their questions as wrong."
  ),
  "select_on": "Where options are chosen: validation or none.",
  "rule": "How letters are taken from answers: paper or lmms-0.7.3.",
  "prompt_style": (
    "Empty for the benchmark's own prompt, video-r1 for that of training."
  ),
  "template": (
    "Chat template: processor, or tokenizer as in the paper's evaluation; empty"
    " for the checkpoint's default."
  ),
  "dtype": "Of the base model: float32 or bfloat16.",
  "feature_cache": "Folder of cached video features; empty for none.",
  "frame_manifest": (
    "frames.jsonl of another run, whose frames are shown; empty for none."
  ),
  "metrics": "Training workdir whose reward curves the report shows.",
}
for _name, _help in _FLAGS.items():
  flags.DEFINE_string(_name, None, _help)
for _name, _help in {
  "batch_size": "Questions asked at once.",
  "num_frames": "Frames per clip.",
  "num_questions": "First so many questions; 0 for all.",
  "num_examples": "Clips that the report shows frame by frame.",
  "max_new_tokens": "Longest answer in tokens; 0 for the benchmark's own.",
  "min_pixels": "Least pixels of a frame, of Qwen2.5-VL; 0 for the paper's.",
  "max_pixels": "Most pixels of a frame, likewise.",
}.items():
  flags.DEFINE_integer(_name, None, _help)


def main(argv):
  """Runs the evaluation that the flags describe."""
  if len(argv) > 1:
    raise errors.UserError(
      f"unexpected argument {argv[1]!r}; flags start by --"
    )
  request = request_from_flags(flags.FLAGS)
  out = evaluation.evaluate(request)
  if out is None:
    return  # Other processes are not done.
  evaluation.show(out)
  for name in ("results.json", "report.html", "timings.json", "answers.jsonl"):
    print(os.path.join(request.workdir, name))


def request_from_flags(values) -> evaluation.Request:
  """Returns the request of a config, if there is one, and of the flags."""
  config = config_lib.from_flags() if values.config else None
  fields = evaluation.request_fields(config)
  flagged = {
    name: values[name].value
    for name in (*_FLAGS, "batch_size", "num_frames", "num_questions",
                 "num_examples", "max_new_tokens", "min_pixels", "max_pixels")
    if values[name].value is not None
  }  # fmt: skip
  if "policy" in flagged:
    fields["policies"] = _policies(flagged.pop("policy"))
  if "feature_cache" in flagged:
    fields["cache"] = flagged.pop("feature_cache")
  for name, kind in (("ratios", float), ("seeds", int)):
    if name in flagged:
      flagged[name] = _numbers(name, flagged[name], kind)
  for name in ("methods", "oracles"):
    if name in flagged:
      flagged[name] = _listed(flagged[name])
  if "benchmark" in flagged:
    # A config's folder of clips is that of its own data.
    fields["media"] = ""
  fields |= flagged
  fields["shard"] = shards.Shard.parse(values["shard"].value)
  workdir = fields.get("workdir", "")
  if "policies" not in fields and loading.has_policy(workdir):
    module = config.policy.module if config and "policy" in config else ""
    named = f"{workdir}?module={module}" if module else workdir
    fields["policies"] = {"policy": named}
  if not fields.get("policies"):
    # The default rows are those that can be run.
    if "methods" not in flagged and config is None:
      fields["methods"] = tuple(
        name for name in fields["methods"] if not name.startswith("cacovid")
      )
  for name in ("checkpoint", "data", "workdir"):
    if not fields.get(name):
      raise errors.UserError(f"nothing says which {name}: add --{name}=FOLDER")
  return evaluation.Request(**fields)


def _policies(text: str) -> dict[str, str]:
  out = {}
  for number, part in enumerate(_listed(text)):
    name, path = ("policy" if number == 0 else f"policy{number}"), part
    if "=" in part.partition("?")[0]:  # Behind it stands ?module=NAME.
      name, _, path = part.partition("=")
    out[name] = path
  return out


def _listed(text: str) -> tuple[str, ...]:
  return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(name, text, kind):
  try:
    return tuple(kind(part) for part in _listed(text))
  except ValueError:
    raise errors.UserError(
      f"--{name}={text} is not a list of numbers; for example"
      f" --{name}={'0,1' if kind is int else '0.25,0.1'}"
    ) from None


if __name__ == "__main__":
  errors.run(main)
