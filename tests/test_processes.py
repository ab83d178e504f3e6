"""Several processes are one run: same numbers, same step saved, one end."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import forked
import jax
import numpy as np
import portpicker
import pytest
from conftest import ROOT

from experiments.measure import tidy
from mtp_jax import config
from mtp_jax.checkpoint import checkpoints
from mtp_jax.train import workdir
from tests import runs

STEPS = 23


TRAIN = ["-m", "experiments.train"]


LAUNCH = ROOT / "experiments" / "launch"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a corpus and the config of a small run on it."""
  folder = tmp_path_factory.mktemp("processes")
  cfg = config.Config(
    model=config.Model(
      vocab=260, width=24, mlp=20, layers=1, attn_heads=2, kv_heads=2,
      n_future=2, head="unembedding",
    ),
    data=config.Data(
      source="jsonl", path=str(runs.corpus(folder)),
      cache=str(folder / "cache"),
      seq_len=31, batch=12, held_out=0.1,
    ),
    optim=config.Optim(warmup=5, peak=1e-2),
    train=config.Train(
      steps=STEPS, save_every=4, log_every=1, eval_every=STEPS,
      eval_batches=2, sample_tokens=7,
    ),
  )  # fmt: skip
  (folder / "config.json").write_text(config.to_json(cfg.check()))
  (folder / "config.py").write_text(
    "from mtp_jax import config\n"
    f"get_config = lambda: config.load({str(folder / 'config.json')!r})\n"
  )
  return folder


class Job:
  """Processes of one run, each writing to a file of its own."""

  def __init__(self, home, commands, devices=1, variables=None):
    self.outputs = []
    self.processes = []
    self.begin = time.monotonic()
    for command in map(list, commands):
      path = home / f"output_{len(list(home.glob('output_*')))}"
      own = {
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONUNBUFFERED": "1",
        "PYTHON": sys.executable,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
        f"--xla_force_host_platform_device_count={devices}",
        **(variables or {}),
      }
      with path.open("w") as file:
        if command[0] == sys.executable:
          process = forked.Process(command[1:], output=file, cwd=ROOT, **own)
        else:
          process = subprocess.Popen(
            [str(c) for c in command],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"} | own,
            stdout=file,
            stderr=subprocess.STDOUT,
          )
      self.processes.append(process)
      self.outputs.append(path)

  def text(self, i=0):
    return self.outputs[i].read_text()

  def wait_for(self, pattern, i=0, seconds=120):
    """The match in what process `i` writes, as soon as it is there."""
    end = time.monotonic() + seconds
    while not (found := re.search(pattern, self.text(i))):
      assert time.monotonic() < end, self.text(i)[-3000:]
      assert self.processes[i].poll() is None or re.search(
        pattern, self.text(i)
      ), self.text(i)[-3000:]
      time.sleep(0.02)
    return found

  def ends(self, seconds=120):
    """Exit codes of all."""
    end = time.monotonic() + seconds
    try:
      codes = [p.wait(max(0.1, end - time.monotonic())) for p in self.processes]
    finally:
      self.kill()
    print(f"{len(codes)} ended after {time.monotonic() - self.begin:.1f} s")
    return codes

  def finish(self):
    codes = self.ends()
    assert not any(codes), [self.text(i)[-2000:] for i in range(len(codes))]
    return self

  def kill(self):
    for process in self.processes:
      process.kill()
      process.wait()


def python(number, program, *flags):
  """Commands of processes that find each other by the flags for it."""
  port = portpicker.pick_unused_port()
  return [
    [
      sys.executable,
      *program,
      f"--coordinator=localhost:{port}",
      f"--num_processes={number}",
      f"--process_id={i}",
      *flags,
    ]
    for i in range(number)
  ]


def train(home, target, number=1, devices=1, *flags):
  flags = [f"--config={home / 'config.py'}", f"--workdir={target}", *flags]
  if number == 1:
    commands = [[sys.executable, *TRAIN, *flags]]
  else:
    commands = python(number, TRAIN, *flags)
  return Job(home, commands, devices)


def final(target):
  """Every array of the last checkpoint, as its checksum."""
  with checkpoints.Checkpoints(target / "checkpoints") as saved:
    assert saved.steps()[-1] == STEPS
    return saved._reader.record(STEPS)["arrays"]


def rows(target, group):
  with (target / f"{group}.csv").open() as file:
    return list(csv.DictReader(file))


def losses(target):
  return {int(r["step"]): r["loss"] for r in rows(target, "train")}


def newest(target):
  names = [p.name for p in (target / "checkpoints").iterdir()]
  return max(int(name) for name in names if name.isdecimal())


QUIET = "--config.train.sample_tokens=0"


@pytest.fixture(scope="module")
def alone(home):
  """The run of one process with two devices."""
  train(home, home / "alone", devices=2).finish()
  return home / "alone"


@pytest.fixture(scope="module")
def stopped(home):
  """The run of two processes, stopped by SIGTERM on the way; its step."""
  target = home / "stopped"
  return target, stop(train(home, target, 2, 1, QUIET), 1, target)


TWICE = """
import pathlib, shutil, sys
from mtp_jax import config
from mtp_jax.train import loop, processes
arguments = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
number, process = (int(arguments[k]) for k in ("num_processes", "process_id"))
processes.join(arguments["coordinator"], number, process)
cfg = config.load(arguments["config"])
cfg = cfg.replace(train={"sample_tokens": 0})
read = loop.pipeline.batch_at
if process == 1:
  def fail(*_, **__):
    raise OSError(5, "Input/output error")
  loop.pipeline.batch_at = fail
loop.fit(cfg, arguments["workdir"])
loop.pipeline.batch_at = read
processes.gather("finished")
if process == 0:
  for path in pathlib.Path(arguments["workdir"], "checkpoints").iterdir():
    if path.name.isdecimal() and int(path.name) > 16:
      shutil.rmtree(path)
processes.gather("removed")
loop.fit(cfg, arguments["workdir"])
"""


@pytest.mark.slow
def test_two_processes_train_save_and_restore(home, alone, stopped, tmp_path):
  """As a notebook does, which calls `fit` again. In the first run process 1
  cannot read the held-out data, which ends no run.
  """
  shutil.copytree(stopped[0], tmp_path / "w")
  flags = [f"--config={home / 'config.json'}", f"--workdir={tmp_path / 'w'}"]
  out = Job(home, python(2, ["-c", TWICE], *flags)).finish().text()
  failed = "evaluation at step 23 failed: OSError: [Errno 5] Input/output error"
  assert out.count(failed) == 1
  assert "resuming from step 16\n" in out
  assert rows(tmp_path / "w", "held_out") == rows(alone, "held_out")
  assert final(tmp_path / "w") == final(alone)
  assert losses(tmp_path / "w") == losses(alone)


BETWEEN = """
import os, signal, sys, time
from mtp_jax import config
from mtp_jax.train import loop, processes
arguments = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
number, process = (int(arguments[k]) for k in ("num_processes", "process_id"))
processes.join(arguments["coordinator"], number, process)
cfg = config.load(arguments["config"]).replace(train={"sample_tokens": 0})
loop.fit(cfg, arguments["workdir"] + "/1")
if process == 0:
  os.kill(os.getpid(), signal.SIGTERM)
time.sleep(3)  # JAX tells the other process
state = loop.fit(cfg, arguments["workdir"] + "/2")
print("second run at step", int(state.step))
"""


@pytest.mark.slow
def test_a_signal_between_two_runs_stops_the_second(home, tmp_path):
  """At its first steps, though the first run has made more."""
  flags = [f"--config={home / 'config.json'}", f"--workdir={tmp_path}"]
  job = Job(home, python(2, ["-c", BETWEEN], *flags)).finish()
  for i in range(2):
    (step,) = re.findall(r"second run at step (\d+)", job.text(i))
    assert int(step) < STEPS // 2


SWEEP = """
import types
from experiments.claims import byte_sweeps
from mtp_jax import config
family = types.ModuleType("family")
family.get_config = lambda name: config.load(name)
names = {"n=2": "CONFIG"}
byte_sweeps.start(
  lambda scale: byte_sweeps.paper_runs("demo", family, names, (1, 2)),
  byte_sweeps.section,
)
"""


@pytest.mark.slow
def test_two_processes_measure_a_sweep(home, alone, tmp_path):
  """Process 0 writes the figures, which are those of the run's logs."""
  program = ["-c", SWEEP.replace("CONFIG", str(home / "config.json"))]
  flags = ["--scale=paper", f"--output={tmp_path}"]
  job = Job(home, python(2, program, *flags)).finish()
  assert "1 runs done, 0 done before" in job.text(0)
  assert "runs done" not in job.text(1)
  (last,) = rows(alone, "held_out")[-1:]
  found = {row.metric: row.value for row in tidy.read(tmp_path)}
  for metric in ("bits_per_byte_1", "tokens_per_forward_greedy"):
    assert found[metric] == pytest.approx(float(last[metric]), rel=1e-5)
  assert found["tokens per forward k=2"] == pytest.approx(
    found["tokens_per_forward_greedy"], rel=1e-6
  )
  again = Job(home, python(2, program, *flags)).finish()
  assert "0 runs done, 1 done before" in again.text(0)
  commands = python(2, program, "--scale=paper", f"--output={tmp_path / 'new'}")
  commands[1][2] = commands[1][2].replace("n=2", "n=3")
  other = Job(home, commands)
  assert all(other.ends())
  assert "process 1 was asked for other runs than process 0" in other.text(0)


SRUN = """#!/bin/sh
test "$1" = --kill-on-bad-exit=1 || exit 9
shift
export SLURM_JOB_ID=7 SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!
"""


@pytest.mark.slow
def test_two_processes_end_with_the_bits_of_one(home, alone, stopped, tmp_path):
  """Stopped by SIGTERM on the way; what one of them wrote then is damaged;
  continued as SLURM starts them, and traced.
  """
  target = shutil.copytree(stopped[0], tmp_path / "two")
  step = stopped[1]
  for file in (target / f"checkpoints/{step}").rglob("ocdbt.process_1/d/*"):
    file.write_bytes(bytes(file.stat().st_size))

  (tmp_path / "srun").write_text(SRUN)
  (tmp_path / "srun").chmod(0o755)
  variables = {
    "PATH": f"{tmp_path}:{os.environ['PATH']}",
    "JAX_COORDINATOR_PORT": str(portpicker.pick_unused_port()),
  }
  flags = [f"--config={home / 'config.py'}", f"--workdir={target}"]
  flags += [f"--profile={STEPS - 2}:2"]
  job = Job(home, [["sh", LAUNCH / "slurm.sh", *flags]], 1, variables)
  out = job.finish().text()
  assert f"checkpoint {step} is damaged" in out
  found = int(re.search(r"resuming from step (\d+)\n", out)[1])
  assert step - 4 <= found < step
  assert losses(target) == losses(alone)
  assert final(target) == final(alone)
  assert rows(target, "held_out") == rows(alone, "held_out")
  texts = [
    {p.name: p.read_bytes() for p in (run / "samples").iterdir()}
    for run in (target, alone)
  ]
  assert texts[0] == texts[1] and texts[0]
  assert len(list((target / "profile").rglob("*.xplane.pb"))) == 1


def stop(job, victim, target):
  """SIGTERM to one process of a job: the step that all saved."""
  job.wait_for(r"step 6/")
  job.processes[victim].send_signal(signal.SIGTERM)
  begin = time.monotonic()
  codes = job.ends()
  assert not any(codes), job.text()
  print(f"all saved and ended in {time.monotonic() - begin:.1f} s")
  assert time.monotonic() - begin < 10
  step = int(re.search(r"told to stop: step (\d+) is saved", job.text())[1])
  assert newest(target) == step < STEPS
  return step


def kill(job, victim):
  """SIGKILL to one process of a job: the others stop, and say why."""
  job.processes[victim].kill()
  begin = time.monotonic()
  codes = job.ends(30)
  print(f"the others stopped after {time.monotonic() - begin:.1f} s: {codes}")
  for i in {*range(len(codes))} - {victim}:
    # JAX may be faster, when the first process is gone: it aborts, and says so.
    assert codes[i] in (1, -signal.SIGABRT)
    said = f"error: process {i} of 3 stops: another process is gone"
    assert said in job.text(i) or "another task died" in job.text(i)
    assert "Traceback" not in job.text(i)


@pytest.mark.slow
def test_four_processes_stop_three_are_killed_and_one_ends(
  home, alone, tmp_path
):
  """The four as two by two: those that share the 'model' axis read the same
  rows. Of the three that go on, one is killed. What four and three computed
  and wrote is what the one goes on from.
  """
  target = tmp_path / "four"
  script = ["sh", LAUNCH / "multi_gpu.sh", 4]
  flags = [f"--config={home / 'config.py'}", f"--workdir={target}", QUIET]
  flags += ["--config.mesh.model=2"]
  step = stop(Job(home, [[*script, *flags]]), 0, target)  # the script itself

  job = train(home, target, 3, 1, QUIET)
  job.wait_for(rf"resuming from step {step}\n")
  while newest(target) == step:
    time.sleep(0.02)
  committed = newest(target)
  kill(job, 0)
  out = train(home, target, 1, 1, QUIET).finish().text()
  found = int(re.search(r"resuming from step (\d+)\n", out)[1])
  assert found >= committed > step
  same_up_to_rounding(target, alone)


def same_up_to_rounding(target, other):
  """Of float32 sums over another number of devices, and nothing else: found
  were 2.3e-7 in the losses and 1.1e-7 in the parameters."""
  a, b = losses(target), losses(other)
  assert list(a) == list(b) == list(range(1, STEPS + 1))
  a, b = (np.array(list(x.values()), float) for x in (a, b))
  print("losses differ by", abs(a / b - 1).max())
  np.testing.assert_allclose(a, b, rtol=1e-6)
  nets = [jax.tree.leaves(workdir.load(t)[0]) for t in (target, other)]
  far = [
    float(np.linalg.norm(x - y) / np.linalg.norm(y))
    for x, y in zip(*nets, strict=True)
  ]
  print("parameters differ by", max(far))
  assert max(far) < 1e-6


TALK = """
import sys, time
import jax
from mtp_jax.train import processes
arguments = dict(a.lstrip("-").split("=") for a in sys.argv[1:])
number, process = (int(arguments[k]) for k in ("num_processes", "process_id"))
processes.join(arguments["coordinator"], number, process, heartbeat=5)
assert not jax.config.jax_enable_compilation_cache  # see `join`
texts = processes.gather("from " + "x" * process)
assert texts == ["from " + "x" * i for i in range(number)], texts
print("together", flush=True)
time.sleep(100)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_process_stops_the_others(home, victim):
  """One that no collective waits for: the heartbeat tells. SIGTERM then ends
  the silent one at once: it has not made a step, so nothing is to be saved.
  """
  job = Job(home, python(2, ["-c", TALK]))
  for i in (0, 1):
    job.wait_for("together", i)
  job.processes[victim].send_signal(signal.SIGSTOP)
  begin = time.monotonic()
  other = job.processes[1 - victim]
  assert other.wait(30) == -signal.SIGABRT
  print(f"noticed after {time.monotonic() - begin:.1f} s")
  assert "another task died" in job.text(1 - victim)
  job.processes[victim].send_signal(signal.SIGTERM)  # met once it goes on
  job.processes[victim].send_signal(signal.SIGCONT)
  assert job.processes[victim].wait(30) == -signal.SIGTERM
  job.kill()


@pytest.mark.parametrize(
  "more, line",
  [  # settings are compared before the corpus is packed
    (["--config.train.save_every=3"], "train.save_every: 4 in the first, 3 in"),
    ([], "the same run: their corpora differ. Start all with"),
  ],
)
def test_processes_have_to_agree(home, tmp_path, more, line):
  (tmp_path / "c.jsonl").write_text(
    "\n".join(json.dumps({"text": f"another {i}"}) for i in range(99))
  )
  commands = python(
    2, TRAIN, f"--config={home / 'config.py'}", f"--workdir={tmp_path / 'w'}"
  )
  commands[1] += [
    f"--config.data.path={tmp_path / 'c.jsonl'}",
    f"--config.data.cache={tmp_path / 'cache'}",
    *more,
  ]
  job = Job(home, commands)
  assert job.ends() == [1, 1]
  for i in (0, 1):
    for text in (
      "error: process 0 (the first) and process 1 (the second) do not do the "
      "same run: ",
      line,
    ):
      assert text in job.text(i)
    assert ("corpora differ" in job.text(i)) == (not more)
    assert "Traceback" not in job.text(i)
    assert "data.path" not in job.text(i)
  assert os.listdir(tmp_path / "w") == ["lock"]  # empty, for the next start
  assert not (tmp_path / "w/lock").read_text()


def test_without_a_cluster_all_has_to_be_named(home, tmp_path):
  flags = [f"--config={home / 'config.py'}", f"--workdir={tmp_path / 'w'}"]
  job = Job(home, [[sys.executable, *TRAIN, *flags, "--distributed"]])
  assert job.ends() == [1]
  assert "error: cannot join the other processes: coord" in job.text()
  assert "give the coordinator" in job.text()


@pytest.mark.parametrize("program", [None, "experiments.claims.best_n"])
def test_a_tpu_host_gets_the_flags_as_they_were_given(tmp_path, program):
  """With a stand-in for gcloud that runs the command as a host would."""
  (tmp_path / "mtp_jax").mkdir()
  gcloud = tmp_path / "gcloud"
  gcloud.write_text('#!/bin/sh\nfor last; do :; done\nsh -c "${last#*=}"\n')
  gcloud.chmod(0o755)
  given = ["--config=a b.py:'x'", '--workdir=/mnt/$HOME/"y"', "--z=(1, 2)"]
  done = subprocess.run(
    ["sh", LAUNCH / "tpu_pod.sh", *given],
    cwd=tmp_path,
    env=os.environ
    | {
      "PATH": f"{tmp_path}:{os.environ['PATH']}",
      "TPU": "slice",
      "ZONE": "zone",
      "PYTHON": "printf '%s\\n'",
    }
    | ({"PROGRAM": program} if program else {}),
    capture_output=True,
    text=True,
    check=True,
  )
  words = done.stdout.splitlines()
  program = program or "experiments.train"
  assert words == ["-m", program, "--distributed", *given]


def test_launch_scripts_are_shell():
  for script in LAUNCH.glob("*.sh"):
    subprocess.run(["sh", "-n", script], check=True)
    assert script.stat().st_mode & 0o111
