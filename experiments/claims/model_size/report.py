"""The table and the pictures of `model_size`, from its CSV file."""

from experiments.claims import byte_sweeps

redraw = byte_sweeps.redraw
