"""The paper's training runs, a file per family."""
