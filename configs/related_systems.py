r"""The related systems that learn, on planted data and on the embedded clips.

python -m experiments.related_systems --workdir workdirs/related
Smoke test on CPU in a minute: `configs/related_systems.py:debug`.
`:cpu` is of a size that two cores take; docs/related_systems.md has its
figures.
"""

import ml_collections

from configs import common


def get_config(arg=None):
  arg = common.parse_arg(arg, debug=False, cpu=False)
  config = ml_collections.ConfigDict()
  config.seeds = (0,) if arg.debug else (0, 1, 2)
  size = "debug" if arg.debug else "cpu" if arg.cpu else "full"
  config.clips = dict(
    root=f"workdirs/data/related_{size}",
    variant="sparse",
    # To train on and to test on.
    count=_of(size, (8, 4), (160, 40), (6000, 1000)),
  )
  config.emcl = _emcl(size)
  config.hcq = _hcq(size)
  config.quecc = _quecc(size)
  config.quecc_llm = _quecc_llm(size)
  config.vqtoken = _vqtoken(size)
  config.law = dict(noise=0.003)
  config.adaptok = _adaptok(size)
  config.infotok = _infotok(size)
  return config


def _of(size, debug, cpu, full):
  return {"debug": debug, "cpu": cpu, "full": full}[size]


def _fit(size, steps, lr, chunk, warmup=0):
  """Returns a `fitting.Schedule`; a smoke test makes two steps."""
  if size == "debug":
    return dict(steps=2, lr=lr, chunk=1, warmup=0)
  return dict(steps=steps, lr=lr, chunk=chunk, warmup=warmup)


def _emcl(size):
  return dict(
    pairs=_of(size, 40, 500, 500),
    num_bases=32,
    noise=1.6,  # Of each dimension, beside a signal of 1.
    subspace_noise=1.4,
    width=_of(size, 32, 64, 128),
    hidden=_of(size, 16, 128, 256),
    batch=_of(size, 8, 32, 64),
    fit=_fit(size, _of(size, 2, 300, 4000), 1e-3, 100),
  )


def _hcq(size):
  train = _of(size, 64, 6000, 6000)
  batch = _of(size, 32, 128, 128)
  epochs = _of(size, 1, 20, 50)
  steps = train // batch
  return dict(
    train=train,
    test=_of(size, 32, 2000, 2000),
    batch=batch,
    # Parts and codewords; 64, 32 and 16 times smaller than floats.
    codes=_of(size, ((8, 4),), ((8, 16), (16, 16), (32, 16)),
              ((8, 16), (16, 16), (32, 16), (16, 256))),
    # How much training is to add over codes fitted afterwards; None is a case
    # in which it should add nothing.
    bounds=_of(size, (0.1,), (0.1, 0.03, None), (0.1, 0.03, None, None)),
    fit=_fit(size, epochs * steps, 1e-3, steps),
    clips=dict(
      tokens=_of(size, 8, 48, 64),  # Of a video, that DivPrune keeps.
      width=_of(size, 16, 64, 64),
      hidden=_of(size, 16, 128, 256),
      num_local=_of(size, 2, 3, 7),
      codes=_of(size, (4, 4), (16, 16), (16, 16)),
      batch=_of(size, 8, 64, 128),
      fit=_fit(size, _of(size, 2, 200, 4600), 1e-3, _of(size, 1, 10, 92)),
    ),
  )  # fmt: skip


def _infotok(size):
  return dict(
    clips=_of(size, 20, 100, 100),
    mean_levels=_of(size, (4,), (2, 4, 8), (2, 4, 8)),  # Of 16.
    # Clips of the source of k bits, to train on and to test on.
    source=_of(size, 64, 4000, 20000),
    source_test=_of(size, 32, 500, 2000),
    batch=_of(size, 16, 128, 128),
    enough=0.25,  # Squared error that counts as none, of 1 a bit.
    fit=_fit(size, _of(size, 2, 1500, 6000), 3e-3, 300),
  )


def _adaptok(size):
  return dict(
    # Clips of the linear code, to fit and to allocate to: the exact allocator
    # takes their square.
    linear=_of(size, (20, 8), (400, 100), (1500, 100)),
    mean_levels=_of(size, (4,), (2, 4, 8), (2, 4, 8)),  # Of 16.
    train=_of(size, 16, 2000, 20000),
    test=_of(size, 4, 64, 256),
    scored=_of(size, 8, 256, 2000),  # Clips whose errors a scorer learns.
    latents=8,  # Of a block of 16 patches.
    mean=4,  # Latents that a block gets on average.
    width=_of(size, 16, 64, 64),
    layers=_of(size, 1, 2, 2),
    batch=_of(size, 4, 16, 64),
    fit=_fit(size, _of(size, 2, 1500, 12000), 1e-3, 250, 100),
    scorer_fit=_fit(size, _of(size, 2, 1000, 3000), 1e-3, 250),
  )


def _quecc(size):
  return dict(
    # Cells along a side, width; the first is that of the bars. A wide vector
    # holds all 36 colours, so the gap is to close there.
    sizes=_of(size, ((1, 16),), ((1, 32),),
              ((1, 32), (1, 16), (1, 128), (2, 32))),
    batch=_of(size, 8, 128, 128),
    test=_of(size, 32, 2000, 8000),
    fit=_fit(size, _of(size, 2, 1500, 6000), 2e-3, 250, 100),
  )  # fmt: skip


def _quecc_llm(size):
  return dict(
    # Of which clips, and cells along a side; 7 x 7 tokens are cut into 1, 2, 3,
    # 4 or 7. The bars are of the first, and of the last, where few objects need
    # no question.
    sizes=_of(size, (("dense", 1),), (("sparse", 1),),
              (("dense", 1), ("dense", 2), ("dense", 4), ("sparse", 1))),
    count=_of(size, (2, 1), (300, 64), (2000, 250)),
    policy="",  # "" is the shipped one.
    # Whether training gives questions the keys and values that whole clips
    # give, too.
    distil=True,
    width=_of(size, 16, 128, 128),
    heads=_of(size, 2, 8, 8),
    batch=_of(size, 2, 32, 64),
    fit=_fit(size, _of(size, 2, 1200, 2000), 2e-3, 50, 50),
  )  # fmt: skip


def _vqtoken(size):
  return dict(
    # Of which clips, and clusters; `dense` ones hold more objects.
    sizes=_of(size, (("sparse", 16),), (("sparse", 16),),
              (("sparse", 12), ("sparse", 32), ("dense", 32))),
    count=_of(size, (2, 1), (200, 32), (2000, 250)),
    batch=_of(size, 2, 16, 64),
    fit=_fit(size, _of(size, 2, 100, 600), 3e-4, 50, 20),
  )  # fmt: skip
