"""Whether larger models gain more from several heads.

  python -m experiments.claims.model_size --scale=cpu --output=runs/model_size

Trains models of several widths with one head and with several.
Runs that are finished are not repeated. --scale=paper trains the paper's own
configs, on a slice of TPUs: in several processes, see experiments/launch.
"""

from experiments.claims import byte_sweeps
from experiments.claims.model_size import report, scales

if __name__ == "__main__":
  byte_sweeps.start(scales.runs, report.section)
