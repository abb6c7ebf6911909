"""Engines in PyTorch as peers of ours: stages of one made-up prompt.

`twin` is `torch_twin.Twin`; `transformers` is that library's model, SDPA and
eager, with the policy as its layer and linear maps. Both have the same methods.

Axes: B batch, L rows of a prompt, D width, T frames (or temporal patches), N
video tokens, P rows of positions, S auxiliary feature maps, V words.
"""

import copy
import inspect
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.models import llava_onevision, qwen3_vl
from cacovid_jax.parity import transformers as transformers_lib
from cacovid_jax.policy import network
from experiments import stages, torch_twin, training_stage


class Transformers:
  """The released implementation; functions as of `torch_twin.Twin`.

  Of LLaVA-OneVision; `Qwen3VL` says what is another model's.
  """

  def __init__(self, directory, config, policy, device, dtype):
    """Loads a checkpoint's folder; arguments as of the twin."""
    (name,) = config.to_hf()["architectures"]
    given = directory, name, device, str(dtype).removeprefix("torch."), "sdpa"
    _, self._model = transformers_lib.load(*given)
    self.device, self._core = torch.device(device), self._model.model
    self._policy, self._config = policy, config
    self._dtype, self._language = dtype, self._core.language_model
    self.tokens = self._language.embed_tokens
    self._layer = copy.deepcopy(self._language.layers[0])
    self._layer.self_attn.is_causal = False
    run = inspect.signature(self._language.forward).parameters
    # As of transformers 5.24.
    self._cache = "cache" if "cache" in run else "past_key_values"

  @property
  def newlines(self):
    """float[n, D], what stands behind the tokens of a video."""
    return self._core.image_newline[None]

  def encode(self, pixels, grid):
    """Returns (features float[N, D], deep) of pixels, as the tower takes them.

    Of a video of a grid (T, H, W); deep are S of float[N, D].
    """
    del grid  # The same in all frames.
    pixels = pixels.to(self._dtype).permute(0, 3, 1, 2).contiguous()
    found = self._core.vision_tower(pixels, output_hidden_states=True)
    projected = self._core.multi_modal_projector(found.hidden_states[-1])
    return self._core.apply_pooling(projected).flatten(0, 1), ()

  def scores(self, x, positions, video, frames):
    """Returns (frame float32[T, 2], token float32[N, 2]) of one prompt."""
    turn = self._language.rotary_emb(x, _copied(positions, 1))
    y = self._layer(x, position_embeddings=turn, attention_mask=None)
    y = y[0] if isinstance(y, tuple) else y
    eps = self._config.text.rms_norm_eps
    return torch_twin.heads_of(self._policy, frames, y[0, video], eps)

  def prefill(self, x, positions, room=0, **more):
    """Returns (logits float32[B, V], cache)."""
    del room  # Its cache grows.
    return self._run(x, positions, None, **more)

  def decode(self, ids, position, at, cache):
    """Returns logits float32[B, V] after tokens int64[B]; the cache stays."""
    del at  # Behind what the cache holds.
    logits, cache = self._run(self.tokens(ids)[:, None], position, cache)
    cache.crop(-1)
    return logits

  def _run(self, x, positions, cache, **more):
    rows = x.shape[1] + (cache.get_seq_length() if cache is not None else 0)
    # Without a mask, gaps in positions are read as ends of sequences.
    mask = torch.ones(len(x), rows, dtype=torch.long, device=x.device)
    out = self._language(
      inputs_embeds=x, attention_mask=mask, use_cache=True,
      position_ids=_copied(positions, len(x)), **{self._cache: cache}, **more,
    )  # fmt: skip
    logits = self._model.lm_head(out.last_hidden_state[:, -1]).float()
    return logits, getattr(out, self._cache)

  def captured(self, function):
    """Returns the function as it is: transformers runs eagerly."""
    return function


class Qwen3VL(Transformers):
  """Qwen3-VL, which adds feature maps to the rows of a video."""

  @property
  def newlines(self):
    return self.tokens.weight[:0]

  def encode(self, pixels, grid):
    side = self._config.vision.merge_size
    grid = torch.tensor([grid]) * torch.tensor([1, side, side])
    pixels = pixels.to(self._dtype)
    found = self._core.visual(pixels, grid_thw=grid.to(self.device))
    return found.pooler_output, found.deepstack_features

  def prefill(self, x, positions, room=0, *, deep, is_video):
    """See `Transformers`; `deep` S of float[n, D] for the rows bool[L]."""
    deep = [one.expand(len(x), -1, -1).flatten(0, 1) for one in deep]
    more = {
      "deepstack_visual_embeds": deep,
      "visual_pos_masks": is_video.expand(len(x), -1),
    }
    return super().prefill(x, positions, room, **more)


def _copied(positions, batch: int):
  """Returns int64[B, L] or [P, B, L] of positions int64[L] or [P, L]."""
  return positions.unsqueeze(-2).expand(*positions.shape[:-1], batch, -1)


# Of each class of model config.
_LLAVA = llava_onevision.LlavaOnevisionConfig
ENGINES = {
  "transformers": {_LLAVA: Transformers, qwen3_vl.Qwen3VLConfig: Qwen3VL},
  "twin": {_LLAVA: torch_twin.Twin},
}


class TorchPrompt(NamedTuple):
  """ONE prompt, whole or pruned."""

  x: torch.Tensor  # float[1, L, D].
  positions: torch.Tensor  # int64[L] or [P, L].
  # What an engine's prefill takes besides, of models with feature maps.
  more: dict[str, Any]


class Peer:
  """Stages of one prompt by an engine, as of `stages.Ours`."""

  facts = {
    "torch": str(torch.__version__),
    "transformers": transformers.__version__,
  }

  def __init__(self, name, device, subject):
    """Loads the weights that `subject`, a `made_up.MadeUp`, was made of."""
    checkpoint, batch = subject.checkpoint, subject.batch
    config, dtype = checkpoint.model.config, checkpoint.model.dtype
    dtype = getattr(torch, str(np.dtype(dtype)))

    def put(array, dtype=None):
      return torch.from_numpy(np.array(array)).to(device, dtype)

    def values(array):  # NumPy's bfloat16 is not PyTorch's.
      return put(array.astype(np.float32), dtype)

    followed = subject.policy(methods_lib.Method.parse("cacovid"))
    policy = network.to_public(followed.params).items()
    policy = {name: put(array, dtype) for name, array in policy}
    given = checkpoint.identity["path"], config, policy
    self.engine = ENGINES[name][type(config)](*given, device, dtype)
    self._grid, self._num_video = subject.grid, math.prod(subject.grid)
    self._ids = put(batch.ids[0], torch.long)
    self._video = put(batch.video_rows[0], torch.long)
    # Video tokens by row, -1 for text; and that is all other rows.
    self._token = torch.full_like(self._ids, -1)
    self._token[self._video] = torch.arange(self._num_video).to(device)
    self._text = (self._token < 0).nonzero()[:, 0]
    behind = torch.arange(len(self.engine.newlines)).to(device)
    self._own = torch.cat([self._video, self._video[-1] + 1 + behind])
    positions = put(batch.positions[0], torch.long)
    self._positions = positions if len(positions) > 1 else positions[0]
    self.pixels = put(subject.pixels)
    deep = () if batch.deep is None else map(values, batch.deep[0])
    self.prompt = self._embed(values(batch.features[0]), [*deep])

  def wait(self, _):
    """Returns once the device has done its work."""
    if self.engine.device.type == "cuda":
      torch.cuda.synchronize()

  def function(self, stage, ratio):
    """Returns (f() that runs a stage, None, 1), see `stages.Ours`."""
    made = getattr(self, f"_{stage}", None)
    if made is None:
      return None
    if torch.cuda.is_available():
      torch.cuda.empty_cache()
    with torch.no_grad():
      run = self.engine.captured(made(ratio))
    return torch.no_grad()(run), None, 1

  @torch.no_grad()
  def _embed(self, features, deep):
    """Returns the TorchPrompt about features float[N, D] and S maps of them."""
    own = torch.cat([features, self.engine.newlines])
    x = self.engine.tokens(self._ids).index_copy(0, self._own, own)
    more = {"deep": deep, "is_video": self._token >= 0} if len(deep) else {}
    return TorchPrompt(x[None], self._positions, more)

  def scored(self, prompt):
    """Returns the policy's scores of a whole prompt."""
    given = prompt.x, prompt.positions, self._video, self._grid[0]
    return self.engine.scores(*given)

  def encode(self):
    """Returns (features, deep) of the engine, see `Transformers.encode`."""
    return self.engine.encode(self.pixels, self._grid)

  def _tower(self, ratio):
    return self.encode

  def _scores(self, ratio):
    return lambda: self.scored(self.prompt)

  def _select(self, ratio):
    return lambda: self.pruned(self.prompt, ratio)

  def pruned(self, prompt, ratio):
    """Returns the TorchPrompt of what is kept of a whole one."""
    if ratio == 1:
      return prompt
    given = self.scored(prompt), int(ratio * self._num_video)
    rows = torch_twin.kept_rows(*given, self._text, self._video)
    return self._of(prompt, rows)

  def _of(self, prompt, rows):
    """Returns the TorchPrompt of some rows int64[n] of a whole one."""
    more = dict(prompt.more)
    if more:
      token = self._token[rows]
      kept = token[token >= 0]
      more = {
        "deep": [one[kept] for one in more["deep"]], "is_video": token >= 0
      }  # fmt: skip
    return TorchPrompt(prompt.x[:, rows], prompt.positions[..., rows], more)

  def read(self, prompt, **options):
    """Returns (logits, cache) of the engine's prefill."""
    x, positions, more = prompt
    return self.engine.prefill(x, positions, **more, **options)

  def _prefill(self, ratio):
    prompt = self.pruned(self.prompt, ratio)
    return lambda: self.read(prompt)[0]

  def _rollout(self, ratio):
    tokens = training_stage.rollout_tokens(self._grid)
    rows = torch.cat([self._text, self._video[tokens.tolist()]]).sort().values
    prompt = self._of(self.prompt, rows)
    x = prompt.x.expand(stages.ROLLOUTS, -1, -1).contiguous()
    return lambda: self.read(prompt._replace(x=x))[0]

  def _first_token(self, ratio):
    def run():
      prompt = self._embed(*self.encode())
      return self.read(self.pruned(prompt, ratio))[0]

    return run

  def _decode(self, ratio):
    prompt = self.pruned(self.prompt, ratio)
    logits, cache = self.read(prompt, room=1)
    rows = prompt.x.shape[1]
    ids, at = logits.argmax(-1), torch.tensor([rows]).to(logits.device)
    following = self._positions[..., -1:] + 1
    return lambda: self.engine.decode(ids, following, at, cache)
