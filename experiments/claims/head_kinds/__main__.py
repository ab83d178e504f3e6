"""The kinds of heads of the paper's table S4, at equal total layers.

  python -m experiments.claims.head_kinds --scale=cpu --output=runs/head_kinds

Trains a small model for each kind and seed.
Runs that are finished are not repeated. --scale=paper trains the paper's own
configs, on a slice of TPUs: in several processes, see experiments/launch.
"""

from experiments.claims import byte_sweeps
from experiments.claims.head_kinds import report, scales

if __name__ == "__main__":
  byte_sweeps.start(scales.runs, report.section)
