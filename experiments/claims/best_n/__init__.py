"""Which number of heads is best."""
