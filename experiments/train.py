"""Trains a model, or resumes its training.

  python -m experiments.train --config=configs/quickstart.py \\
    --workdir=runs/quickstart --config.train.steps=1000

Started again on the same workdir, it resumes from the last checkpoint. SIGTERM
and Ctrl-C save the step and exit with 0. Before the first step is compiled they
end the program at once, and so does a second signal of the same kind.
--profile=100:5 traces steps 100 to 104 into the workdir. In several processes:
experiments/launch/.

--init=PATH starts from a model: a workdir, or any folder that `mtp_jax.load`
reads. The model's shape and the tokenizer are then those of PATH.
--config.model.n_future=4 adds heads 2 to 4 to a next-token model, and
--config.train.freeze=trunk trains these alone.
"""

import jax
from absl import flags

from experiments.startup import initial, options, program, terminal
from mtp_jax.model import surgery
from mtp_jax.train import loop

_CONFIG = options.define_config()
_WORKDIR = options.define_path("workdir", None, "Takes all that a run writes.")
_INIT = options.define_path("init", None, "Folder of a model to start from.")
_INIT_HEADS = flags.DEFINE_enum(
  "init_heads",
  "copy",
  surgery.HOW,
  "How new heads are initialised: copies of the last head, or random.",
)
_PROFILE = flags.DEFINE_string(
  "profile", "", "START:COUNT, the steps that jax.profiler traces."
)
flags.mark_flag_as_required("workdir")
_join = options.define_processes()


def main(_: list[str]) -> None:
  """Trains, or resumes, the run in --workdir; process 0 says what is next."""
  _join()
  profile, start = _steps(_PROFILE.value), _start()
  state = loop.fit(start.cfg, _WORKDIR.value, profile=profile, init=start.init)
  text = ""
  if int(state.step) == start.cfg.train.steps and jax.process_index() == 0:
    text = program.next_commands(_WORKDIR.value, start.cfg.model.drafting)
  # Also without a text: what the run printed may not be written yet.
  terminal.print_if_possible(text)


def _start() -> initial.Start:
  if _INIT.value is None:
    options.refuse_idle(["init_heads"], "without --init")
    return initial.Start(_CONFIG.value.check(), None)
  return initial.choose(
    _CONFIG.value, _CONFIG.given, _INIT.value, _WORKDIR.value, _INIT_HEADS.value
  )


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
