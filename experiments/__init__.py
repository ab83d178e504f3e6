"""Programs: the only place where flags are read."""
