"""Do models of two future tokens learn induction better?

  python -m experiments.claims.induction --scale=cpu --output=runs/induction

The folder takes sweep.csv, a row per figure, and the plots. The same command
goes on where it was stopped. `--stories` and `--tokenizer` take another corpus
than the built-in stories.
"""

from absl import flags

from experiments.claims.induction import report, scales, training
from experiments.measure import sweep
from experiments.startup import options, program

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is trained.")
_OUTPUT = options.define_output("Folder that takes everything.")
_MINUTES = options.define_minutes()
_RUNS = options.define_runs()
_STORIES = options.define_path(
  "stories", None, "Stories: a folder of texts, or a JSONL or ArrayRecord file."
)
_TOKENIZER = flags.DEFINE_string(
  "tokenizer",
  None,
  "Of --stories: 'bytes', a SentencePiece model or a tokenizer.json.",
)


def main(_: list[str]) -> None:
  """Trains and tests, then draws."""
  if bool(_STORIES.value) != bool(_TOKENIZER.value):
    raise ValueError("--stories and --tokenizer need each other: give both")
  folder = _OUTPUT.value
  sweep.use_compilation_cache(folder)
  scale = scales.SCALES[_SCALE.value]
  runs = training.runs(scale, _STORIES.value, _TOKENIZER.value)
  runs = sweep.chosen(runs, _RUNS.value)
  if not _STORIES.value:
    training.prepare(scale)
  sweep.run_and_show(runs, folder, _MINUTES.value, report.section)


if __name__ == "__main__":
  program.start(main)
