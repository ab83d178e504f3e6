"""Do more heads teach a model to look ahead? Paths in star graphs."""
