"""Trains a model, or resumes its training.

  python -m experiments.train --config=configs/quickstart.py \\
    --workdir=runs/quickstart --config.train.steps=1000

Started again on the same workdir, it resumes from the last checkpoint. SIGTERM
and Ctrl-C save the step and exit with 0. Before the first step is compiled they
end the program at once, and so does a second signal of the same kind.
--profile=100:5 traces steps 100 to 104 into the workdir. In several processes:
experiments/launch/.
"""

import jax
from absl import flags

from experiments.startup import options, program, terminal
from mtp_jax.train import loop

_CONFIG = options.define_config()
_WORKDIR = options.define_path("workdir", None, "Takes all that a run writes.")
_PROFILE = flags.DEFINE_string(
  "profile", "", "START:COUNT, the steps that jax.profiler traces."
)
flags.mark_flag_as_required("workdir")
_join = options.define_processes()


def main(_: list[str]) -> None:
  """Trains, or resumes, the run in --workdir; process 0 says what is next."""
  _join()
  cfg = _CONFIG.value.check()
  state = loop.fit(cfg, _WORKDIR.value, profile=_steps(_PROFILE.value))
  text = ""
  if int(state.step) == cfg.train.steps and jax.process_index() == 0:
    text = program.next_commands(_WORKDIR.value, cfg.model.n_future)
  # Also without a text: what the run printed may not be written yet.
  terminal.print_if_possible(text)


def _steps(text: str) -> range:
  first, colon, count = text.partition(":")
  if not text:
    return range(0)
  numbers = first.isdecimal() and count.isdecimal()
  if not (colon and numbers and int(first) and int(count)):
    raise ValueError(f"--profile={text} is not START:COUNT, such as 100:5")
  return range(int(first), int(first) + int(count))


if __name__ == "__main__":
  program.start(main)
