"""Which models find the path in a star graph, by their number of heads.

  python -m experiments.claims.planning --scale=cpu --output=runs/planning

Trains a model for each graph, n and seed; runs that are finished are not
repeated. The order is that of what is most worth knowing: with --minutes, the
runs that are left are listed.
"""

import functools
import itertools

from experiments.claims.planning import report, scales, training
from experiments.measure import sweep
from experiments.startup import options, program

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is trained.")
_OUTPUT = options.define_output("Folder that takes everything.")
_MINUTES = options.define_minutes()


def main(_: list[str]) -> None:
  """Trains what is not trained yet, and prints the table."""
  scale, folder = scales.SCALES[_SCALE.value], _OUTPUT.value
  folder.mkdir(parents=True, exist_ok=True)
  sweep.use_compilation_cache(folder)  # seeds share them
  order = itertools.product(scale.graphs, scale.seeds, scale.heads)
  runs = [run(scale, *values) for values in order]
  sweep.run_and_show(runs, folder, _MINUTES.value, report.section)


def run(scale, graph, seed, n) -> sweep.Run:
  """One run of the sweep."""
  overrides = {
    "scale": _SCALE.value,
    "degree": graph.degree,
    "length": graph.length,
    "names": graph.names,
    "n": n,
    "width": scale.width,
    "trunk": scale.trunk,
    "batch": scale.batch,
    "steps": scale.steps,
  }
  measure = functools.partial(training.figures, scale, graph, n, seed)
  name = f"G({graph.degree},{graph.length}) n={n}"
  return sweep.Run("planning", name, overrides, seed, lambda _: measure())


if __name__ == "__main__":
  program.start(main)
