"""The policy network: scores every video token and frame, given the question.

One bidirectional decoder layer of the LLM's own shape reads the unpruned
prompt; two small MLPs turn its video rows into drop/keep scores.

Top-level parameter names: `layer` is the decoder layer that starts from the
LLM's layer 0 (the optimiser gives it the lower rate); `layernorm`,
`token_compress`, `frame_compress` are new; `mode_selection` is carried along
for the public checkpoint's sake and never trained. Beyond the paper, `budget`
tells the heads the retention ratio, so that one policy serves all of them, and
`frame_residual` tells the frame head what changed since the frame before.

Axes: L prompt tokens, N = T*H*W video tokens, T frames, D width, P position
rows.
Paper: https://arxiv.org/abs/2602.01649 (compression policy network).
"""

import dataclasses
import functools
import inspect
import itertools
import math
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from cacovid_jax import errors
from cacovid_jax.models import layers as layers_lib
from cacovid_jax.models import placement, products, qwen2, token_grid

_HEADS = ("token_compress", "frame_compress", "mode_selection")
_PUBLIC = "compression_policy"
# Linear maps that are ours: their names in files of the public format.
OWN = {x: f"{_PUBLIC}.{x}.weight" for x in ("budget", "frame_residual")}
_OCTAVES = 16  # Period of the first wave: it tells all ratios above 2**-16.


class Scores(NamedTuple):
  """Drop/keep scores of one video; column 0 is drop, column 1 keep."""

  frame: jax.Array  # float32[T, 2].
  token: jax.Array  # float32[N, 2].


def keep_gap(scores):
  """Returns float32[...], keep - drop, of scores float[..., 2]."""
  scores = scores.astype(jnp.float32)
  return scores[..., 1] - scores[..., 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
  """Sizes of the policy."""

  llm: qwen2.Qwen2Config  # Of the LLM, whose decoder layer is the policy's.
  num_halvings: int = 4  # Hidden layers, each half as wide as the last.
  dtype: jnp.dtype = jnp.float32  # Of the hidden layers; scores are float32.
  backend: str = "auto"  # Attention backend, see `models.attention`.
  budget_embedding: int = 0  # Waves of `ratio_features`; 0 reads no ratio.
  frame_residual: bool = False  # Whether the frame head reads changes.

  def __post_init__(self):
    narrowest = self.llm.hidden_size >> max(self.num_halvings, 0)
    if self.num_halvings < 0 or narrowest < 2:
      raise errors.UserError(
        f"policy.num_halvings={self.num_halvings} does not suit a width of "
        f"{self.llm.hidden_size}; choose 0 to "
        f"{self.llm.hidden_size.bit_length() - 2}"
      )

  @classmethod
  def tiny(cls):
    return cls(llm=qwen2.Qwen2Config.tiny(), num_halvings=3)

  @property
  def own(self):
    """Which maps of `OWN` it has."""
    has = self.budget_embedding, self.frame_residual
    return tuple(itertools.compress(OWN, has))


class Head(nn.Module):
  """An MLP that halves the width at each hidden layer."""

  num_scores: int
  num_halvings: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, v):
    """Returns float32[..., num_scores] of v float[..., D]."""
    width = v.shape[-1]
    for i in range(self.num_halvings):
      width = width // 2
      v = nn.Dense(width, dtype=self.dtype, name=f"hidden_{i}")(v)
      v = nn.silu(v)
    # The keep - drop gap ranks thousands of near-equal tokens: float32.
    return nn.Dense(self.num_scores, dtype=jnp.float32, name="score")(v)


class Policy(nn.Module):
  """Token and frame scores of ONE prompt; callers `jax.vmap` it."""

  config: PolicyConfig

  @classmethod
  @nn.nowrap
  def from_llm_config(cls, llm, **options):
    return cls(PolicyConfig(llm=llm, **options))

  def setup(self):
    cfg = self.config
    head = dict(num_halvings=cfg.num_halvings, dtype=cfg.dtype)
    self.layer = qwen2.DecoderLayer(cfg.llm, cfg.dtype, cfg.backend)
    self.layernorm = qwen2.RMSNorm(cfg.llm.rms_norm_eps, cfg.dtype)
    self.token_compress = Head(2, **head)
    self.frame_compress = Head(2, **head)
    self.mode_selection = Head(3, **head)
    for name in cfg.own:
      # Zero before training: scores are those of the policy without it.
      linear = nn.Dense(
        cfg.llm.hidden_size,
        use_bias=False,
        kernel_init=nn.initializers.zeros,
        dtype=cfg.dtype,
      )
      setattr(self, name, linear)

  def __call__(
    self, x, positions, video_rows, grid, length=None, *, ratio=None
  ):
    """Returns the Scores of one prompt's video tokens and frames.

    In a bucket they are f32[T_max, 2] and f32[N_max, 2], zero in padding.

    Args:
      x: float[L, D] unpruned prompt embeddings, video features in place.
      positions: int32[P, L].
      video_rows: int32[N] rows of the video tokens, without the newline's;
        in a bucket int32[N_max], L behind the video's own.
      grid: (T, H, W), static; or a `token_grid.TokenGrid`.
      length: int32[] valid rows of a right-padded prompt; None for all.
      ratio: float[] retention ratio; read with a budget embedding alone, and
        then without it a UserError.
    """
    grid = token_grid.TokenGrid.of(grid)
    chex.assert_shape(video_rows, (grid.bucket.tokens,))
    video = self._encode(x, positions, length)[video_rows]  # [N, D]
    # The mean is taken before the norm, and in float32.
    frames = self._normed(grid.frame_means(video), ratio)
    if self.config.frame_residual:
      # Of normed rows: the norm of a change does not tell how large it is.
      changes = grid.frame_changes(self.layernorm(video))
      frames = frames + self.frame_residual(changes)
    frame = self.frame_compress(frames)
    token = self.token_compress(self._normed(video, ratio))
    return Scores(
      frame=token_grid.fill(frame, grid.valid_frames[:, None], 0.0),
      token=token_grid.fill(token, grid.valid_tokens[:, None], 0.0),
    )

  def mode_scores(self, x, positions, video_rows, length=None):
    """Returns float32[3], the public checkpoint's untrained third head.

    For parity only. It sees the mean of all rows that are not video tokens,
    without the norm. Arguments as in `__call__`.
    """
    h = self._encode(x, positions, length).astype(jnp.float32)
    valid = h.shape[0] if length is None else length
    text = (jnp.arange(h.shape[0]) < valid).at[video_rows].set(False)
    mean = jnp.where(text[:, None], h, 0.0).sum(axis=0) / text.sum()
    return 100.0 * self.mode_selection(mean)

  def _normed(self, v, ratio):
    """Returns float[..., D], what a head reads of v float[..., D]."""
    waves, v = self.config.budget_embedding, self.layernorm(v)
    if not waves:
      return v
    if ratio is None:
      raise errors.UserError(
        f"the policy was made with budget_embedding={waves}: its scores depend"
        " on the retention ratio, and none was given; pass ratio"
      )
    return v + self.budget(ratio_features(ratio, waves))

  def _encode(self, x, positions, length):
    """Returns float[L, D], the layer's output, without a causal mask."""
    cfg, llm = self.config, self.config.llm
    count = len(x)
    more = products.padded_rows(count, backend=cfg.backend) - count
    if more:  # As the base model reads prompts.
      x = jnp.pad(x, [(0, more), (0, 0)])
      positions = jnp.pad(positions, [(0, 0), (0, more)])
      length = count if length is None else length
    cos, sin = qwen2.angles(llm, positions[None])
    lengths = None if length is None else jnp.reshape(length, (1,))
    h, _ = self.layer(
      x.astype(cfg.dtype)[None], cos, sin, causal=False, lengths=lengths
    )
    return h[0, :count]

  def initialise(self):
    """Touches every parameter; only initialisation calls it."""
    rows = self.config.llm.rope_sections
    positions = jnp.zeros((len(rows) if rows else 1, 2), jnp.int32)
    x = jnp.zeros((2, self.config.llm.hidden_size))
    video_rows = jnp.zeros(1, jnp.int32)
    self(x, positions, video_rows, (1, 1, 1), ratio=1.0)
    return self.mode_scores(x, positions, video_rows)

  @nn.nowrap
  def init_from_llm(self, rng, llm_params):
    """Returns float32 params: a copy of the LLM's layer 0, and new heads.

    `rng` is the heads' key; `llm_params` are the base model's parameters or
    those of its decoder, whose `layers` are as of `models.layers`.
    """
    params = _new_heads(rng, config=self.config)
    llm_params = llm_params.get("language_model", llm_params)
    if "layers" not in llm_params:
      raise errors.UserError(
        "the language model's parameters have no `layers`; found "
        f"{', '.join(sorted(llm_params))}"
      )
    # A copy: training donates its buffers, the base model keeps its own.
    layer = layers_lib.unfused(layers_lib.layer(llm_params["layers"], 0))
    layer = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), layer)
    given = {k: leaf.shape for k, leaf in _flatten({"layer": layer}).items()}
    expected = shapes(self.config)
    expected = {k: s for k, s in expected.items() if k.startswith("layer/")}
    check_shapes(given, expected, "the LLM's layer 0")
    return {"layer": layer, **params}

  @nn.nowrap
  def for_inference(self, params):
    """Returns params in the dtypes that they are computed with.

    What every call would cast is cast once; training goes on with float32.
    """

    def cast(path, leaf):  # As the modules above do it.
      scores = any(key.key == "score" for key in path)
      return leaf.astype(jnp.float32 if scores else self.config.dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def ratio_features(ratio, num_waves: int):
  """Returns float32[2 * num_waves], of a retention ratio in (0, 1].

  Sines, then cosines, of its octaves; each wave has half the period of the one
  before it.
  """
  octaves = jnp.log2(jnp.asarray(ratio, jnp.float32))
  angles = octaves * (2 * math.pi / _OCTAVES * 2.0 ** np.arange(num_waves))
  return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])


def reads_ratio(policy) -> bool:
  """Returns whether the scores of a policy module depend on the ratio.

  Of one's own: whether its `__call__` declares `ratio`.
  """
  if isinstance(policy, Policy):
    return bool(policy.config.budget_embedding)
  return "ratio" in inspect.signature(type(policy).__call__).parameters


def ratio_argument(policy, ratio) -> dict[str, Any]:
  """Returns the keyword argument of a ratio, for policies that read it."""
  return {"ratio": ratio} if reads_ratio(policy) else {}


def score(policy, params, prompt, grid, ratio):
  """Returns the Scores of ONE prompt by a policy module, one's own included.

  Args:
    policy: the module, of parameters `params`.
    prompt: `models.prompt_batch.PromptBatch` without the axis B.
    grid: `token_grid.TokenGrid`.
    ratio: float[] retention ratio; modules that do not declare it get none.
  """
  given = prompt.x, prompt.positions, prompt.video_rows
  # What a policy of one's own reads where all videos have this one.
  grid = grid.shape if grid.full else grid
  more = ratio_argument(policy, ratio)
  return policy.apply({"params": params}, *given, grid, prompt.lengths, **more)


@functools.partial(jax.jit, static_argnames="config")
def _new_heads(rng, *, config):
  """Returns fresh parameters of all but the decoder layer."""
  params = Policy(config).init(rng, method="initialise")["params"]
  # The large layer is not returned, so the compiler never draws it.
  return {key: leaf for key, leaf in params.items() if key != "layer"}


def shapes(config):
  """Returns the shape of every parameter by its `/` path."""
  init = functools.partial(Policy(config).init, method="initialise")
  params = jax.eval_shape(init, jax.random.key(0))["params"]
  return {path: leaf.shape for path, leaf in _flatten(params).items()}


def public_names(num_halvings, own=(), qk_norm=False):
  """Returns {our path: (public name, transposed)} of every parameter.

  `own` are names of `OWN`, which are not public; `qk_norm` tells whether the
  layer norms queries and keys.
  """
  linear = dict.fromkeys(own, "linear")
  rows = placement.rows(_PUBLIC, "", layernorm="scale", **linear)
  rows |= qwen2.layer_rows(f"{_PUBLIC}.layers.0", "layer", qk_norm=qk_norm)
  for head in _HEADS:
    # A `Sequential`: odd indices are activations.
    kinds = {f"{2 * i}": f"dense hidden_{i}" for i in range(num_halvings)}
    kinds[f"{2 * num_halvings}"] = "dense score"
    rows |= placement.rows(f"{_PUBLIC}.{head}", head, **kinds)
  found = rows.items()
  return {path: (name, how == "transpose") for name, (path, how, _) in found}


def to_public(params, dtype=np.float32):
  """Returns {public name: array of a dtype} of params, for safetensors."""
  flat, public = _flatten(params), {}
  num_halvings = len(params["token_compress"]) - 1  # All but the last.
  own = OWN.keys() & params.keys()
  names = public_names(num_halvings, own, "q_norm" in params["layer"])
  for path, leaf in flat.items():
    name, transposed = names[path]
    leaf = np.asarray(leaf).astype(dtype)
    # safetensors stores memory as it lies: a transposed view would be wrong.
    public[name] = np.ascontiguousarray(leaf.T if transposed else leaf)
  return public


def from_public(tensors, config):
  """Returns float32 params of {public name: array}.

  `mode_selection` may be absent, all of it; params then lack it too. Names that
  are missing, left over, or of another shape are a UserError.
  """
  norms = config.llm.qk_norm
  names = public_names(config.num_halvings, config.own, norms)
  expected = {}
  optional = f"{_PUBLIC}.mode_selection."
  has_optional = any(name.startswith(optional) for name in tensors)
  for path, shape in shapes(config).items():
    name, transposed = names[path]
    if has_optional or not name.startswith(optional):
      expected[name] = shape[::-1] if transposed else shape
  given = {name: np.shape(tensor) for name, tensor in tensors.items()}
  check_shapes(given, expected, "the policy checkpoint")
  flat = {}
  for path, (name, transposed) in names.items():
    if name in tensors:
      tensor = np.asarray(tensors[name]).astype(np.float32)
      flat[path] = jnp.asarray(tensor.T if transposed else tensor)
  return traverse_util.unflatten_dict(flat, sep="/")


def _flatten(params):
  return traverse_util.flatten_dict(params, sep="/")


def check_shapes(given, expected, where):
  """Raises UserError unless two {name: shape} agree."""
  faults = {
    "missing": sorted(expected.keys() - given.keys()),
    "not known": sorted(given.keys() - expected.keys()),
    "misshaped": [
      f"{name} is {tuple(given[name])}, expected {tuple(expected[name])}"
      for name in sorted(expected.keys() & given.keys())
      if tuple(given[name]) != tuple(expected[name])
    ],
  }
  told = [f"{k} {', '.join(names)}" for k, names in faults.items() if names]
  errors.check(
    not told, f"{where} does not fit the policy's config: {'; '.join(told)}"
  )
