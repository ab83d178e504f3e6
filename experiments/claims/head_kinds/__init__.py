"""The kinds of heads, compared."""
