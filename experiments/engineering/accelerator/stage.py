"""One stage in a process of its own."""

import logging
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import threading

import jax
from absl import flags
from absl import logging as absl_logging

from experiments.engineering.accelerator import (
  byte_model,
  decoding,
  exactness,
  record,
  scales,
  training,
)
from experiments.measure import study
from experiments.startup import interrupts, program

# In the order of their worth, with their shares of the time.
SHARES = {
  "exactness": 0.20,
  "decoding": 0.28,
  "training": 0.32,
  "byte model": 0.20,
}
# Without Triton's products, of which each is compiled in dozens of variants
# to find the fastest: exactness has many products and times none.
_XLA_FLAGS = {"exactness": "--xla_gpu_enable_triton_gemm=false"}
_STAGES = {
  "exactness": exactness.run,
  "decoding": decoding.run,
  "training": training.run,
  "byte model": byte_model.run,
}


def run(
  name: str, folder: pathlib.Path, until: float, scale: str | None
) -> None:
  """Does a stage and writes its section of the results.

  Args:
    name: a key of SHARES.
    folder: of the results; `scratch` in it takes programs and checkpoints.
    until: when the stage's time ends, in seconds since the epoch.
    scale: a key of `scales.SCALES`; None: by the device.
  """
  _end_with_parent()
  interrupts.watch()
  if name in _XLA_FLAGS:
    given = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{_XLA_FLAGS[name]} {given}"
  flags.FLAGS.mark_as_parsed()  # what logging and grain ask for
  absl_logging.set_verbosity(absl_logging.INFO)
  absl_logging.use_absl_handler()
  absl_logging.get_absl_handler().addFilter(program.worth_saying)
  logging.getLogger("jax").setLevel(logging.WARNING)
  if not jax.config.jax_compilation_cache_dir:
    where = str(folder / "scratch" / "programs")
    jax.config.update("jax_compilation_cache_dir", where)
  stage = record.Stage(folder, name, until)
  try:
    if scale is None:
      scale = "cpu" if jax.default_backend() == "cpu" else "gpu"
    stage.section |= {
      "scale": scale,
      "machine": study.machine(),
      "device": record.device(),
    }
    stage.save()
    _STAGES[name](stage, scales.SCALES[scale])
  except Exception as error:  # outside of any attempt
    stage.finish(f"failed: {record.reason(error)}")
    raise
  stage.finish()


def _end_with_parent() -> None:
  """Ends this process when the one that started it is gone."""
  parent = multiprocessing.parent_process()

  def watch():
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)

  if parent:
    threading.Thread(target=watch, daemon=True).start()
