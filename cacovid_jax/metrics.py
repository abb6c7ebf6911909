"""Numbers of a run: JSON lines, TensorBoard and, if asked for, W&B."""

import hashlib
import json
import math
import os
import pathlib

from cacovid_jax import errors, files

FILE = "metrics.jsonl"


class MetricsWriter:
  """Appends scalars to `metrics.jsonl`, TensorBoard event files and W&B.

  A resumed run passes the step it restored: lines of later steps, which it is
  going to compute again, are removed first, so each step is there once. Of
  several processes one writes; the others are not `enabled`.
  """

  def __init__(
    self,
    workdir,
    restored_step=0,
    *,
    tensorboard=True,
    wandb_project="",
    enabled=True,
  ):
    """Opens the files; "" for `wandb_project` sends nothing to W&B.

    Without a network set WANDB_MODE=offline, and send runs by `wandb sync`.
    """
    self._tensorboard = self._wandb = None
    if not enabled:
      self._file = open(os.devnull, "w", encoding="utf-8")
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    # All or nothing, without the lines of steps that come again.
    lines = [line for line in read(workdir) if line["step"] <= restored_step]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    files.write(workdir / FILE, text)
    self._file = open(workdir / FILE, "a", encoding="utf-8")
    if tensorboard:
      import tensorboardX  # Takes PyTorch along where there is one: seconds.

      self._tensorboard = tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"), purge_step=restored_step + 1
      )
    if wandb_project:
      self._wandb = _start_wandb(workdir, wandb_project)

  def write_scalars(self, step, scalars):
    """Writes {name: number} of one step; flushed, so that a kill loses none.

    Arrays of one element are taken as their number. JSON has no NaN and no
    infinity: they are written as null.
    """
    numbers = {name: number(value) for name, value in scalars.items()}
    finite = {n: x if math.isfinite(x) else None for n, x in numbers.items()}
    self._file.write(json.dumps({"step": int(step), **finite}) + "\n")
    self._file.flush()
    if self._tensorboard:
      for name, value in numbers.items():
        self._tensorboard.add_scalar(name, value, int(step))
    if self._wandb:
      self._wandb.log(numbers, step=int(step))

  def close(self):
    self._file.close()
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()

  def __enter__(self):
    return self

  def __exit__(self, *exc_info):
    self.close()


def _start_wandb(workdir: pathlib.Path, project: str):
  """Returns the W&B run of a workdir; a run that resumes keeps its id."""
  try:
    import wandb
  except ImportError:
    raise errors.UserError(
      'config.wandb.project needs wandb: pip install "cacovid_jax[wandb]", or'
      " leave it empty"
    ) from None
  digest = hashlib.sha256(os.fsencode(workdir.resolve())).hexdigest()
  return wandb.init(
    project=project,
    id=digest[:16],
    name=workdir.name,
    dir=workdir,
    resume="allow",
  )


def read(workdir):
  """Returns the lines of `metrics.jsonl` as dicts, without a cut last one."""
  path = pathlib.Path(workdir) / FILE
  lines = []
  texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else ()
  for text in texts:
    try:
      lines.append(json.loads(text))
    except ValueError:
      break  # A kill cut this line, the last one.
  return lines


def number(value) -> float:
  """Returns a Python float of a number or an array of one element."""
  return float(value.item() if hasattr(value, "item") else value)
