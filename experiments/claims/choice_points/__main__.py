"""What choice points weigh in the loss of n heads, in a known language.

  python -m experiments.claims.choice_points --scale=cpu \\
    --output=runs/choice_points

Trains a small model for each n and seed, and measures loss and gradient of
choice points and of transitions without consequence. Runs that are finished
are not repeated.
"""

import dataclasses
import functools
import itertools

from experiments.claims.choice_points import report, scales, weights
from experiments.measure import sweep
from experiments.startup import options, program

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is trained.")
_OUTPUT = options.define_output("Folder that takes everything.")
_MINUTES = options.define_minutes()


def main(_: list[str]) -> None:
  """Trains what is not trained yet, and prints the table."""
  scale, folder = scales.SCALES[_SCALE.value], _OUTPUT.value
  order = itertools.product(scale.heads, scale.seeds)
  runs = [run(scale, *values) for values in order]
  sweep.run_and_show(runs, folder, _MINUTES.value, report.section)


def run(scale, n, seed) -> sweep.Run:
  """One run of the sweep."""
  overrides = dataclasses.asdict(scale.language) | {
    "n": n,
    "width": scale.width,
    "batch": scale.batch,
    "measured": scale.measured,
  }
  measure = functools.partial(weights.figures, scale, n, seed)
  return sweep.Run(
    "choice_points", f"n={n}", overrides, seed, lambda _: measure()
  )


if __name__ == "__main__":
  program.start(main)
