"""Weights of heads that change, heads that leap, heads that are held back."""
