"""Checkpoints: written by orbax, guarded by a checksum per array."""
