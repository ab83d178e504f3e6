"""Multi-token prediction and arithmetic of polynomials (paper, 4.2)."""
