"""Attention and cross-entropy kernels on TPUs, judged ahead of time."""
