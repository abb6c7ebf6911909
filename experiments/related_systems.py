r"""The related systems that learn: a table, bars and a picture of each.

python -m experiments.related_systems [--smoke] [--systems=hcq,emcl]
python -m experiments.related_systems --config=configs/related_systems.py:cpu

Trains small versions on planted data and on clips of the embedded benchmark,
which are drawn if they are not there; docs/related_systems.md says what each
is and what it may claim.

WORKDIR/SYSTEM.md, SYSTEM.svg   a row per case and arm, over the seeds; the bars
WORKDIR/results.json            all of it
WORKDIR/SYSTEM.jsonl            every cell as it is measured
WORKDIR/checkpoints/SYSTEM/     of what was trained, by the hash of its config

Stopped and given again, it goes on where it was.
"""

import importlib
import itertools
import json
import pathlib
import time

import ml_collections

from cacovid_jax import command, config_limits, errors, files, terminal
from cacovid_jax import config as config_lib
from cacovid_jax.data import answer_log
from cacovid_jax.evals import provenance, tables
from cacovid_jax.related import clips as clips_lib
from cacovid_jax.related import settings
from cacovid_jax.related import study as study_lib
from experiments import reporting

SYSTEMS = (
  "quecc", "quecc_llm", "law", "hcq", "emcl", "adaptok", "infotok", "vqtoken"
)  # fmt: skip
_BAR_HEAD = ("to show", "measured", "holds")

COMMAND = command.Command(
  __doc__,
  {
    "workdir": command.Flag("Folder of the run; below workdirs/ by default."),
    "systems": command.Flag("Which of them.", default=SYSTEMS),
    "smoke": command.Flag(
      "Few steps and one seed, to see that everything runs.", default=False
    ),
  },
  default="configs/related_systems.py",
  sections=False,
)


def main(args):
  """Runs the comparisons that the command line asks for."""
  config = args.config
  config_limits.check(config, limits=settings.LIMITS)
  for name in args.systems:
    errors.check_known("system", name, SYSTEMS)
  workdir = args.workdir or f"workdirs/related{'_smoke' * args.smoke}"
  workdir = pathlib.Path(workdir)
  clips = clips_lib.Clips(**config.clips)
  known = workdir / "results.json"
  out = json.loads(known.read_text()) if known.exists() else {"systems": {}}
  out["host"] = provenance.host()
  written = []
  for name in args.systems:
    # Of one system, so that others may change or be added.
    parts = {part: config[part] for part in ("seeds", "clips", name)}
    run = {"config": config_lib.config_hash(ml_collections.ConfigDict(parts))}
    # What other settings trained is not gone on from.
    folder = workdir / "checkpoints" / name / run["config"]
    module = importlib.import_module(f"cacovid_jax.related.{name}")
    study = module.study(config[name], clips, folder)
    with reporting.ledger(workdir / f"{name}.jsonl", run) as rows:
      found = measure(name, study, config.seeds, rows)
    out["systems"][name] = write(workdir, name, study, found)
    written += [f"{name}.md", f"{name}.svg"]
  files.write_json(known, out)
  reporting.files(workdir, [*written, "results.json"])


def measure(name, study, seeds, rows):
  """Returns the cells, a case with a seed each; those known are kept."""
  found = []
  for seed, (case, arms_of) in itertools.product(seeds, study.cases.items()):

    def run(seed=seed, case=case, arms_of=arms_of):
      terminal.tell(f"{study.title}: {case}, seed {seed}")
      start = time.monotonic()
      # In a list: a ledger keeps no order of keys.
      arms = list(arms_of(seed).items())
      return {"arms": arms, "seconds": time.monotonic() - start}

    row = reporting.once(rows, answer_log.Key(name, 1.0, seed, case), run)
    own = {"case": case, "seed": seed, "arms": dict(row["arms"])}
    found.append(own | {"seconds": row["seconds"]})
  return found


def write(workdir, name, study, found):
  """Writes a system's table and picture, and returns both as numbers."""
  table = study_lib.Outcome(
    (cell["case"], cell["seed"], cell["arms"]) for cell in found
  )
  bars = study.bars(table)
  lines = [
    [bar.text, f"{bar.value:.3f}", "yes" if bar.holds else "no"] for bar in bars
  ]
  text = f"# {study.title}\n\n{table.markdown()}\n\n"
  text += f"{tables.as_markdown(_BAR_HEAD, lines, range(1, 2))}\n"
  files.write(workdir / f"{name}.md", text)
  files.write(workdir / f"{name}.svg", study.picture(table))
  print(text)
  return {"cells": found, "bars": [bar._asdict() for bar in bars]}


if __name__ == "__main__":
  COMMAND.run(main)
