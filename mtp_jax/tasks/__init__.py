"""Tasks: the documents of each, and its measure."""
