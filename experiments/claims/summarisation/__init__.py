"""Finetuning on summaries, with four heads or with the first alone."""
