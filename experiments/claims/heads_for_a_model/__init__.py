"""Heads 2..N for a model that has none, and what they make faster."""
