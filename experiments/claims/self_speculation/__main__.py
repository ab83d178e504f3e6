"""Do heads draft better if they were pretrained with the trunk?

  python -m experiments.claims.self_speculation --scale=cpu \\
    --output=runs/self_speculation

A run that was stopped goes on where it was. The figures are in sweep.csv;
`python -m experiments.claims` draws those of `results/`.
"""

from absl import flags

from experiments.claims.self_speculation import report, scales, ways
from experiments.measure import sweep
from experiments.startup import options, program

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is trained.")
_OUTPUT = options.define_output("Folder that takes sweep.csv and the models.")
_SEEDS = flags.DEFINE_integer("seeds", None, "How many; else the scale's.", 1)
_MINUTES = options.define_minutes()


def main(_: list[str]) -> None:
  """Trains and measures every way of getting heads, with every seed."""
  scale = scales.SCALES[_SCALE.value]
  runs = ways.runs(scale, _OUTPUT.value, _SEEDS.value or scale.seeds)
  sweep.run_and_show(runs, _OUTPUT.value, _MINUTES.value, report.section)


if __name__ == "__main__":
  program.start(main)
