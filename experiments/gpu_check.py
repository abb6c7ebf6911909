r"""What to run first on a new accelerator: a few minutes, then pass or fail.

python -m experiments.gpu_check

Attention, forward and backward, and the kernels that choose tokens, beside
plain XLA in float32; letters that the shipped model and policy answer, beside
recorded ones; how fast products, copies and attention are. Where there is no
accelerator, it says so and runs a short form. The exit code is 1 if something
fails.
"""

import functools
import os
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from cacovid_jax import command, terminal
from cacovid_jax.compressors.math import facility_location, max_min
from cacovid_jax.evals import cost, provenance, timing
from cacovid_jax.inference import answerer
from cacovid_jax.models import attention
from cacovid_jax.synthetic import build
from experiments import reporting

COMMAND = command.Command(__doc__, {}, config="none")

# (rows, heads, kv heads, head, causal, trained): a prefill at 25 %, the layer
# of a policy (half of its rows, an odd number: the plain map has to fit) and
# the tower of LLaVA-OneVision-7B; and such of CPU size. An eighth of the rows
# is padding; a tower has none, and nothing goes back through it.
_CASES = {
  "prefill": (1644, 28, 4, 128, True, True),
  "policy": (3173, 28, 4, 128, False, True),
  "tower": (729, 16, 16, 72, False, False),
}
_SHORT = {
  "prefill": (150, 4, 2, 16, True, True),
  "tower": (49, 4, 4, 8, False, False),
}
# Of the largest value: bfloat16 holds 8 bits.
_MOST = {"output": 0.02, "gradient": 0.05}
_TOKENS, _KEEP, _WIDTH = 1024, 256, 64
# Letters of the shipped model, whole and by the shipped policy at 25 %, to the
# questions about the first test clips; and the share that must be the same.
_LETTERS = "CCBBDDAAAADDCCBBBBBBBBCCCCDDBBAA"
_AGREE = {"float32": 1.0, "bfloat16": 0.85}


def plain_attention(q, k, v, causal, lengths):
  """Returns softmax(q k / sqrt(H)) v in float32, the whole map at once."""
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
  product = functools.partial(jnp.einsum, precision="highest")
  scores = product("BTNH,BSNH->BNTS", q, k) * q.shape[-1] ** -0.5
  seen = jnp.ones(scores.shape[2:], bool)[None]
  if lengths is not None:
    seen &= jnp.arange(k.shape[1]) < lengths[:, None, None]
  if causal:
    seen &= jnp.tri(*scores.shape[2:], dtype=bool)
  weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
  return product("BNTS,BSNH->BTNH", weights, v)


def check_attention(name, case):
  """Yields (what, error as a share of the largest value, its limit)."""
  rows, heads, kv_heads, head, causal, trained = case
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = [(1, rows, n, head) for n in (heads, kv_heads, kv_heads, heads)]
  q, k, v, weights = (
    jax.random.normal(key, shape, jnp.bfloat16)
    for key, shape in zip(keys, shapes, strict=True)
  )
  lengths = jnp.array([rows - rows // 8]) if trained else None
  if trained:  # Rows of padding have results without meaning.
    weights *= (jnp.arange(rows) < lengths[0])[:, None, None]

  def both(function):
    def total(q, k, v, weights, lengths):
      found = function(q, k, v, causal=causal, lengths=lengths)
      # Summed up in float32: rounding of the sum is no error of the kernel.
      found = found.astype(jnp.float32) * weights
      return found.sum(), found

    if trained:
      total = jax.grad(total, (0, 1, 2), has_aux=True)
    # Captured, they would be constants, which a compiler folds for seconds.
    return jax.jit(total)(q, k, v, weights, lengths)

  ours, out = both(attention.attention)
  expected, whole = both(plain_attention)
  yield name, _error(out, whole), _MOST["output"]
  if trained:
    worst = max(map(_error, ours, expected))
    yield f"gradient of {name}", worst, _MOST["gradient"]


def _error(found, expected) -> float:
  found, expected = (np.asarray(x, np.float32) for x in (found, expected))
  return float(abs(found - expected).max() / abs(expected).max())


def check_choices():
  """Yields (what, share of choices that differ, 0.0) of kernels and loops."""
  features = jax.random.normal(jax.random.key(1), (_TOKENS, _WIDTH))
  distances = 1.0 - features @ features.T / _WIDTH
  first = jnp.zeros((), jnp.int32)
  kernel = max_min.max_min
  if jax.default_backend() != "gpu":
    kernel = functools.partial(max_min.max_min_picks, interpret=True)
  loop = max_min.max_min_loop
  picks = jax.jit(lambda d: kernel(d, first, num_keep=_KEEP))(distances)
  plain = jax.jit(lambda d: loop(lambda i: d[i], first, _TOKENS, _KEEP))
  yield "max-min kernel", (picks != plain(distances)).mean(), 0.0
  grid = (4, 16, _TOKENS // 64)
  greedy = functools.partial(
    facility_location.greedy, features, _KEEP, grid=grid, block=64
  )
  differs = (greedy(kernel=True) != greedy(kernel=False)).mean()
  yield "facility location kernel", differs, 0.0


def letters(dtype: str, num_clips: int) -> str:
  """Returns what the shipped model says of drawn clips, question by question.

  For each the letter from all tokens, then that from the policy's 25 %.
  """
  said, config = [], build.BuildConfig()
  # In float32, nothing is rounded to TF32.
  precision = "highest" if dtype == "float32" else "default"
  with (
    tempfile.TemporaryDirectory() as folder,
    answerer.Answerer(dtype=dtype, max_new_tokens=2) as model,
    jax.default_matmul_precision(precision),
  ):
    os.mkdir(os.path.join(folder, "videos"))
    for number in range(num_clips):
      clip, rows = build.make_clip(config, folder, "test", number)
      path = os.path.join(folder, "videos", f"{clip['clip']}.mp4")
      for row in rows:
        asked = row["question"].text, row["question"].options
        found = model.ask(path, *asked, ratios=(1.0, 0.25), warm_up=False)
        said += [answer.letter or "-" for answer in found.answers]
  return "".join(said)


def speeds(cases):
  """Yields (what, value, unit) of products, copies and attention."""
  speed = cost.measure_speed(jnp.bfloat16)
  yield "bfloat16 product", speed.flops / 1e12, "TFLOP/s"
  yield "copy", speed.bytes / 1e9, "GB/s"
  for name, (rows, heads, kv_heads, head, causal, _) in cases.items():
    # Drawn, for products of equal numbers are faster.
    shape = 1, rows, heads, head
    q = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    k = q[:, :, :kv_heads]
    for backend in ("auto", "xla"):
      options = dict(causal=causal, backend=backend)
      run = jax.jit(functools.partial(attention.attention, **options))
      run = functools.partial(run, q, k, k)
      yield f"attention of {name}, {backend}", timing.measure(run, 9).ms, "ms"


def main(args) -> int:
  """Runs the checks and returns the exit code."""
  del args
  short = jax.default_backend() == "cpu"
  terminal.tell(f"{provenance.device_kind()}, jax {jax.__version__}")
  if short:
    terminal.tell("no accelerator is there: a short form on the CPU")
  cases, rows, failed = _SHORT if short else _CASES, [], []
  found = [*check_choices()]
  for name, case in cases.items():
    found += check_attention(f"attention of {name}", case)
  for dtype in ("float32",) if short else _AGREE:
    said = letters(dtype, 1 if short else 4)
    differ = [a != b for a, b in zip(said, _LETTERS, strict=False)]
    found.append((f"letters, {dtype}", np.mean(differ), 1 - _AGREE[dtype]))
  for what, error, most in found:
    fine = error <= most  # Not of NaN.
    rows.append((what, float(error), most, "ok" if fine else "FAILED"))
    failed += [] if fine else [what]
  head = ("beside float32 XLA and what was recorded", "error", "limit", "")
  reporting.table(head, rows)
  reporting.table(("speed", "", ""), speeds(cases))
  told = f"failed: {'; '.join(failed)}" if failed else "pass"
  terminal.tell(f"gpu_check: {told}")
  return 1 if failed else 0


if __name__ == "__main__":
  COMMAND.run(main)
