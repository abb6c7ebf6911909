r"""Evaluates token selection: what a video model answers from fewer tokens.

python -m cacovid_jax.evaluate --config configs/x.py --workdir W
python -m cacovid_jax.evaluate --checkpoint DIR --data DIR --workdir W \
    --policy TRAINING_WORKDIR --methods cacovid,random --ratios 0.25,0.1
python -m cacovid_jax.evaluate --benchmark videomme --data VIDEO_MME ...

A config's `model`, `data`, `evals` and `mesh` sections are read. Without
--policy, that of the workdir is taken, if a policy was trained there.
A method that cannot be run at a ratio keeps its row, which says why. An
evaluation that was stopped goes on when the same command is given again. Writes
results.json, timings.json and report.html into the workdir.

Several processes or hosts share the work of one workdir: the same command on
each, with --shard=0/4 to --shard=3/4. The last one to finish writes the table;
where a network file system hid its peers from it, any of the commands given
again does.
"""

import os

from cacovid_jax import command, terminal
from cacovid_jax import config as config_lib
from cacovid_jax import experiment as experiment_lib
from cacovid_jax.evals import benchmarks, evaluation, shards
from cacovid_jax.policy import loading
from cacovid_jax.remote import mirror as remote

COMMAND = command.Command(
  __doc__,
  {
    "workdir": command.Flag(
      "Where answers, results and the report go: a folder, or gs://..., one on"
      " a store.",
      store=True,
    ),
    "shard": command.Flag(
      "I/N: this is process I of N, from 0, that share the work.", default="0/1"
    ),
    "model": command.Flag(
      "Base model: a Hugging Face checkpoint directory, or org/name of one in"
      " the local cache.",
      "model.path",
    ),
    "checkpoint": command.Flag("The same as --model.", "model.path"),
    "dtype": command.Flag("Of the base model.", "model.dtype"),
    "policy": command.Flag(
      "Policies, comma-separated: training workdirs or .safetensors files,"
      " optionally as NAME=PATH; the first is the main one.",
      "evals.policies",
    ),
    **command.aliases(
      "evals",
      benchmark=f"What is asked: {', '.join(benchmarks.names())}; prepared is"
      " data in VideoMME's columns, the others are as they were released.",
    ),
    "data": command.Flag(
      "Folder of the benchmark: questions and clips.", "data.root"
    ),
    **command.aliases(
      "data",
      media="Folder of the clips, below --data or absolute; empty is --data.",
    ),
    **command.aliases(
      "evals",
      split="Of the benchmark; by default its first one, as a rule the test.",
      num_questions="First so many questions; 0 for all.",
      on_bad_row="raise, or skip to leave unfit rows out and list them.",
      on_missing="raise if clips are not there, or count to count their"
      " questions as wrong.",
      methods="Rows, comma-separated; see cacovid_jax.compressors.names().",
      oracles="Oracle rows, comma-separated; empty for none.",
      ratios="Retention ratios, comma-separated.",
      seeds="Evaluation seeds, comma-separated.",
      select_on="Where options are chosen: validation or none.",
      batch_size="Questions asked at once.",
      max_new_tokens="Longest answer in tokens; 0 for the benchmark's own.",
      rule="How letters are taken from answers: paper, lmms-0.7.3 or own; empty"
      " for the benchmark's, which is own for one's own videos, else paper.",
      prompt_style="Empty for the benchmark's own prompt, video-r1 for that of"
      " training.",
      template="Chat template: processor, or tokenizer as in the paper's"
      " evaluation; empty for the checkpoint's default.",
    ),
    **command.aliases(
      "data",
      num_frames=command.Flag("Frames per clip.", least=1),
      min_pixels="Least pixels of a frame, of Qwen2.5-VL; 0 for the paper's.",
      max_pixels="Most pixels of a frame, likewise.",
      feature_cache="Folder of cached video features; empty for none.",
    ),
    **command.aliases(
      "evals",
      frame_manifest="frames.jsonl of another run, whose frames are shown;"
      " empty for none.",
      metrics="Training workdir whose reward curves the report shows.",
      num_examples="Clips that the report shows frame by frame.",
    ),
  },
  defaults={"model.dtype": "float32", "data.num_frames": 16},
)


def flags(*names: str, **old: str) -> dict[str, command.Flag]:
  """Returns flags for a table, which spelled `names` as "table_NAME"."""
  return {
    name: COMMAND.flags[name]._replace(old=(before,))
    for name, before in ({n: f"table_{n}" for n in names} | old).items()
  }


def main(args):
  """Runs the evaluation that the command line describes."""
  with remote.mirrored(args.workdir) as args.workdir:
    out = evaluation.evaluate(experiment_of(args))
    if out is None:
      return  # Other processes are not done.
    evaluation.show(out)
    names = "results.json", "report.html", "timings.json", "answers.jsonl"
    for name in names:
      terminal.tell(os.path.join(args.workdir, name))


def experiment_of(args) -> experiment_lib.Experiment:
  """Returns what a command line evaluates."""
  config = args.config
  COMMAND.require(args, "checkpoint", "data", "workdir")
  changes = {}
  if "evals.policies" not in args.given and not config.evals.policies:
    if loading.has_policy(args.workdir):
      module = config.policy.module
      named = f"?module={module}" if module else ""
      changes["evals.policies"] = (f"policy={args.workdir}{named}",)
    elif not args.spec and "evals.methods" not in args.given:
      # The default rows are those that can be run.
      changes["evals.methods"] = tuple(
        name for name in config.evals.methods if not name.startswith("cacovid")
      )
  return experiment_lib.Experiment.from_config(
    config_lib.replace(config, changes),
    args.workdir,
    shard=shards.Shard.parse(args.shard),
  )


if __name__ == "__main__":
  COMMAND.run(main)
