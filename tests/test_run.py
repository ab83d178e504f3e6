"""Runs: whatever interrupts them, they end with the same bits."""

import csv
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mtp_jax import checkpoint, config, metrics, run, tokenizer, workdir

# Reads that orbax abandons when a file is damaged complain when collected.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)
STEPS, SAVE_EVERY = 50, 2

PROGRAM = """
import sys
from mtp_jax import config, run
run.fit(config.load(sys.argv[1]), sys.argv[2])
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a corpus and the config of a small run on it."""
  folder = tmp_path_factory.mktemp("run")
  rng = random.Random(0)
  words = ["def", "return", "if", "x", "y", "(", ")", "\n", "    "]
  rows = [" ".join(rng.choices(words, k=99)) for _ in range(60)]
  corpus = folder / "corpus.jsonl"
  corpus.write_text("\n".join(json.dumps({"text": row}) for row in rows))
  cfg = config.Config(
    model=config.Model(
      width=20, mlp=28, layers=2, attn_heads=2, kv_heads=1, n_future=3,
      head="unembedding",
    ),
    data=config.Data(
      source="jsonl", path=str(corpus), cache=str(folder / "cache"),
      seq_len=31, batch=3, held_out=0.1,
    ),
    optim=config.Optim(warmup=5, peak=1e-2),
    train=config.Train(
      steps=STEPS, save_every=SAVE_EVERY, log_every=1, eval_every=25,
      eval_batches=2, sample_tokens=11, max_bad_steps=4,
    ),
  )  # fmt: skip
  (folder / "config.json").write_text(config.to_json(cfg.check()))
  return folder


@pytest.fixture
def cfg(home):
  return config.load(home / "config.json")


def start(home, target):
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "PYTHONUNBUFFERED": "1",
  }
  command = [sys.executable, "-c", PROGRAM, home / "config.json", target]
  return subprocess.Popen(
    command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )


def finish(home, target):
  process = start(home, target)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err[-3000:]
  return out


def final(target):
  """Every array of the last checkpoint, as its checksum."""
  with checkpoint.Checkpoints(target / "checkpoints") as saved:
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
  assert "step 50" in (unbroken / "sample.txt").read_text()
  assert list((unbroken / "tensorboard").iterdir())


def test_the_trained_model_comes_back(unbroken, cfg):
  net, got, codec = workdir.load(unbroken)
  assert got == cfg
  assert isinstance(codec, tokenizer.Bytes)
  net_at_2, _, _ = workdir.load(unbroken, step=STEPS - SAVE_EVERY)
  a, b = (np.asarray(n.embed[...]) for n in (net, net_at_2))
  assert a.shape == b.shape and (a != b).any()
  with pytest.raises(checkpoint.CheckpointError, match="no checkpoint 5 in"):
    workdir.load(unbroken, step=5)
  with pytest.raises(checkpoint.CheckpointError, match="there is no run in"):
    workdir.load(unbroken.parent)


def test_killed_25_times_it_ends_with_the_same_bits(home, unbroken):
  target, rng = home / "killed", random.Random(0)
  saving = starting = kills = 0
  while kills < 25:
    process = start(home, target)
    if rng.random() < 0.15:  # before the first step
      time.sleep(rng.uniform(0.5, 3))
    else:
      for _ in range(rng.randrange(1, 5)):
        process.stdout.readline()
      time.sleep(rng.uniform(0, 0.08))
    process.kill()
    process.communicate()
    if process.returncode == 0:  # it was done already
      break
    kills += 1
    names = [p.name for p in (target / "checkpoints").glob("*")]
    saving += any("tmp" in name for name in names)
    starting += not names
  finish(home, target)
  print(f"{kills} kills, {saving} with a save in flight")
  assert kills == 25 and saving >= 6
  assert final(target) == final(unbroken)
  assert losses(target) == losses(unbroken)


def test_the_same_config_gives_the_same_losses(home, unbroken):
  finish(home, home / "again")
  assert losses(home / "again") == losses(unbroken)
  assert final(home / "again") == final(unbroken)


def test_sigterm_saves_and_exits_with_0(home, unbroken):
  process = start(home, home / "stopped")
  for _ in range(7):
    process.stdout.readline()
  process.send_signal(signal.SIGTERM)
  begin = time.monotonic()
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err[-3000:]
  assert time.monotonic() - begin < 10
  step = int(re.search(r"told to stop: step (\d+) is saved", out)[1])
  with checkpoint.Checkpoints(home / "stopped" / "checkpoints") as saved:
    assert saved.steps()[-1] == step < STEPS
  out = finish(home, home / "stopped")
  assert f"going on from step {step}" in out
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
  assert f"going on from step {STEPS - SAVE_EVERY}" in out
  assert final(target) == final(unbroken)


def test_another_config_is_refused_by_its_fields(unbroken, cfg):
  cfg.model.width, cfg.train.steps, cfg.train.log_every = 24, 60, 7
  with pytest.raises(checkpoint.CheckpointError) as error:
    run.fit(cfg, unbroken)
  assert "model.width: 20 in the first, 24 in the second" in str(error.value)
  assert "train.steps: 50 in the first, 60 in the second" in str(error.value)
  assert "log_every" not in str(error.value)
  assert config.load(unbroken / "config.json").model.width == 20


def test_a_second_run_in_the_workdir_is_refused(unbroken, cfg, monkeypatch):
  monkeypatch.setattr(workdir, "_RELEASE", 0)
  line = f"in use by another run .*process id {os.getpid()}, since "
  with workdir.lock(unbroken):
    with pytest.raises(checkpoint.CheckpointError, match=line):
      run.fit(cfg, unbroken)


def test_another_corpus_is_refused(unbroken, cfg, tmp_path):
  rows = [json.dumps({"text": f"another {i}"}) for i in range(99)]
  (tmp_path / "c.jsonl").write_text("\n".join(rows))
  cfg.data.path = str(tmp_path / "c.jsonl")
  with pytest.raises(checkpoint.CheckpointError, match="data.train: '"):
    run.fit(cfg, unbroken)


def test_divergence_stops_and_keeps_what_was_good(cfg, tmp_path, monkeypatch):
  cfg.train.head_weights = (1.0, float("inf"), 1.0)
  monkeypatch.setattr(config.Train, "check", lambda self: None)
  with pytest.raises(run.Diverged) as error:
    run.fit(cfg, tmp_path)
  for text in ("not finite 4 steps in a row", "Lower optim.peak", "inf"):
    assert text in str(error.value)
  with checkpoint.Checkpoints(tmp_path / "checkpoints") as saved:
    assert saved.steps() == [2]
    state, _, _ = saved.restore(
      jax.tree.map(np.asarray, run.train_lib.init_state(cfg, one_device()))
    )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.model))
  assert int(state.skipped) == 2


def one_device():
  return run.sharding.make_mesh(config.Mesh(1, 1), jax.devices()[:1])


def test_evaluates_in_microbatches(cfg, tmp_path, monkeypatch):
  """The rows are those of whole batches, as many at once as a step holds."""
  seen = []

  def measure(net, batches, **_):
    seen.append([np.asarray(b["tokens"]) for b in batches])
    ones = np.ones(cfg.model.n_future)
    return {"nats": ones, "accuracy": ones, "greedy": 1.0, "sampled": 1.0}

  monkeypatch.setattr(run.held_out, "measure", measure)
  cfg.train.steps = cfg.train.eval_every = 6
  cfg.train.sample_tokens = 0
  for parts in (1, 3):
    cfg.train.accumulate = parts
    run.fit(cfg, tmp_path / str(parts))
  whole, small = seen
  assert [len(rows) for rows in small] == [1] * 6
  assert np.array_equal(np.concatenate(whole), np.concatenate(small))


def test_settings_that_do_not_fit_are_errors(cfg, tmp_path):
  small = dataclasses.replace(cfg)
  small.model = dataclasses.replace(cfg.model, vocab=256)
  with pytest.raises(ValueError, match="model.vocab 256 .* 259 ids .*'bytes'"):
    run.fit(small, tmp_path)
  with pytest.raises(ValueError, match="has a backslash"):
    run.fit(cfg, tmp_path / "a\\b")
  cfg.mesh.data = 7
  with pytest.raises(ValueError, match="mesh.data=7 x mesh.model=1"):
    run.fit(cfg, tmp_path)


def test_a_tokenizer_model_stays_with_the_run(cfg, tmp_path):
  model = tokenizer.train_sentencepiece(
    ["def f(x):\n  return x\n" * 9], tmp_path / "m.model", 280
  )
  cfg.data.tokenizer = str(tmp_path / "m.model")
  cfg.model.vocab = model.vocab
  cfg.train.steps, cfg.train.eval_every = 6, 6
  run.fit(cfg, tmp_path / "w")
  (tmp_path / "m.model").unlink()
  run.fit(cfg, tmp_path / "w")  # nothing is left to do
  (tmp_path / "w").rename(tmp_path / "moved")
  _, _, codec = workdir.load(tmp_path / "moved")
  assert codec.fingerprint == model.fingerprint
  other = tokenizer.train_sentencepiece(
    ["another text altogether"], tmp_path / "moved/tokenizer.model", 275
  )
  assert other.fingerprint != model.fingerprint
  with pytest.raises(ValueError, match=f"was trained with {model.fingerprint}"):
    workdir.load(tmp_path / "moved")


MESHES = """
import sys, jax, numpy as np
from mtp_jax import checkpoint, config, sharding, train

cfg = config.Config(
  model=config.Model(vocab=64, width=32, mlp=48, layers=3, n_future=2),
  optim=config.Optim(warmup=1))

def mesh(*shape):
  return sharding.make_mesh(
    config.Mesh(*shape), jax.devices()[: shape[0] * shape[1]])

with checkpoint.Checkpoints(sys.argv[1]) as saved:
  state = train.init_state(cfg, mesh(4, 2))
  saved.save(1, state, {})
  for shape in ((8, 1), (1, 1), (2, 4)):
    like = train.abstract_state(cfg, mesh(*shape))
    got, _, _ = saved.restore(like)
    for want, a, b in zip(*map(jax.tree.leaves, (like, got, state)), strict=True):
      assert a.sharding == want.sharding
      assert np.array_equal(a, b)
print("equal")
"""


def test_a_state_restores_onto_other_meshes(run_with_devices, tmp_path):
  assert run_with_devices(8, MESHES, str(tmp_path / "c")) == "equal\n"


def test_reports_the_share_of_peak_where_it_is_known(
  cfg, tmp_path, monkeypatch
):
  monkeypatch.setattr(metrics, "peak_flops", lambda: 1e12)
  cfg.train.steps, cfg.train.eval_every = 6, 6
  run.fit(cfg, tmp_path)
  with (tmp_path / "train.csv").open() as file:
    row = list(csv.DictReader(file))[-1]
  want = metrics.flops_per_token(cfg.model, 31) / 1e12
  got = float(row["flop_utilisation"]) / float(row["tokens_per_second"])
  assert got == pytest.approx(want, rel=1e-3)
