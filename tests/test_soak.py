"""The soak, made small: one fault, and nothing is lost."""

import json

import forked
import pytest

from experiments.engineering.soak import faults, job

SOAK = """
import os, runpy, subprocess, types
import forked
from experiments.engineering.soak import job

def start(command, env, stdout, **_):
  own = {k: v for k, v in env.items() if os.environ.get(k) != v}
  return forked.Process(command[1:], output=stdout, **own)

# Trainings start without their imports.
job.subprocess = types.SimpleNamespace(**vars(subprocess) | {"Popen": start})
runpy.run_module("experiments.engineering.soak", run_name="__main__")
"""


@pytest.mark.slow
def test_a_full_disk_loses_nothing(tmp_path):
  output = tmp_path / "soak.json"
  flags = "--minutes=0.1 --steps=20 --faults=full_disk".split()
  flags += [f"--workdir={tmp_path / 'w'}", f"--output={output}"]
  process = forked.Process(["-c", SOAK, *flags])
  out, err = process.communicate()
  assert process.returncode == 0, out + err
  found = json.loads(output.read_text())
  assert found["faults"] == {"full disk": 1}
  assert found["starts"] == 2
  assert found["steps_lost_beyond_the_last_commit"] == 0
  assert found["trainings"] == 1
  assert found["trainings_equal_to_the_undisturbed_one"] == 1


class Ended:
  """A job that is over."""

  def __init__(self, text, committed):
    self.text = lambda: text
    self.committed = lambda: committed

  newest = job.Job.newest
  stepped = job.Job.stepped


def test_what_is_lost_is_counted(tmp_path):
  """The soak can fail: it sees steps that were lost and words not said."""
  run = faults.Soak(tmp_path, 20, None, 0)
  run.expected, run.saying = 12, "packing anew"
  run.check_start(Ended("resuming from step 12\npacking anew", [8, 12]))
  assert run.lost == 0 and not run.broken
  run.check_start(Ended("resuming from step 8\nstep 9/40", [8, 12]))
  assert run.lost == 4 and len(run.broken) == 2
  run.check_start(Ended("step 1/40", [8, 12]))
  assert run.lost == 4 + 12
  run.broken.clear()
  good = Ended("told to stop: step 12 is saved", [8, 12])
  run.check_end("SIGTERM", [0, 0], good)
  run.check_end("SIGKILL", [-9, 1], good)
  assert not run.broken
  for fault, codes in {
    "SIGTERM": [0, 1],
    "SIGKILL": [-9, None],
    "full disk": [1, 1],
    "damaged data": [0, 0],
  }.items():
    run.check_end(fault, codes, Ended("", [12]))
  assert len(run.broken) == 4
