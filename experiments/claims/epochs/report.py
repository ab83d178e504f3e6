"""The table and the pictures of `epochs`, from its rows."""

from experiments.claims import byte_sweeps

section = byte_sweeps.section
