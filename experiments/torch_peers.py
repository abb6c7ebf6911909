"""Engines in PyTorch as peers of ours: stages of one made-up prompt.

`twin` is `torch_twin.Twin`; `transformers` is that library's model, SDPA and
eager, with the policy as its layer and linear maps. Both have the same methods.

Axes: B batch, L rows of a prompt, D width, T frames, N video tokens, V words.
"""

import copy
import inspect
import math

import numpy as np
import torch
import transformers

from cacovid_jax.inference import methods as methods_lib
from cacovid_jax.parity import transformers as transformers_lib
from cacovid_jax.policy import network
from experiments import made_up, stages, torch_twin, training_stage


class Transformers:
  """The released implementation; functions as of `torch_twin.Twin`."""

  def __init__(self, directory, config, policy, device, dtype):
    """Loads a checkpoint's folder; arguments as of the twin."""
    name = "LlavaOnevisionForConditionalGeneration"
    given = directory, name, device, str(dtype).removeprefix("torch."), "sdpa"
    _, self._model = transformers_lib.load(*given)
    self.device, self._core = torch.device(device), self._model.model
    self._policy, self._eps = policy, config.text.rms_norm_eps
    self._dtype, self.newline = dtype, self._core.image_newline
    self.tokens = self._core.language_model.embed_tokens
    self._layer = copy.deepcopy(self._core.language_model.layers[0])
    self._layer.self_attn.is_causal = False
    run = inspect.signature(self._core.language_model.forward).parameters
    # As of transformers 5.24.
    self._cache = "cache" if "cache" in run else "past_key_values"

  def encode(self, pixels):
    """Returns features float[N, D] of pixels float[T, h, w, 3]."""
    pixels = pixels.to(self._dtype).permute(0, 3, 1, 2).contiguous()
    found = self._core.vision_tower(pixels, output_hidden_states=True)
    projected = self._core.multi_modal_projector(found.hidden_states[-1])
    return self._core.apply_pooling(projected).flatten(0, 1)

  def scores(self, x, positions, start, frames, num_video):
    """Returns (frame float32[T, 2], token float32[N, 2]) of one prompt."""
    turn = self._core.language_model.rotary_emb(x, positions[None])
    y = self._layer(x, position_embeddings=turn, attention_mask=None)
    y = y[0] if isinstance(y, tuple) else y
    rows = y[0, start : start + num_video]
    return torch_twin.heads_of(self._policy, frames, rows, self._eps)

  def prefill(self, x, positions, room=0):
    """Returns (logits float32[B, V], cache)."""
    del room  # Its cache grows.
    return self._run(x, positions, None)

  def decode(self, ids, position, at, cache):
    """Returns logits float32[B, V] after tokens int64[B]; the cache stays."""
    del at  # Behind what the cache holds.
    logits, cache = self._run(self.tokens(ids)[:, None], position, cache)
    cache.crop(-1)
    return logits

  def _run(self, x, positions, cache):
    rows = x.shape[1] + (cache.get_seq_length() if cache is not None else 0)
    # Without a mask, gaps in positions are read as ends of sequences.
    mask = torch.ones(len(x), rows, dtype=torch.long, device=x.device)
    out = self._core.language_model(
      inputs_embeds=x, attention_mask=mask, use_cache=True,
      position_ids=positions[None].expand(len(x), -1), **{self._cache: cache},
    )  # fmt: skip
    logits = self._model.lm_head(out.last_hidden_state[:, -1]).float()
    return logits, getattr(out, self._cache)

  def captured(self, function):
    """Returns the function as it is: transformers runs eagerly."""
    return function


ENGINES = {"transformers": Transformers, "twin": torch_twin.Twin}


class Peer:
  """Stages of one prompt by an engine, as of `stages.Ours`."""

  facts = {
    "torch": str(torch.__version__),
    "transformers": transformers.__version__,
  }

  def __init__(self, name, device, subject):
    """Loads the weights that `subject`, a `made_up.MadeUp`, was made of."""
    checkpoint, batch = subject.checkpoint, subject.batch
    dtype = getattr(torch, str(np.dtype(checkpoint.model.dtype)))

    def put(array, dtype=None):
      return torch.from_numpy(np.array(array)).to(device, dtype)

    followed = subject.policy(methods_lib.Method.parse("cacovid"))
    policy = network.to_public(followed.params).items()
    policy = {name: put(array, dtype) for name, array in policy}
    given = checkpoint.identity["path"], checkpoint.model.config, policy
    self.engine = ENGINES[name](*given, device, dtype)
    self._grid, self._num_video = subject.grid, math.prod(subject.grid)
    self._ids = put(batch.ids[0], torch.long)
    self.positions = put(batch.positions[0, 0], torch.long)
    self.pixels = put(subject.pixels)
    self.x = self._embed(put(batch.features[0].astype(np.float32), dtype))

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
  def _embed(self, features):
    """Returns the prompt float[1, L, D] about features float[N, D]."""
    x, end = self.engine.tokens(self._ids), made_up.START + len(features)
    parts = x[: made_up.START], features, self.engine.newline[None]
    return torch.cat([*parts, x[end + 1 :]])[None]

  def scored(self, x):
    """Returns the policy's scores of a prompt."""
    sizes = made_up.START, self._grid[0], self._num_video
    return self.engine.scores(x, self.positions, *sizes)

  def _tower(self, ratio):
    return lambda: self.engine.encode(self.pixels)

  def _scores(self, ratio):
    return lambda: self.scored(self.x)

  def _select(self, ratio):
    return lambda: self._pruned(self.x, ratio)

  def _pruned(self, x, ratio):
    """Returns (x, positions) of what is kept of a prompt."""
    if ratio == 1:
      return x, self.positions
    given = self.scored(x), int(ratio * self._num_video), made_up.START
    rows = torch_twin.kept_rows(*given, x.shape[1])
    return x[:, rows], self.positions[rows]

  def _prefill(self, ratio):
    x, positions = self._pruned(self.x, ratio)
    return lambda: self.engine.prefill(x, positions)[0]

  def _rollout(self, ratio):
    kept = made_up.START + training_stage.rollout_tokens(self._grid)
    head, end = range(made_up.START), made_up.START + self._num_video
    rows = [*head, *kept.tolist(), *range(end, self.x.shape[1])]
    x, positions = self.x[:, rows], self.positions[rows]
    x = x.expand(stages.ROLLOUTS, -1, -1).contiguous()
    return lambda: self.engine.prefill(x, positions)[0]

  def _first_token(self, ratio):
    def run():
      x = self._embed(self.engine.encode(self.pixels))
      return self.engine.prefill(*self._pruned(x, ratio))[0]

    return run

  def _decode(self, ratio):
    x, positions = self._pruned(self.x, ratio)
    logits, cache = self.engine.prefill(x, positions, room=1)
    ids, at = logits.argmax(-1), torch.tensor([x.shape[1]]).to(x.device)
    following = self.positions[-1:] + 1
    return lambda: self.engine.decode(ids, following, at, cache)
