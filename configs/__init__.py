"""Runs: a file each, or a name in a file, with get_config()."""
