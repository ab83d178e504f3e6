"""Killed, stopped or damaged, a run ends with the undisturbed one's bits."""

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import forked
import numpy as np
import pytest

from mtp_jax import config, tokenizer
from mtp_jax.checkpoint import checkpoints, integrity, reader
from mtp_jax.train import lock, loop, workdir
from tests import runs

STEPS, SAVE_EVERY = runs.STEPS, runs.SAVE_EVERY


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  return runs.make(tmp_path_factory.mktemp("run"))


# Reads that orbax abandons when a file is damaged complain when collected.
pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
  ),
]


PROGRAM = """
import sys
from mtp_jax import config
from mtp_jax.train import loop
loop.fit(config.load(sys.argv[1]), sys.argv[2])
"""


@pytest.fixture
def cfg(home):
  return config.load(home / "config.json")


def start(home, target):
  program = ["-c", PROGRAM, home / "config.json", target]
  return forked.Process(program, **variables(home))


def variables(home):
  """Environment in which runs share their compiled programs."""
  return {
    "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONUNBUFFERED": "1",
  }


def finish(home, target):
  process = start(home, target)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err[-3000:]
  return out


def read_steps(process, number):
  """Waits until it has said so many steps, or ended."""
  while number and (line := process.stdout.readline()):
    number -= line.startswith("step ")


def final(target):
  """Every array of the last checkpoint, as its checksum."""
  with checkpoints.Checkpoints(target / "checkpoints") as saved:
    assert saved.steps()[-1] == STEPS
    return saved._reader.record(STEPS)["arrays"]


def losses(target):
  with (target / "train.csv").open() as file:
    return {int(r["step"]): r["loss"] for r in csv.DictReader(file)}


@pytest.fixture(scope="module")
def unbroken(home):
  finish(home, home / "unbroken")
  return home / "unbroken"


def test_writes_what_it_found(unbroken, cfg):
  assert config.load(unbroken / "config.json") == cfg
  found = losses(unbroken)
  assert list(found) == list(range(1, STEPS + 1))
  assert float(found[STEPS]) < 0.7 * float(found[1])
  with (unbroken / "held_out.csv").open() as file:
    rows = list(csv.DictReader(file))
  assert [r["step"] for r in rows] == ["25", "50"]
  for i in (1, 2, 3):
    nats, bits = (float(rows[1][f"{n}_{i}"]) for n in ("nats", "bits_per_byte"))
    # A document of n bytes has n + 1 targets: its end is one.
    assert 0.9 < bits * np.log(2) / nats < 1.1
    assert nats < np.log(259)
  assert 1 <= float(rows[1]["tokens_per_forward_greedy"]) <= 3
  names = [p.name for p in (unbroken / "samples").iterdir()]
  assert sorted(names) == ["000025.txt", "000050.txt"]
  assert "[...]" in (unbroken / "samples/000050.txt").read_text("utf-8")
  assert list((unbroken / "tensorboard").iterdir())


def test_the_trained_model_comes_back(unbroken, cfg, monkeypatch):
  names, arrays = [], reader.Reader.arrays
  monkeypatch.setattr(
    reader.Reader,
    "arrays",
    lambda self, *args: names.extend(args[2]) or arrays(self, *args),
  )
  net, got, codec = workdir.load(unbroken)
  assert got == cfg
  assert isinstance(codec, tokenizer.Bytes)
  # Without the optimiser's moments, twice its size.
  assert names and all(name.startswith("model/") for name in names)
  net_at_2, _, _ = workdir.load(unbroken, step=STEPS - SAVE_EVERY)
  a, b = (np.asarray(n.embed[...]) for n in (net, net_at_2))
  assert a.shape == b.shape and (a != b).any()
  with pytest.raises(checkpoints.CheckpointError, match="no checkpoint 5 in"):
    workdir.load(unbroken, step=5)
  with pytest.raises(checkpoints.CheckpointError, match="there is no run in"):
    workdir.load(unbroken.parent)


def test_killed_25_times_it_ends_with_the_same_bits(home, unbroken):
  """Where a run is done before the last kill, another begins."""
  targets, rng = [home / "killed0"], random.Random(0)
  saving = kills = 0
  while kills < 25:
    target = targets[-1]
    process = start(home, target)
    if rng.random() < 0.15:  # before the first step
      time.sleep(rng.uniform(0.5, 3))
    else:
      read_steps(process, rng.randrange(1, 5))
      if kills % 2:  # in a save, however busy the machine is
        end = time.monotonic() + 2
        while not any(target.glob("checkpoints/*tmp*")):
          if time.monotonic() > end:
            break
      else:
        time.sleep(rng.uniform(0, 0.08))
    process.kill()
    process.communicate()
    if process.returncode == 0:  # it was done already
      targets.append(home / f"killed{len(targets)}")
      continue
    kills += 1
    names = [p.name for p in (target / "checkpoints").glob("*")]
    saving += any("tmp" in name for name in names)
  finish(home, targets[-1])
  print(f"{kills} kills, {saving} with a save in flight, {len(targets)} runs")
  assert saving >= 6
  for target in targets:
    assert final(target) == final(unbroken)
    assert losses(target) == losses(unbroken)


def test_the_same_config_gives_the_same_losses(home, unbroken):
  finish(home, home / "again")
  assert losses(home / "again") == losses(unbroken)
  assert final(home / "again") == final(unbroken)


def test_64_bits_and_a_poor_locale_change_nothing(home, unbroken, tmp_path):
  """From a checkpoint of 32 bits to the end, evaluation and sample too."""
  target = tmp_path / "w"
  shutil.copytree(unbroken, target)
  for step in (STEPS, STEPS - SAVE_EVERY):
    shutil.rmtree(target / f"checkpoints/{step}")
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, home / "config.json", target],
    env=os.environ
    | variables(home)
    | {"JAX_ENABLE_X64": "1", "PYTHONUTF8": "0", "LC_ALL": "C"},
    capture_output=True,
    text=True,
  )
  out, err = done.stdout, done.stderr
  assert done.returncode == 0, err[-3000:]
  assert final(target).keys() == final(unbroken).keys()
  assert "finished at step 50; " in out and "failed" not in err
  for a, b in zip(
    losses(target).items(), losses(unbroken).items(), strict=True
  ):
    assert a[0] == b[0] and float(a[1]) == pytest.approx(float(b[1]), rel=1e-3)


def test_sigterm_saves_and_exits_with_0(home, unbroken):
  process = start(home, home / "stopped")
  read_steps(process, 7)
  process.send_signal(signal.SIGTERM)
  begin = time.monotonic()
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err[-3000:]
  assert time.monotonic() - begin < 10
  step = int(re.search(r"told to stop: step (\d+) is saved", out)[1])
  with checkpoints.Checkpoints(home / "stopped" / "checkpoints") as saved:
    assert saved.steps()[-1] == step < STEPS
  out = finish(home, home / "stopped")
  assert f"resuming from step {step}" in out
  assert final(home / "stopped") == final(unbroken)
  assert losses(home / "stopped") == losses(unbroken)


def test_a_damaged_newest_checkpoint_is_passed_over(home, unbroken, tmp_path):
  target = tmp_path / "w"
  subprocess.run(["cp", "-r", unbroken, target], check=True)
  for file in (target / "checkpoints" / str(STEPS)).rglob("*"):
    if file.is_file() and file.stat().st_size:
      os.truncate(file, file.stat().st_size // 2)
  process = start(home, target)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err[-3000:]
  assert f"checkpoint {STEPS} is damaged" in err
  assert f"resuming from step {STEPS - SAVE_EVERY}" in out
  assert final(target) == final(unbroken)


def test_another_config_is_refused_by_its_fields(unbroken, cfg):
  cfg = cfg.replace(
    model={"width": 24}, optim={"clip": 2.0}, train={"log_every": 7}
  )
  with pytest.raises(checkpoints.CheckpointError) as error:
    loop.fit(cfg, unbroken)
  assert "model.width: 20 in the first, 24 in the second" in str(error.value)
  assert "optim.clip: 1.0 in the first, 2.0 in the second" in str(error.value)
  assert "log_every" not in str(error.value)
  assert config.load(unbroken / "config.json").model.width == 20


def test_a_second_run_in_the_workdir_is_refused(unbroken, cfg, monkeypatch):
  monkeypatch.setattr(lock, "_RELEASE", 0)
  monkeypatch.setattr(loop.pipeline, "pack", None)  # not even read
  line = f"in use by another run .*process id {os.getpid()}, since "
  with lock.exclusive(unbroken):
    with pytest.raises(checkpoints.CheckpointError, match=line):
      loop.fit(cfg, unbroken)


def test_a_field_that_an_older_checkpoint_lacks_has_its_default(
  unbroken, cfg, tmp_path, capsys
):
  target = shutil.copytree(unbroken, tmp_path / "w")
  file = target / f"checkpoints/{STEPS}/metadata/metadata"
  stored = json.loads(file.read_text("utf-8"))
  for name in ("clip", "end"):
    del stored["metadata"]["config"]["optim"][name]
  del stored["format"]  # as at first
  settings = json.loads((target / "config.json").read_text("utf-8"))
  del settings["format"]
  (target / "config.json").write_text(json.dumps(settings), "utf-8")
  file.write_text(json.dumps(integrity.seal(stored)), "utf-8")
  assert loop.fit(cfg, target).step == STEPS
  assert "until here" not in capsys.readouterr().out
  assert workdir.settings(target)[0].optim.clip == 1.0
  cfg = cfg.replace(optim={"clip": 2.0})
  line = "optim.clip: 1.0 in the first, 2.0 in the second"
  with pytest.raises(checkpoints.CheckpointError, match=line):
    loop.fit(cfg, target)


def test_another_corpus_is_refused(unbroken, cfg, tmp_path):
  rows = [json.dumps({"text": f"another {i}"}) for i in range(99)]
  (tmp_path / "c.jsonl").write_text("\n".join(rows))
  cfg = cfg.replace(data={"path": str(tmp_path / "c.jsonl")})
  with pytest.raises(checkpoints.CheckpointError, match="the corpus differs"):
    loop.fit(cfg, unbroken)
  cfg = cfg.replace(data={"path": str(tmp_path / "typo.jsonl")})
  with pytest.raises(ValueError, match="typo.jsonl"):
    loop.fit(cfg, tmp_path / "w")
  (left,) = (tmp_path / "w").iterdir()
  assert left.name == "lock" and not left.read_text()


def test_a_finished_run_says_how_to_go_on(unbroken, cfg, tmp_path, capsys):
  """And measures what it was killed before."""
  shutil.copytree(unbroken, tmp_path / "w")
  file = tmp_path / "w/held_out.csv"
  whole = file.read_text("utf-8")
  file.write_text("".join(whole.splitlines(keepends=True)[:-1]), "utf-8")
  cfg = cfg.replace(train={"sample_tokens": 0})
  loop.fit(cfg, tmp_path / "w")
  assert file.read_text("utf-8") == whole
  out = capsys.readouterr().out
  assert "held out at step 50: " in out
  assert "finished already, with train.steps 50. To go on, set --config." in out
  loop.fit(cfg, tmp_path / "w")
  assert "held out at" not in capsys.readouterr().out
