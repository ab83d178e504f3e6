"""Trains in two processes, does everything to them, and counts what is lost.

  python -m experiments.engineering.soak --minutes=15

One fault after another, at random moments of a training that saves every few
steps; after each the run is started again and has to go on from the newest
checkpoint that was committed. A training that comes to its end is compared,
bit for bit, with one in a single process that nothing happened to, and the next
one begins.

  SIGKILL             to one process: the other has to stop by itself
  SIGTERM             to one process: both save the same step and end with 0
  full disk           during a save: the run stops and says so
  damaged checkpoint  bits of the newest one flipped while nothing runs
  damaged data        bits of the packed corpus flipped while nothing runs

Prints a line per fault; --output takes the counts as JSON.
"""

import json
import sys
import time

import jax
from absl import flags

from experiments.engineering.soak import faults
from experiments.engineering.soak import job as job_lib
from experiments.measure import study
from experiments.startup import options, program

_MINUTES = flags.DEFINE_float("minutes", 15.0, "Time in which faults happen.")
_STEPS = flags.DEFINE_integer("steps", 300, "Length of one training.")
_SEED = options.define_seed("Of the faults and their moments.")
_FAULTS = flags.DEFINE_list("faults", None, "Only these, as full_disk.")
_WORKDIR = options.define_path("workdir", "runs/soak", "Emptied at the start.")
_OUTPUT = options.define_output("Takes the result as JSON.", required=False)


def main(_: list[str]) -> None:
  """Trains undisturbed, then under faults; exits with 1 on a broken promise."""
  if _OUTPUT.value:
    options.make_room(_OUTPUT.value)
  jax.config.update("jax_platforms", "cpu")
  kinds, home = chosen(), _WORKDIR.value.absolute()
  with job_lib.Disk(home) as disk:
    job_lib.prepare(home, _STEPS.value)
    begin = time.monotonic()
    job = job_lib.Job(home, "undisturbed", processes=1)
    if job.codes() != [0]:
      sys.exit(f"the undisturbed run failed: {job.text()[-2000:]}")
    print(f"undisturbed: {time.monotonic() - begin:.0f} s", flush=True)
    soak = faults.Soak(home, _STEPS.value, disk, _SEED.value, kinds)
    soak.run(60 * _MINUTES.value)
  result = report(soak)
  print(json.dumps(result, indent=1))
  if _OUTPUT.value:
    study.write_json(_OUTPUT.value, result)
  if soak.broken:
    sys.exit(f"{len(soak.broken)} promises were broken")


def chosen() -> list[str]:
  """Kinds of faults that --faults names, else all; ValueError for others."""
  names = {kind.replace(" ", "_"): kind for kind in faults.FAULTS}
  if unknown := set(_FAULTS.value or ()) - names.keys():
    raise ValueError(f"--faults: {unknown}; there are {', '.join(names)}")
  return [names[name] for name in _FAULTS.value or names]


def report(soak: faults.Soak) -> dict:
  """The result: what happened, what it cost, and on what it was measured."""
  return study.provenance(_SEED.value) | {
    "full_disk_was": soak.disk.kind,
    "faults": dict(soak.faults),
    "faults_in_all": soak.faults.total(),
    "with_a_save_in_flight": soak.saving,
    "starts": soak.starts,
    "steps_lost_beyond_the_last_commit": soak.lost,
    "seconds_from_fault_to_end_at_most": round(soak.slowest, 1),
    "trainings": soak.trainings,
    "steps_of_each": soak.steps,
    "trainings_equal_to_the_undisturbed_one": soak.equal,
    "broken_promises": soak.broken,
  }


if __name__ == "__main__":
  program.start(main)
