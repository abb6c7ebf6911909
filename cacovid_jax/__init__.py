"""CaCoVID in JAX: a token policy for video LLMs, trained on their answers."""

__version__ = "0.2.0"
