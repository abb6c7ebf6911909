"""Numbers of a run: JSON lines, TensorBoard and, if asked for, W&B."""

import contextlib
import hashlib
import json
import math
import os
import pathlib

from cacovid_jax import errors, files

FILE = "metrics.jsonl"


class MetricsWriter(contextlib.ExitStack):
  """Appends scalars to `metrics.jsonl`, TensorBoard event files and W&B.

  Lines of steps behind `step`, which a resumed run is going to compute again,
  are removed first. Of several processes one writes and is `enabled`.
  """

  def __init__(
    self, workdir, step=0, *, tensorboard=True, wandb_project="", enabled=True
  ):
    """Opens the files; W&B is left alone without a project.

    Without a network set WANDB_MODE=offline, and send runs by `wandb sync`.
    """
    super().__init__()
    self._tensorboard = self._wandb = None
    path = pathlib.Path(workdir if enabled else os.devnull)
    if enabled:
      path.mkdir(parents=True, exist_ok=True)
      # All or nothing, without the lines of steps that come again.
      lines = [line for line in read(path) if line["step"] <= step]
      path = path / FILE
      files.write(path, "".join(json.dumps(line) + "\n" for line in lines))
    self._file = self.enter_context(open(path, "a", encoding="utf-8"))
    if enabled and tensorboard:
      import tensorboardX  # Takes PyTorch along where there is one: seconds.

      self._tensorboard = tensorboardX.SummaryWriter(
        str(path.with_name("tensorboard")), purge_step=step + 1
      )
      self.callback(self._tensorboard.close)
    if enabled and wandb_project:
      self._wandb = _start_wandb(path.parent, wandb_project)
      self.callback(self._wandb.finish)

  def write_scalars(self, step, scalars):
    """Writes {name: number} of one step; flushed, so that a kill loses none.

    JSON has no NaN and no infinity: they are written as null.
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
    project=project, id=digest[:16], name=workdir.name, dir=workdir,
    resume="allow",
  )  # fmt: skip


def read(workdir):
  """Returns the lines of `metrics.jsonl` as dicts, without a cut last one."""
  path = pathlib.Path(workdir) / FILE
  text, lines = path.read_text("utf-8") if path.exists() else "", []
  with contextlib.suppress(ValueError):
    for line in text.splitlines():
      lines.append(json.loads(line))  # A kill cut what fails, the last one.
  return lines


def number(value) -> float:
  """Returns a Python float of a number or an array of one element."""
  return float(value.item() if hasattr(value, "item") else value)
