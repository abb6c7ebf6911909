"""Three compressors in plain PyTorch, compared with ours and timed beside them.

Written from the same descriptions as `cacovid_jax.compressors`, the way they
are usually written: Python loops where counts depend on the data, float32. All
return int64[K] tokens, ascending.

Axes: T frames, P tokens of a frame, N = T * P, D width, K kept tokens.
"""

import functools
import itertools

import numpy as np
import torch

METHODS = ("divprune", "visionzip", "prunevid")
_NEIGHBOURS = 7


def prepare(name, given, num_keep, device):
  """Returns f() -> tokens of `base.CompressorInputs`, features in bfloat16."""

  def tensor(array):
    return torch.from_numpy(np.array(array, np.float32)).to(device)

  torch.backends.cuda.matmul.allow_tf32 = False
  x, num_frames = tensor(given.features).to(torch.bfloat16), given.grid[0]
  if name == "divprune":
    return functools.partial(divprune, x, num_keep)
  if name == "prunevid":
    return functools.partial(prunevid, x, num_frames, num_keep)
  signals = tensor(given.vision_attention), tensor(given.vision_keys)
  return functools.partial(visionzip, x, *signals, num_frames, num_keep)


def divprune(features, num_keep):
  """Returns a max-min diverse subset of features float[N, D]."""
  unit = torch.nn.functional.normalize(features.float(), dim=-1)
  distances = 1.0 - unit @ unit.T
  nearest = distances.clone().fill_diagonal_(torch.inf).amin(dim=0)
  picked = [nearest.argmax()]
  best = torch.full_like(nearest, torch.inf)
  for _ in range(num_keep - 1):
    best = torch.minimum(best, distances[picked[-1]])
    best[picked[-1]] = -torch.inf
    picked.append(best.argmax())
  return torch.stack(picked).sort().values


def visionzip(features, attention, keys, num_frames, num_keep):
  """Returns dominant and contextual tokens; computes their merged rows too.

  Of features float[N, D], attention float[N] received in the vision tower, and
  keys float[N, dk]; the first K mod T frames keep one more.
  """
  size = len(features) // num_frames
  index, rows = [], []
  for frame in range(num_frames):
    here = slice(frame * size, (frame + 1) * size)
    x, budget = features[here].float(), num_keep // num_frames
    budget += frame < num_keep % num_frames
    num_dominant = int(budget * 54 / 64)
    num_contextual = budget - num_dominant
    order = attention[here].float().argsort(descending=True, stable=True)
    dominant = order[:num_dominant].sort().values
    others = order[num_dominant:].sort().values
    step = max(1, len(others) // max(1, num_contextual))
    is_context = torch.zeros(len(others), dtype=torch.bool, device=x.device)
    is_context[: step * num_contextual : step] = True
    contexts, rest = others[is_context], others[~is_context]
    values = x.clone()
    if num_contextual:
      unit = torch.nn.functional.normalize(keys[here].float(), dim=-1)
      joined = (unit[rest] @ unit[contexts].T).argmax(dim=-1)
      total = torch.zeros(num_contextual, x.shape[1], device=x.device)
      total.index_add_(0, joined, x[rest])
      count = torch.bincount(joined, minlength=num_contextual)
      values[contexts] += total / count.clamp(min=1)[:, None]
    kept = torch.cat([dominant, contexts]).sort().values
    index.append(kept + frame * size)
    rows.append(values[kept])
  torch.cat(rows)
  return torch.cat(index)


def prunevid(features, num_frames, num_keep):
  """Returns the central tokens of the clusters of PruneVID's first stage."""
  x = features.float().reshape(num_frames, -1, features.shape[1])
  labels = _cluster(x.mean(dim=1), max(1, num_frames // 4))[1].tolist()
  place = torch.arange(len(features), device=x.device).view(num_frames, -1)
  sets = []  # (tokens, their places).
  for start, end in _segments(labels):
    x_segment = torch.nn.functional.normalize(x[start:end], dim=-1)
    w = end - start
    static = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    if w > 1:
      squared = x_segment.sum(dim=0).square().sum(dim=-1)
      static = (squared - w) / (w * (w - 1)) > 0.8
    if static.any():
      sets.append((x[start:end, static].mean(dim=0), place[start, static]))
    if not static.all():
      for frame in range(start, end):
        sets.append((x[frame, ~static], place[frame, ~static]))
  budgets = _shares([len(tokens) for tokens, _ in sets], num_keep)
  index = [
    place[_cluster(tokens, budget)[0]]
    for (tokens, place), budget in zip(sets, budgets, strict=True)
  ]
  return torch.cat(index).sort().values


def _cluster(x, count):
  """Returns (centres int64[count], label int64[n]) of density peaks."""
  distances = torch.cdist(x, x) / x.shape[1] ** 0.5
  nearest = distances.topk(min(_NEIGHBOURS, len(x)), largest=False).values
  density = (-nearest.square().mean(dim=-1)).exp()
  # Equal densities: the earlier one counts as denser.
  place = torch.arange(len(x), device=x.device)
  denser = density[None] > density[:, None]
  denser |= (density[None] == density[:, None]) & (place[None] < place[:, None])
  apart = torch.where(denser, distances, torch.inf).amin(dim=-1)
  apart = torch.where(denser.any(dim=-1), apart, distances.max())
  centres = (density * apart).topk(count).indices
  label = distances[:, centres].argmin(dim=-1)
  label[centres] = torch.arange(count, device=x.device)
  return centres, label


def _segments(labels):
  """Returns [(start, end)] of contiguous frames, of labels per frame.

  The longest runs of a label stay, if of several frames; what lies between two
  of them goes to the longer one.
  """
  runs = [(label, len([*run])) for label, run in itertools.groupby(labels)]
  # Of a label's runs, the longest one comes last.
  longest = dict(sorted(runs, key=lambda run: run[1]))
  stays = [1 < length == longest[label] for label, length in runs]
  merged = []  # [label, length], contiguous.
  for i, (label, length) in enumerate(runs):
    if not stays[i]:
      right = next((runs[j] for j in range(i, len(runs)) if stays[j]), [0, 0])
      left = merged[-1] if merged else [0, 0]
      inside = i and not stays[i - 1]
      label = right[0] if right[1] > left[1] and not inside else left[0]
    if merged and merged[-1][0] == label:
      merged[-1][1] += length
    else:
      merged.append([label, length])
  ends = [*itertools.accumulate(length for _, length in merged)]
  return list(zip([0, *ends[:-1]], ends, strict=True))


def _shares(sizes, total):
  """Returns budgets in proportion to sizes, at least 1 and at most the size."""
  exact = [total * size / sum(sizes) for size in sizes]
  budgets = [
    max(1, min(size, int(share)))
    for size, share in zip(sizes, exact, strict=True)
  ]
  while sum(budgets) != total:
    step = 1 if sum(budgets) < total else -1
    room = [i for i, size in enumerate(sizes) if 1 <= budgets[i] + step <= size]
    best = max(room, key=lambda i: step * (exact[i] - budgets[i]))
    budgets[best] += step
  return budgets
