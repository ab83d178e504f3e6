"""The table and the pictures of `epochs`, from its CSV file."""

from experiments.claims import byte_sweeps

redraw = byte_sweeps.redraw
