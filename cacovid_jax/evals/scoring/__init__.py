"""Scores of answers, benchmark by benchmark, as published tables count them.

Each benchmark has a module with a `score(question, text, rule=...)`. Of the two
rules, `paper` is that behind CaCoVID's tables and `lmms-0.7.3` that of
lmms-eval 0.7.3.
"""

from cacovid_jax.data.letters import EXTRACTORS, check_rule, extract
from cacovid_jax.evals.scoring.prepared import score
from cacovid_jax.evals.scoring.scored import Scored

__all__ = [
  "EXTRACTORS",
  "Scored",
  "check_rule",
  "extract",
  "score",
]
