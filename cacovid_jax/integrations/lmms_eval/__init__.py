"""A model of lmms-eval, and tasks for it."""
