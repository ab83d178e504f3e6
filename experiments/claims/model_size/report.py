"""The table and the pictures of `model_size`, from its rows."""

from experiments.claims import byte_sweeps

section = byte_sweeps.section
