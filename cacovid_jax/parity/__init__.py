"""Compares models and policy with golden files and with transformers."""
