"""Multi-token prediction and induction in stories (paper, section 4.1)."""
