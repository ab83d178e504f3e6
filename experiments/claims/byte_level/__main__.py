"""Byte models of 1 to 32 heads at equal data, and what their heads save.

  python -m experiments.claims.byte_level --scale=cpu --output=runs/byte_level

Trains a small model for each number of heads and seed.
Runs that are finished are not repeated. --scale=paper trains the paper's own
configs, on a slice of TPUs: in several processes, see experiments/launch.
"""

from experiments.claims import byte_sweeps
from experiments.claims.byte_level import report, scales

if __name__ == "__main__":
  byte_sweeps.start(scales.runs, report.section)
