"""Does a model of four heads finetune better, and with how many heads?

  python -m experiments.claims.finetuning --scale=cpu --output=runs/finetuning

Pretrains byte models on this machine's Python files, finetunes them on the
built-in task `functions`, and measures pass@k on held-out functions. A run that
was stopped goes on where it was. Figures are in sweep.csv; `python -m
experiments.claims` draws those of `results/`.
"""

from absl import flags

from experiments.claims.finetuning import report, scales, solving
from experiments.measure import sweep
from experiments.startup import options, program

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is trained.")
_OUTPUT = options.define_output("Folder that takes sweep.csv and the models.")
_SEEDS = flags.DEFINE_integer("seeds", None, "How many; else the scale's.", 1)
_MINUTES = options.define_minutes()


def main(_: list[str]) -> None:
  """Trains and measures every way, with every seed."""
  scale = scales.SCALES[_SCALE.value]
  runs = solving.runs(scale, _OUTPUT.value, _SEEDS.value or scale.seeds)
  sweep.run_and_show(runs, _OUTPUT.value, _MINUTES.value, report.section)


if __name__ == "__main__":
  program.start(main)
