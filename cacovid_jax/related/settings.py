"""What the values of a config of the related systems must be."""

from cacovid_jax import config_limits, schema

_PAIRS = tuple[tuple[schema.Count, schema.Count], ...]
_CLIPS = schema.one_of("dense", "sparse")
_FITS = "emcl.fit hcq.fit hcq.clips.fit quecc.fit adaptok.fit infotok.fit"
_FITS += " quecc_llm.fit vqtoken.fit"
_FITS = (*_FITS.split(), "adaptok.scorer_fit")

# Types by key, of (type, names of keys).
LIMITS = config_limits.listed(
  (
    (tuple[config_limits.SEED, ...], "seeds"),
    (schema.Text, "clips.root quecc_llm.policy"),
    (_CLIPS, "clips.variant"),
    (
      tuple[schema.Count, schema.Count],
      "clips.count adaptok.linear quecc_llm.count vqtoken.count",
    ),
    (tuple[tuple[_CLIPS, schema.Count], ...], "quecc_llm.sizes vqtoken.sizes"),
    (
      schema.Count,
      "emcl.pairs emcl.num_bases emcl.width emcl.hidden emcl.batch hcq.train"
      " hcq.test hcq.batch hcq.clips.tokens hcq.clips.width hcq.clips.hidden"
      " hcq.clips.num_local hcq.clips.batch quecc.batch quecc.test"
      " adaptok.train adaptok.test adaptok.scored adaptok.latents adaptok.mean"
      " adaptok.width adaptok.layers adaptok.batch infotok.clips infotok.source"
      " infotok.source_test infotok.batch quecc_llm.width quecc_llm.heads"
      " quecc_llm.batch vqtoken.batch",
    ),
    (bool, "quecc_llm.distil"),
    (schema.Weight, "emcl.noise emcl.subspace_noise"),
    (schema.Weight, "law.noise infotok.enough"),
    (_PAIRS, "hcq.codes quecc.sizes"),
    (tuple[schema.Count, schema.Count], "hcq.clips.codes"),
    (tuple[schema.Fraction | None, ...], "hcq.bounds"),
    (tuple[schema.Count, ...], "adaptok.mean_levels infotok.mean_levels"),
    (schema.Count, " ".join(f"{fit}.steps {fit}.chunk" for fit in _FITS)),
    (schema.Size, " ".join(f"{fit}.warmup" for fit in _FITS)),
    (schema.Positive, " ".join(f"{fit}.lr" for fit in _FITS)),
  )
)
