"""Trains a model, or goes on training it.

  python -m experiments.train --config=configs/quickstart.py \\
    --workdir=runs/quickstart --config.model.n_future=4

Started again on the same workdir it goes on from the last checkpoint. SIGTERM
and Ctrl-C save the step and exit with 0.
"""

from absl import app, flags

from experiments import program
from mtp_jax import run

_CONFIG = program.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Takes all that a run writes.")
flags.mark_flag_as_required("workdir")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  run.fit(_CONFIG.value.check(), _WORKDIR.value)


if __name__ == "__main__":
  program.start(main)
