"""One fault after another, and what is lost by them."""

import collections
import pathlib
import random
import re
import shutil
import time

import jax
import numpy as np

from experiments.engineering.soak import job as job_lib
from experiments.measure import study
from mtp_jax import config, sharding
from mtp_jax.checkpoint import checkpoints
from mtp_jax.train import step as step_lib

FAULTS = (
  "SIGKILL",
  "full disk",
  "damaged data",
  "SIGTERM",
  "damaged checkpoint",
)
PATIENCE = 60  # seconds within which a process has to follow the other


class Soak:
  """Trainings under faults, and what they cost.

  Args:
    home: made by `job.prepare`; holds a training "undisturbed" too.
    steps: length of a training.
    disk: a `job.Disk`.
    seed: of the faults and their moments.
    kinds: of FAULTS; all of them come before any comes again.
  """

  def __init__(self, home, steps, disk, seed, kinds=FAULTS):
    self.home, self.steps, self.disk, self.kinds = home, steps, disk, kinds
    self.rng = random.Random(seed)
    self.name = ""  # of the training
    self.expected = 0  # step from which it has to go on
    self.damaged = 0  # checkpoint that it has to pass over
    self.saying = ""  # what it has to say then
    self.faults = collections.Counter()
    self.broken = []  # promises
    self.starts = self.lost = self.saving = self.trainings = self.equal = 0
    self.slowest = 0.0  # seconds from a fault to the end of both processes

  def run(self, seconds: float) -> None:
    """Faults for `seconds`, then to the end of the training."""
    end, faults = time.monotonic() + seconds, []
    while time.monotonic() < end:
      self.name = f"disturbed_{self.trainings}"
      self.expected, self.damaged, self.saying = 0, 0, ""
      while self.expected < self.steps:
        if len(self.broken) > 9:  # it may not come to an end any more
          return
        faults = faults or self.rng.sample(self.kinds, len(self.kinds))
        if self.go_on(faults[-1] if time.monotonic() < end else None):
          faults.pop()
      self.trainings += 1
      same = state(self.home, self.name) == state(self.home, "undisturbed")
      self.equal += same
      self.expect(same, f"{self.name} ends with other numbers")
      shutil.rmtree(self.disk.folder / self.name)  # the disk is small

  def go_on(self, fault: str | None) -> bool:
    """Starts the run; whether the fault came before the run's end."""
    job = job_lib.Job(self.home, self.name)
    self.starts += 1
    moment = None
    if fault and self.wait(fault, job):
      moment, committed = time.monotonic(), job.newest()
      self.saving += any("tmp" in p.name for p in job.folder.iterdir())
      self.strike(fault, job)
    codes = job.codes(PATIENCE if moment else None)
    self.disk.free()
    self.check_start(job)
    if moment:
      self.faults[fault] += 1
      self.slowest = max(self.slowest, time.monotonic() - moment)
      self.expect(job.newest() >= committed, f"{committed} was there, is gone")
      self.check_end(fault, codes, job)
    else:
      self.expect(codes == [0, 0], f"{codes}: {job.text()[-900:]}")
    self.expected, self.damaged, self.saying = job.newest(), 0, ""
    what = fault if moment else "no fault"
    print(f"{what}: exit codes {codes}, step {self.expected}", flush=True)
    if moment and fault == "damaged data":
      (tokens,) = (self.home / "cache").glob("*/train.tokens")
      job_lib.flip(tokens, self.rng)
      self.saying = "packing anew: .* has a damaged train.tokens"
    if moment and fault == "damaged checkpoint":
      self.damaged = self.expected
      self.expected = job.committed()[-2]
      self.saying = f"checkpoint {self.damaged} is damaged"
      for path in (job.folder / str(self.damaged)).rglob("d/*"):
        if path.stat().st_size > 4096:
          job_lib.flip(path, self.rng)
    return bool(moment)

  def wait(self, fault: str, job: job_lib.Job) -> bool:
    """Until the moment of the fault; False if the run ended before."""
    early = fault == "SIGKILL" and not self.saying and self.rng.random() < 0.25
    least = 2 if fault == "damaged checkpoint" else 0

    def ready():
      if early:  # while it restores or compiles
        return "[Gloo]" in job.text()
      # Past a damaged checkpoint, so that it is not met twice.
      past = job.newest() > self.damaged and len(job.committed()) >= least
      return job.stepped() and past

    if not job.wait_for(ready):
      return False
    time.sleep(self.rng.uniform(0, 3))
    return job.runs()

  def strike(self, fault: str, job: job_lib.Job) -> None:
    """Does `fault` to the running job."""
    victim = self.rng.choice(job.processes)
    if fault == "SIGKILL":
      victim.kill()
    elif fault == "SIGTERM":
      victim.terminate()
    elif fault == "full disk":
      self.disk.fill(job)
    else:
      for process in job.processes:
        process.kill()

  def check_start(self, job: job_lib.Job) -> None:
    """It went on from the newest whole checkpoint, and said what it met."""
    found = re.search(r"resuming from step (\d+)", job.text())
    if not found and not job.stepped():
      return  # it did not come so far
    step = int(found[1]) if found else 0
    self.lost += max(0, self.expected - step)
    self.expect(step == self.expected, f"from {step}, not {self.expected}")
    said = re.search(self.saying, job.text())
    self.expect(bool(said), f"it did not say: {self.saying}")

  def check_end(
    self, fault: str, codes: list[int | None], job: job_lib.Job
  ) -> None:
    """Compares how the job ended with what is promised for `fault`."""
    done = codes == [0, 0]
    if job.newest() == self.steps and None not in codes:
      return  # the fault came after the last save
    if fault == "SIGTERM":
      stop = f"told to stop: step {job.newest()} is saved"
      self.expect(done and stop in job.text(), f"SIGTERM: {codes}")
    elif fault == "full disk":
      said = re.search("error: .*(No space left|too large)", job.text())
      self.expect(bool(said) and not {0, None} & {*codes}, f"disk: {codes}")
    else:
      self.expect(-9 in codes and not {0, None} & {*codes}, f"kill: {codes}")

  def expect(self, holds: bool, promise: str) -> None:
    """Records and prints `promise` as broken unless `holds`."""
    if not holds:
      self.broken.append(f"start {self.starts}: {promise}")
      print("BROKEN:", self.broken[-1], flush=True)


def state(home: pathlib.Path, name: str) -> tuple:
  """Bits of all that a finished run ends with, and the losses it wrote."""
  cfg = config.load(home / "config.json")
  mesh = sharding.make_mesh(config.Mesh(1, 1), jax.devices()[:1])
  with checkpoints.Checkpoints(home / name / "checkpoints") as saved:
    like = step_lib.abstract_state(cfg, mesh)
    found, _, _ = saved.restore(like, step=cfg.train.steps)
  rows = study.read_csv(home / name / "train.csv")
  losses = [(row["step"], row["loss"]) for row in rows]
  return losses, [np.asarray(x).tobytes() for x in jax.tree.leaves(found)]
