"""Runs: whatever interrupts them, they end with the same bits."""

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
import types

import forked
import jax
import numpy as np
import pytest

from mtp_jax import config, tokenizer, tokenizer_training
from mtp_jax.checkpoint import checkpoints, integrity
from mtp_jax.model import cost
from mtp_jax.train import lock, logs, loop, metrics, optim, processes, workdir

# Reads that orbax abandons when a file is damaged complain when collected.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)
STEPS, SAVE_EVERY = 50, 2

PROGRAM = """
import sys
from mtp_jax import config
from mtp_jax.train import loop
loop.fit(config.load(sys.argv[1]), sys.argv[2])
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
  """Waits until it has said so many steps; before come its settings."""
  while number:
    number -= process.stdout.readline().startswith("step ")


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


def test_the_trained_model_comes_back(unbroken, cfg):
  net, got, codec = workdir.load(unbroken)
  assert got == cfg
  assert isinstance(codec, tokenizer.Bytes)
  net_at_2, _, _ = workdir.load(unbroken, step=STEPS - SAVE_EVERY)
  a, b = (np.asarray(n.embed[...]) for n in (net, net_at_2))
  assert a.shape == b.shape and (a != b).any()
  with pytest.raises(checkpoints.CheckpointError, match="no checkpoint 5 in"):
    workdir.load(unbroken, step=5)
  with pytest.raises(checkpoints.CheckpointError, match="there is no run in"):
    workdir.load(unbroken.parent)


def test_killed_25_times_it_ends_with_the_same_bits(home, unbroken):
  target, rng = home / "killed", random.Random(0)
  saving = starting = kills = 0
  while kills < 25:
    process = start(home, target)
    if rng.random() < 0.15:  # before the first step
      time.sleep(rng.uniform(0.5, 3))
    else:
      read_steps(process, rng.randrange(1, 5))
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


def test_a_workdir_that_cannot_be_made_is_refused(cfg, monkeypatch):
  monkeypatch.setattr(loop.pipeline, "pack", None)  # not even read
  line = "cannot write to workdir /dev/null/w: .*; take another workdir"
  with pytest.raises(checkpoints.CheckpointError, match=line):
    loop.fit(cfg, "/dev/null/w")


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


def test_a_workdir_of_a_newer_format_is_left_as_it_is(
  cfg, tmp_path, monkeypatch
):
  monkeypatch.setattr(loop.pipeline, "pack", None)  # not even read
  text = config.to_json(cfg).replace('"format": 1', '"format": 2')
  (tmp_path / "config.json").write_text(text)
  line = r"config\.json has format 2, and this version .* formats up to 1: inst"
  with pytest.raises(ValueError, match=line):
    loop.fit(cfg, tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
  assert (tmp_path / "config.json").read_text() == text


def test_another_corpus_is_refused(unbroken, cfg, tmp_path):
  rows = [json.dumps({"text": f"another {i}"}) for i in range(99)]
  (tmp_path / "c.jsonl").write_text("\n".join(rows))
  cfg = cfg.replace(data={"path": str(tmp_path / "c.jsonl")})
  with pytest.raises(checkpoints.CheckpointError, match="data.train: '"):
    loop.fit(cfg, unbroken)
  cfg = cfg.replace(data={"path": str(tmp_path / "typo.jsonl")})
  with pytest.raises(ValueError, match="typo.jsonl"):
    loop.fit(cfg, tmp_path / "w")
  (left,) = (tmp_path / "w").iterdir()
  assert left.name == "lock" and not left.read_text()


def test_divergence_stops_and_goes_on_with_other_rates(
  cfg, tmp_path, monkeypatch, capsys
):
  cfg = cfg.replace(
    optim={"peak": 1e30, "warmup": 1},
    train={"steps": 9, "save_every": 1, "log_every": 2, "sample_tokens": 0},
  )
  told = processes.told_to_stop
  monkeypatch.setattr(processes, "told_to_stop", lambda asked, step: step == 4)
  assert int(loop.fit(cfg, tmp_path).bad) == 2
  said = "step 4 is not saved, since its loss or gradient was not finite; the "
  assert (
    f"{said}newest checkpoint is that of step 2\n" in capsys.readouterr().out
  )
  monkeypatch.setattr(processes, "told_to_stop", told)
  with pytest.raises(loop.Diverged) as error:
    loop.fit(cfg, tmp_path)
  for text in (
    "step 6: loss 16.", "not finite 4 steps in a row", "lower optim.peak",
    "newest checkpoint is that of step 2.",
  ):  # fmt: skip
    assert text in str(error.value)
  with checkpoints.Checkpoints(tmp_path / "checkpoints") as saved:
    assert saved.steps() == [1, 2]
    state, _, _ = saved.restore(
      jax.tree.map(np.asarray, loop.step_lib.init_state(cfg, one_device()))
    )
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.model))
  assert int(state.skipped) == 0
  # As it advises: 2 was the step that went too far.
  shutil.rmtree(tmp_path / "checkpoints/2")
  cfg = cfg.replace(
    optim={"peak": 1e-3}, train={"steps": 8, "max_bad_steps": 2}
  )
  assert int(loop.fit(cfg, tmp_path).step) == 8
  out = capsys.readouterr().out
  assert (
    "resuming from step 1\n"
    "optim.peak was 1e+30 until here, and is 0.001 from here on\n" in out
  )
  assert "train.steps was 9 until here, and is 8 from here on\n" in out
  assert "finished at step 8" in out
  with (tmp_path / "train.csv").open() as file:
    row = list(csv.DictReader(file))[1]
  # The updates made so far and the new settings give the rate, nothing else.
  want = float(optim.schedule(cfg.optim, 8)(3))
  assert row["step"] == "4" and float(row["learning_rate"]) == pytest.approx(
    want
  )
  cfg = cfg.replace(train={"steps": 7})
  with pytest.raises(ValueError, match="at step 8 already, past train.steps 7"):
    loop.fit(cfg, tmp_path)


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


def test_what_fails_in_a_run_costs_no_step(cfg, tmp_path, monkeypatch, caplog):
  """Evaluations and samples are said once; a damaged corpus stops the run at
  the batch that it would spoil, and the step before is saved."""
  order, batches = [], loop.pipeline.batches

  class Checkpoints(checkpoints.Checkpoints):
    def save(self, step, *args, **kwargs):
      order.append(step)
      super().save(step, *args, **kwargs)

  def measure(*_, **__):
    order.append("measure")
    raise RuntimeError("no memory for this")

  def generate(*_, **__):
    raise TypeError("int64 where int32 belongs")

  def damaged(*args, **kwargs):
    found = batches(*args, **kwargs)
    yield from (next(found) for _ in range(5))
    for path in (tmp_path / "cache").rglob("train.tokens"):
      path.write_bytes(bytes(path.stat().st_size))
    yield from found

  monkeypatch.setattr(checkpoints, "Checkpoints", Checkpoints)
  monkeypatch.setattr(loop.evaluations.head_measures, "measure", measure)
  monkeypatch.setattr(loop.evaluations.generate, "generate", generate)
  monkeypatch.setattr(loop.pipeline, "batches", damaged)
  cfg = cfg.replace(
    data={"cache": str(tmp_path / "cache")},
    train={"eval_every": 4, "save_every": 4},
  )
  with pytest.raises(loop.pipeline.CacheDamaged) as error:
    loop.fit(cfg, tmp_path / "w")
  *order, last = order
  assert order[:2] == [4, "measure"] and order[2:] in ([], [8, "measure"])
  # Some batches were read ahead.
  assert 5 <= last <= 11
  assert f"up to {last} were trained on sound data" in str(error.value)
  assert f"checkpoint is that of step {last}" in str(error.value)
  assert str(error.value).count("Start again") == 1
  assert [m for m in caplog.messages if "failed" in m] == [
    "the evaluation at step 4 failed: RuntimeError: no memory for this. The "
    "run goes on; this is not said again",
    "the sample at step 4 failed: TypeError: int64 where int32 belongs. The "
    "run goes on; this is not said again",
  ]


def test_a_sample_continues_text_and_no_padding(cfg, tmp_path, monkeypatch):
  """The held-out split is shorter than the half window of a prompt."""
  prompts, codec = [], tokenizer.Bytes()

  def generate(decoder, given, **_):
    prompts.extend(given)
    return types.SimpleNamespace(tokens=[codec.encode("new")])

  monkeypatch.setattr(loop.evaluations.head_measures, "measure", None)
  monkeypatch.setattr(loop.evaluations.decoder_lib, "lay_out", lambda *_: None)
  monkeypatch.setattr(loop.evaluations.generate, "generate", generate)
  tokens = np.array([codec.bos, *codec.encode("old"), codec.eos])
  packed = loop.pipeline.Packed(tokens, np.zeros(1, int), 1.0, "", 1, {})
  reporter = types.SimpleNamespace(logs=logs.Writer(tmp_path, 0, True))
  loop.evaluations.Evaluations(
    cfg, one_device(), codec, packed, None, reporter
  ).run(5, None)
  assert [p.tolist() for p in prompts] == [tokens.tolist()]
  (sample,) = (tmp_path / "samples").iterdir()
  assert sample.read_text() == "old[...]new\n"


def test_windows_too_short_to_evaluate_are_refused_at_once(
  cfg, tmp_path, monkeypatch
):
  monkeypatch.setattr(loop.pipeline, "pack", None)  # not even read
  cfg = cfg.replace(data={"seq_len": 4}, model={"n_future": 8})
  with pytest.raises(ValueError, match="at least 8 tokens for 8 heads, not 4"):
    loop.fit(cfg, tmp_path)


def one_device():
  return loop.sharding.make_mesh(config.Mesh(1, 1), jax.devices()[:1])


def test_evaluates_in_microbatches(cfg, tmp_path, monkeypatch):
  """The rows are those of whole batches, as many at once as a step holds."""
  seen = []

  def measure(net, batches, **_):
    seen.append([np.asarray(b.tokens) for b in batches])
    ones = np.ones(cfg.model.n_future)
    return {"nats": ones, "accuracy": ones, "greedy": 1.0, "sampled": 1.0}

  monkeypatch.setattr(loop.evaluations.head_measures, "measure", measure)
  for parts in (1, 3):
    cfg = cfg.replace(
      train={
        "steps": 6, "eval_every": 6, "sample_tokens": 0, "accumulate": parts,
      }
    )  # fmt: skip
    loop.fit(cfg, tmp_path / str(parts))
  whole, small = seen
  assert [len(rows) for rows in small] == [1] * 6
  assert np.array_equal(np.concatenate(whole), np.concatenate(small))


def test_settings_that_do_not_fit_are_errors(cfg, tmp_path, monkeypatch):
  small = cfg.replace(model={"vocab": 256})
  with pytest.raises(ValueError, match="model.vocab 256 .* 259 ids .*'bytes'"):
    loop.fit(small, tmp_path)
  with pytest.raises(ValueError, match="has a backslash"):
    loop.fit(cfg, tmp_path / "a\\b")
  with pytest.raises(ValueError, match="name ends in 'gs:'"):
    loop.fit(cfg, tmp_path / "gs:" / "w")
  monkeypatch.chdir(tmp_path)
  for path, line in (("", "path is empty"), ("~no-user/w", "'~no-user/w'")):
    for use in (lambda path: loop.fit(cfg, path), workdir.load):
      with pytest.raises(ValueError, match=line):
        use(path)
  assert not list(tmp_path.iterdir())
  cfg = cfg.replace(mesh={"data": 7})
  with pytest.raises(ValueError, match="mesh.data=7 x mesh.model=1"):
    loop.fit(cfg, tmp_path)


def test_a_tokenizer_model_stays_with_the_run(cfg, tmp_path):
  model = tokenizer_training.train(
    ["def f(x):\n  return x\n" * 9], tmp_path / "m.model", 280
  )
  cfg = cfg.replace(
    data={"tokenizer": str(tmp_path / "m.model")},
    model={"vocab": model.vocab},
    train={"steps": 6, "eval_every": 6},
  )
  loop.fit(cfg, tmp_path / "w")
  (tmp_path / "m.model").unlink()
  loop.fit(cfg, tmp_path / "w")  # nothing is left to do
  (tmp_path / "w").rename(tmp_path / "moved")
  _, _, codec = workdir.load(tmp_path / "moved")
  assert codec.fingerprint == model.fingerprint
  other = tokenizer_training.train(
    ["another text altogether"], tmp_path / "moved/tokenizer.model", 275
  )
  assert other.fingerprint != model.fingerprint
  with pytest.raises(ValueError, match=f"was trained with {model.fingerprint}"):
    workdir.load(tmp_path / "moved")


MESHES = """
import sys, jax, numpy as np
from mtp_jax import config, sharding
from mtp_jax.checkpoint import checkpoints
from mtp_jax.train import step

cfg = config.Config(
  model=config.Model(vocab=64, width=32, mlp=48, layers=3, n_future=2),
  optim=config.Optim(warmup=1, kind=sys.argv[2]))

def mesh(*shape):
  return sharding.make_mesh(
    config.Mesh(*shape), jax.devices()[: shape[0] * shape[1]])

with checkpoints.Checkpoints(sys.argv[1]) as saved:
  state = step.init_state(cfg, mesh(4, 2))
  saved.save(1, state, {})
  for shape in ((8, 1), (1, 1), (2, 4)):
    like = step.abstract_state(cfg, mesh(*shape))
    got, _, _ = saved.restore(like)
    leaves = map(jax.tree.leaves, (like, got, state))
    for want, a, b in zip(*leaves, strict=True):
      assert a.sharding == want.sharding
      assert np.array_equal(a, b)
print("equal")
"""


@pytest.mark.parametrize("kind", config.OPTIMISERS)
def test_a_state_restores_onto_other_meshes(kind, run_with_devices, tmp_path):
  assert run_with_devices(8, MESHES, str(tmp_path / "c"), kind) == "equal\n"


def test_reports_the_share_of_peak_where_it_is_known(
  cfg, tmp_path, monkeypatch
):
  monkeypatch.setattr(metrics.cost, "peak_flops", lambda: 1e12)
  cfg = cfg.replace(train={"steps": 6, "eval_every": 6})
  loop.fit(cfg, tmp_path)
  with (tmp_path / "train.csv").open() as file:
    row = list(csv.DictReader(file))[-1]
  want = cost.flops_per_token(cfg.model, 31) / 1e12
  got = float(row["flop_utilisation"]) / float(row["tokens_per_second"])
  assert got == pytest.approx(want, rel=1e-3)
