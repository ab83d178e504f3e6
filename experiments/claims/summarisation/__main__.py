"""Does a model of four heads learn to summarise better?

  python -m experiments.claims.summarisation --scale=cpu \\
    --output=runs/finetuning

The models, the ways and the scales are those of `claims/finetuning`: given its
--output, what is pretrained there is used. Figures are in sweep.csv.
"""

from absl import flags

from experiments.claims.finetuning import scales
from experiments.claims.summarisation import report, writing
from experiments.measure import sweep
from experiments.startup import options, program

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is trained.")
_OUTPUT = options.define_output("Folder that takes sweep.csv and the models.")
_SEEDS = flags.DEFINE_integer("seeds", None, "How many; else the scale's.", 1)
_TASKS = flags.DEFINE_list(
  "tasks", list(writing.TASKS), "Of man_pages and docstrings."
)
_MINUTES = options.define_minutes()


def main(_: list[str]) -> None:
  """Trains and measures every way on every task, with every seed."""
  scale = scales.SCALES[_SCALE.value]
  if not set(_TASKS.value) <= set(writing.TASKS):
    raise ValueError(
      f"--tasks={','.join(_TASKS.value)}: choose of {', '.join(writing.TASKS)}"
    )
  runs = writing.runs(
    scale, _OUTPUT.value, _SEEDS.value or scale.seeds, _TASKS.value
  )
  sweep.run_and_show(runs, _OUTPUT.value, _MINUTES.value, report.section)


if __name__ == "__main__":
  program.start(main)
