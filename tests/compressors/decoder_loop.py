"""The decoder in NumPy, float64, with whole attention maps; an oracle.

One prompt, layer by layer; rows are physically there or not.
"""

import numpy as np


def _in_float64(tree):
  if hasattr(tree, "items"):
    return {name: _in_float64(value) for name, value in tree.items()}
  return np.asarray(tree, np.float64)


class Decoder:
  """Reads the parameters of a `models.video_llm.VideoLLM`."""

  def __init__(self, model, params):
    self.cfg = model.config.text
    self._text = _in_float64(params["language_model"])
    self._layers = self._text["layers"]

  def weight(self, number, *names):
    value = self._layers
    for name in names:
      value = value[name]
    return value[number]

  def norm(self, x, scale):
    x = np.asarray(x, np.float64)
    mean = (x**2).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean + self.cfg.rms_norm_eps) * scale

  def rotate(self, x, positions):
    """x [L, heads, H], positions [P, L]."""
    half = self.cfg.head_dim // 2
    sections = self.cfg.rope_sections or (half,)
    driver = np.repeat(np.arange(len(sections)), sections)
    out = np.empty_like(x)
    for j in range(half):
      angle = positions[driver[j], :, None] * self.cfg.rope_theta ** (-j / half)
      a, b = x[..., j], x[..., j + half]
      out[..., j] = a * np.cos(angle) - b * np.sin(angle)
      out[..., j + half] = b * np.cos(angle) + a * np.sin(angle)
    return out

  def attend(self, number, x, positions, earlier=None):
    """Returns (x behind the residual, probs [heads, L, S], keys, values).

    `earlier` are keys and values of tokens before all of x.
    """
    cfg = self.cfg
    h = self.norm(x, self.weight(number, "input_layernorm", "scale"))

    def project(name, heads):
      y = h @ self.weight(number, name, "kernel")
      y = y + self.weight(number, name, "bias")
      return y.reshape(len(x), heads, cfg.head_dim)

    q = self.rotate(project("q_proj", cfg.num_heads), positions)
    k = self.rotate(project("k_proj", cfg.num_kv_heads), positions)
    v = project("v_proj", cfg.num_kv_heads)
    before = 0
    if earlier is not None:
      before = len(earlier[0])
      k, v = (
        np.concatenate(pair) for pair in zip(earlier, (k, v), strict=True)
      )
    probs = np.zeros((cfg.num_heads, len(x), len(k)))
    out = np.zeros((len(x), cfg.num_heads, cfg.head_dim))
    for head in range(cfg.num_heads):
      kv = head // (cfg.num_heads // cfg.num_kv_heads)
      for t in range(len(x)):
        seen = before + t + 1
        scores = k[:seen, kv] @ q[t, head] / np.sqrt(cfg.head_dim)
        scores = np.exp(scores - scores.max())
        probs[head, t, :seen] = scores / scores.sum()
        out[t, head] = probs[head, t, :seen] @ v[:seen, kv]
    out = out.reshape(len(x), -1) @ self.weight(number, "o_proj", "kernel")
    return np.asarray(x, np.float64) + out, probs, k, v

  def feed_forward(self, number, x):
    h = self.norm(x, self.weight(number, "post_attention_layernorm", "scale"))
    gate = h @ self.weight(number, "gate_proj", "kernel")
    up = h @ self.weight(number, "up_proj", "kernel")
    silu = gate / (1 + np.exp(-gate))
    return x + (silu * up) @ self.weight(number, "down_proj", "kernel")

  def logits(self, x):
    text = self._text
    table = "embed_tokens" if self.cfg.tie_embeddings else "lm_head"
    return self.norm(x, text["norm"]["scale"]) @ text[table].T

  def embed(self, token):
    return self._text["embed_tokens"][token]

  def decode(self, logits, caches, next_position, num_tokens, num_rows):
    """Returns (ids, logits that chose them and those behind the last one).

    `caches` are [(keys, values)] of each layer, of what came before.
    """
    caches, ids, seen = list(caches), [], []
    for step in range(num_tokens):
      ids.append(int(np.argmax(logits)))
      seen.append(logits)
      x = self.embed(ids[-1])[None]
      positions = np.full((num_rows, 1), next_position + step)
      for number in range(self.cfg.num_layers):
        x, _, k, v = self.attend(number, x, positions, caches[number])
        caches[number] = k, v
        x = self.feed_forward(number, x)
      logits = self.logits(x[0])
    return ids, np.stack([*seen, logits])
