"""Processes that train together, their disk, and bits to flip."""

import json
import os
import pathlib
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import time

from mtp_jax import config

DISK = 12 << 20  # bytes of the checkpoints' own disk
FILE = 50_000  # bytes, less than a checkpoint's largest file


def prepare(home: pathlib.Path, steps: int) -> None:
  """Writes a corpus and a config of `steps` steps into `home`."""
  rng = random.Random(0)
  words = ["def", "return", "if", "x", "y", "(", ")", "\n", "    "]
  rows = [" ".join(rng.choices(words, k=99)) for _ in range(200)]
  lines = [json.dumps({"text": row}) for row in rows]
  (home / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
  cfg = config.Config(
    model=config.Model(
      width=48, mlp=96, layers=2, n_future=2, head="unembedding"
    ),
    data=config.Data(
      source="jsonl",
      path=str(home / "corpus.jsonl"),
      cache=str(home / "cache"),
      seq_len=64,
      batch=4,
      held_out=0.1,
    ),
    optim=config.Optim(warmup=10, peak=3e-3),
    train=config.Train(
      steps=steps,
      save_every=4,
      log_every=1,
      eval_every=10,
      eval_batches=2,
      sample_tokens=0,
    ),
  )
  (home / "config.json").write_text(
    config.to_json(cfg.check()), encoding="utf-8"
  )
  (home / "config.py").write_text(
    "from mtp_jax import config\n"
    f"get_config = lambda: config.load({str(home / 'config.json')!r})\n",
    encoding="utf-8",
  )


class Disk:
  """`home`, whose checkpoints lie on a small disk of their own if we are root.

  Without the right to mount one, a limit on the size of files stands for the
  full disk.
  """

  def __init__(self, home: pathlib.Path):
    self._home, self.folder = home, home / "disk"

  def __enter__(self):
    shutil.rmtree(self._home, ignore_errors=True)
    self.folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", self.folder]
    try:
      done = subprocess.run(mount, capture_output=True).returncode
    except OSError:  # no such program
      done = 1
    self.kind = "RLIMIT_FSIZE" if done else f"tmpfs of {DISK >> 20} MiB"
    return self

  def __exit__(self, *_):
    if self.kind != "RLIMIT_FSIZE":
      subprocess.run(["umount", "--lazy", self.folder], check=True)

  def fill(self, job) -> None:
    """Fills the disk, so that the next save of `job` fails."""
    if self.kind == "RLIMIT_FSIZE":
      for process in job.processes:
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (FILE, -1))
      return
    with (self.folder / "filler").open("wb", buffering=0) as file:
      try:
        while file.write(bytes(1 << 14)):
          pass
      except OSError:
        pass

  def free(self) -> None:
    """Removes the file that fills the disk."""
    (self.folder / "filler").unlink(missing_ok=True)


class Job:
  """Two devices that train in home/name, from where they were.

  Args:
    home: made by `prepare`.
    name: of the workdir in it.
    processes: two with a device each, or one with both.
  """

  def __init__(self, home: pathlib.Path, name: str, processes: int = 2):
    self.folder = home / name / "checkpoints"
    if not self.folder.exists():
      (home / name).mkdir()
      (home / "disk" / name).mkdir()
      self.folder.symlink_to(home / "disk" / name)
    with socket.socket() as free:
      free.bind(("", 0))
      port = free.getsockname()[1]
    command = [sys.executable, "-m", "experiments.train"]
    command += [f"--config={home / 'config.py'}", f"--workdir={home / name}"]
    if processes > 1:
      command += [f"--coordinator=localhost:{port}", "--heartbeat_s=15"]
      command += [f"--num_processes={processes}"]
    devices = 2 // processes
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
      "PYTHONUNBUFFERED": "1",
      # LLVM's optimisation takes longer than these trainings.
      "XLA_FLAGS": "--xla_backend_optimization_level=0 "
      f"{os.environ.get('XLA_FLAGS', '')} "
      f"--xla_force_host_platform_device_count={devices}",
    }
    outputs = home / "outputs"
    outputs.mkdir(exist_ok=True)
    number = len(list(outputs.glob("*.0.txt")))
    self._outputs = [
      outputs / f"{number:03d}.{i}.txt" for i in range(processes)
    ]
    self.processes = []
    for i, output in enumerate(self._outputs):
      own = [f"--process_id={i}"] if processes > 1 else []
      with output.open("w", encoding="utf-8") as file:
        self.processes.append(
          subprocess.Popen(
            [*command, *own],
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
          )
        )

  def text(self) -> str:
    """What all of them wrote."""
    return "".join(
      path.read_text(errors="replace", encoding="utf-8")
      for path in self._outputs
    )

  def runs(self) -> bool:
    """Whether all processes are alive."""
    return all(process.poll() is None for process in self.processes)

  def wait_for(self, condition) -> bool:
    """Whether `condition()` came true while all ran."""
    while self.runs():
      if condition():
        return True
      time.sleep(0.02)
    return False

  def stepped(self) -> bool:
    """Whether the log shows a training step of this start."""
    return bool(re.search(r"^step \d+/", self.text(), re.M))

  def committed(self) -> list[int]:
    """Steps whose checkpoints are complete, ascending."""
    names = [path.name for path in self.folder.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())

  def newest(self) -> int:
    """Newest committed step, 0 if there is none."""
    return max(self.committed(), default=0)

  def codes(self, seconds: float | None = None) -> list[int | None]:
    """Exit codes; None where a process had to be killed after `seconds`."""
    end = time.monotonic() + (seconds or 1e9)
    found = []
    for process in self.processes:
      try:
        found.append(process.wait(max(0.1, end - time.monotonic())))
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        found.append(None)
    return found


def flip(path: pathlib.Path, rng: random.Random) -> None:
  """Flips a bit of a file."""
  with path.open("r+b") as file:
    place = rng.randrange(path.stat().st_size)
    file.seek(place)
    byte = file.read(1)[0] ^ 1 << rng.randrange(8)
    file.seek(place)
    file.write(bytes([byte]))
