"""Curricula of head weights, leaps and held-back heads, beside the plain sum.

  python -m experiments.claims.curricula --scale=cpu --output=runs/curricula

Trains a small model for each (`scales.CURRICULA`) and seed.
Runs that are finished are not repeated.
"""

from experiments.claims import byte_sweeps
from experiments.claims.curricula import report, scales
from experiments.measure import python_models

if __name__ == "__main__":
  byte_sweeps.start(scales.runs, report.section, python_models.SIZES)
