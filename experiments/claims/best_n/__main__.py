"""Which number of heads is best for head 1, at equal total layers.

  python -m experiments.claims.best_n --scale=cpu --output=runs/best_n

Trains a small model for each number of heads and seed.
Runs that are finished are not repeated. --scale=paper trains the paper's own
configs, on a slice of TPUs: in several processes, see experiments/launch.
"""

from experiments.claims import byte_sweeps
from experiments.claims.best_n import report, scales

if __name__ == "__main__":
  byte_sweeps.start(scales.runs, report.section)
