"""How fast a training step is, and how large a batch it takes."""
