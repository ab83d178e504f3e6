"""The README's first command: train, decode both ways, compare."""
