"""Whether what several heads give head 1 shrinks when data repeat.

  python -m experiments.claims.epochs --scale=cpu --output=runs/epochs

Trains small models of 1 and 4 heads for 1 and 4 epochs of one corpus.
Runs that are finished are not repeated. --scale=paper trains the paper's own
configs, on a slice of TPUs: in several processes, see experiments/launch.
"""

from experiments.claims import byte_sweeps
from experiments.claims.epochs import report, scales

if __name__ == "__main__":
  byte_sweeps.start(scales.runs, report.section)
