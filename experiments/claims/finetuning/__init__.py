"""Finetuning a model of four heads, with four or with the first alone."""
