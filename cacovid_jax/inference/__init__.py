"""Clips to features, questions to answers: what every command asks with."""
