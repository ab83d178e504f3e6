"""Larger models, and what several heads give them."""
