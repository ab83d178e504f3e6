"""Everything that waits for a GPU or a TPU, in one call.

  python -m experiments.engineering.accelerator --minutes=7 --output=DIR

Four stages, in the order of their worth, each with a share of the time and in
a process of its own, so that one that crashes, hangs or fills the memory costs
only itself:

  exactness   kernels, gradients and speculative texts against the formulas
  decoding    time of a pass of 1.3B, against bandwidth and FLOP/s
  training    time of steps of 0.3B and 1.3B, and their largest batches
  byte model  trained for the minutes left, then decode_speed

DIR/results.json holds each result as soon as it is there, what failed, and
what no longer fitted into the time; a call that is interrupted leaves what it
had. A stage that is called again on the same DIR is done anew; its earlier
results stay, under `earlier`.
"""

import math
import multiprocessing
import os
import sys
import time

from absl import flags

from experiments.engineering.accelerator import (
  record,
  report,
  scales,
  stage,
  supervise,
)
from experiments.measure import study
from experiments.startup import interrupts, options, program

_MINUTES = flags.DEFINE_float("minutes", 7.0, "For all.", lower_bound=0.0)
flags.register_validator(
  "minutes", math.isfinite, "not a finite number, of which stages take shares"
)
_OUTPUT = options.define_output("Folder of the results.")
_STAGES = flags.DEFINE_list("stages", None, "Only these, as byte_model.")
_SCALE = options.define_scale(
  scales.SCALES, None, "Shapes; without it, the device's."
)
_COMMIT = flags.DEFINE_string(
  "commit", None, "Of the code, where git does not tell."
)


def main(_: list[str]) -> None:
  """Runs the chosen stages in turn; `results.json` is rewritten after each."""
  begin, folder, names = time.time(), _OUTPUT.value, chosen()
  options.make_room(folder / record.FILE)
  # JAX takes three quarters by default: too little for the largest batch.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
  record.begin_call(
    folder,
    {
      "command": study.command(),
      "commit": _COMMIT.value or study.commit(),
      "begun": record.now(),
      "minutes": _MINUTES.value,
    },
  )
  interrupts.unwind_at_sigterm()
  processes = multiprocessing.get_context("forkserver")
  processes.set_forkserver_preload([stage.__name__])  # imported once for all
  total, share = sum(stage.SHARES[n] for n in names), 0.0
  left = names.copy()
  try:
    while left:
      name = left.pop(0)
      share += stage.SHARES[name] / total  # with what those before did not use
      until = begin + 60 * _MINUTES.value * share
      supervise.run(processes, stage.run, name, folder, until, _SCALE.value)
  finally:  # Ctrl-C and SIGTERM, too
    for name in left:
      record.leave_out(folder, name, "interrupted")
    whole = record.read(folder)
    not_begun = whole["calls"][-1].get("left_out", [])
    print(report.text(whole["stages"], not_begun), flush=True)
  stages = record.of_last_call(whole)
  if not any(section["results"] for section in stages.values()):
    sys.exit("error: no stage has a result")
  if bad := record.ended_badly(stages):
    sys.exit(
      f"error: {'; '.join(bad)}. Results so far are kept in "
      f"{folder / record.FILE}; --stages names those to run again"
    )


def chosen() -> list[str]:
  """Names of the stages, in order."""
  wanted = [n.replace("_", " ") for n in _STAGES.value or stage.SHARES]
  if unknown := [n for n in wanted if n not in stage.SHARES]:
    known = ", ".join(n.replace(" ", "_") for n in stage.SHARES)
    raise ValueError(f"--stages: no stage {unknown[0]!r}; there are {known}")
  return [n for n in stage.SHARES if n in wanted]


if __name__ == "__main__":
  program.start(main)
