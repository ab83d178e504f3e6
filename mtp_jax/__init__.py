"""Multi-token prediction for JAX (arXiv 2404.19737)."""

__version__ = "0.1.0"
