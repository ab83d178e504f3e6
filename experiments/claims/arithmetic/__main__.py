"""Do models of several future tokens learn arithmetic better?

  python -m experiments.claims.arithmetic --scale=cpu \\
    --output=runs/arithmetic

The folder takes sweep.csv, a row per figure, and the plots. The same command
goes on where it was stopped.
"""

from experiments.claims.arithmetic import report, scales, training
from experiments.measure import sweep
from experiments.startup import options, program

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is trained.")
_OUTPUT = options.define_output("Folder that takes everything.")
_MINUTES = options.define_minutes()
_RUNS = options.define_runs()


def main(_: list[str]) -> None:
  """Trains and tests, then draws."""
  folder = _OUTPUT.value
  sweep.use_compilation_cache(folder)
  scale = scales.SCALES[_SCALE.value]
  runs = sweep.chosen(training.runs(scale), _RUNS.value)
  training.prepare(scale)
  sweep.run_and_show(runs, folder, _MINUTES.value, report.section)


if __name__ == "__main__":
  program.start(main)
