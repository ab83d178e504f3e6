"""Everything that waits for a GPU or a TPU, in one call."""
