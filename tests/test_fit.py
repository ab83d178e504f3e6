"""`loop.fit` in this process: what stops it, what does not, what it writes."""

import csv
import itertools
import shutil
import types

import jax
import numpy as np
import pytest

from mtp_jax import config, tokenizer, tokenizer_training
from mtp_jax.checkpoint import checkpoints
from mtp_jax.data import pipeline
from mtp_jax.model import cost
from mtp_jax.train import logs, loop, metrics, optim, processes, workdir
from tests import runs, tokenizer_files

STEPS, SAVE_EVERY = runs.STEPS, runs.SAVE_EVERY


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  return runs.make(tmp_path_factory.mktemp("run"))


# Reads that orbax abandons when a file is damaged complain when collected.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)


@pytest.fixture
def cfg(home):
  return config.load(home / "config.json")


def test_a_workdir_that_cannot_be_made_is_refused(cfg, monkeypatch):
  monkeypatch.setattr(loop.pipeline, "pack", None)  # not even read
  line = "cannot write to workdir /dev/null/w: .*; take another workdir"
  with pytest.raises(checkpoints.CheckpointError, match=line):
    loop.fit(cfg, "/dev/null/w")


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


@pytest.mark.slow
def test_divergence_stops_and_goes_on_with_other_rates(
  cfg, tmp_path, monkeypatch, capsys
):
  cfg = cfg.replace(
    optim={"peak": 1e30, "warmup": 1},
    train={"steps": 9, "save_every": 1, "log_every": 2, "sample_tokens": 0},
  )
  told = processes.told_to_stop
  steps = itertools.count(1)
  monkeypatch.setattr(processes, "told_to_stop", lambda asked: next(steps) == 4)
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
    "newest checkpoint is that of step 2.", "then resumes from the one before",
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

  def pack(*_):
    raise AssertionError("the corpus was read before this run was refused")

  with pytest.raises(ValueError, match="at step 8 already, past train.steps 7"):
    loop.fit(cfg.replace(train={"steps": 7}), tmp_path)
  monkeypatch.setattr(loop.pipeline, "pack", pack)
  with pytest.raises(checkpoints.CheckpointError, match="train.seed: 0 in the"):
    loop.fit(cfg.replace(train={"seed": 5}), tmp_path)


@pytest.mark.parametrize(
  "steps, end",
  [
    ([], "not saved; there is no checkpoint yet. .* data of these steps$"),
    ([2], "remove that checkpoint: the run then begins anew$"),
    ([1, 2], "remove that checkpoint: the run then resumes from the one befo"),
  ],
)
def test_after_a_divergence_the_advice_is_possible(cfg, steps, end):
  run = object.__new__(loop._Loop)
  run.cfg, run.saved = cfg, types.SimpleNamespace(steps=lambda: steps)
  values = {"bad": 4, "loss": 1.0, "grad_norm": np.nan}
  with pytest.raises(loop.Diverged, match=end):
    run._check(7, values)


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
  with pytest.raises(loop.blocks.CacheDamaged) as error:
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
  monkeypatch.setattr(loop.evaluations.layout, "lay_out", lambda *_: None)
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


def short(cfg):
  """One evaluation and no sample; its programs are compiled once."""
  return cfg.replace(train={"steps": 6, "eval_every": 6, "sample_tokens": 0})


def test_evaluates_in_microbatches(cfg, tmp_path, monkeypatch):
  """The rows are those of whole batches, as many at once as a step holds."""
  seen = []

  def measure(net, batches, **_):
    seen.append([np.asarray(b.tokens) for b in batches])
    ones = np.ones(cfg.model.n_future)
    return {"nats": ones, "accuracy": ones, "greedy": 1.0, "sampled": 1.0}

  monkeypatch.setattr(loop.evaluations.head_measures, "measure", measure)
  for parts in (1, 3):
    cfg = short(cfg).replace(train={"accumulate": parts})
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
    train={"steps": 1, "eval_every": 1, "sample_tokens": 0},
    optim={"warmup": 0},
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


def test_a_tokenizer_json_trains(cfg, tmp_path):
  """Its bits per byte are of the text's bytes, and it writes the sample."""
  fields = tokenizer_files.train("byte_level")
  tokenizer_files.write(
    tmp_path / "hf", fields, tokenizer_config=tokenizer_files.NAMES
  )
  cfg = cfg.replace(
    data={"tokenizer": str(tmp_path / "hf")},
    model={"vocab": 331, "layers": 2, "n_future": 1},
    train={"steps": 1, "sample_tokens": 5},
    optim={"warmup": 0},
  )
  loop.fit(cfg, tmp_path / "w")
  _, codec = workdir.settings(tmp_path / "w")
  assert codec.fingerprint == tokenizer.load(str(tmp_path / "hf")).fingerprint
  _, held = pipeline.pack(cfg.data, codec)
  ids = np.array(held.tokens[:])
  size = len(codec.decode_bytes(ids))
  predicted = len(ids) - (ids == codec.bos).sum()
  with (tmp_path / "w" / "held_out.csv").open(encoding="utf-8") as file:
    (row,) = csv.DictReader(file)
  bits = float(row["nats_1"]) / np.log(2) * predicted / size
  assert float(row["bits_per_byte_1"]) == pytest.approx(bits, rel=1e-5)
  (sample,) = (tmp_path / "w" / "samples").iterdir()
  assert "[...]" in sample.read_text(encoding="utf-8")


MESHES = """
import sys, jax, numpy as np
from mtp_jax import config, sharding
from mtp_jax.checkpoint import checkpoints
from mtp_jax.train import step

cfg = config.Config(
  model=config.Model(vocab=64, width=32, mlp=48, n_future=2, **(
    dict(layers=3) if sys.argv[2] == "adamw" else
    dict(layers=1, head="unembedding"))),
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", config.OPTIMISERS)
def test_a_state_restores_onto_other_meshes(kind, run_with_devices, tmp_path):
  assert run_with_devices(8, MESHES, str(tmp_path / "c"), kind) == "equal\n"


def test_reports_the_share_of_peak_where_it_is_known(
  cfg, tmp_path, monkeypatch
):
  monkeypatch.setattr(metrics.cost, "peak_flops", lambda: 1e12)
  cfg = short(cfg)
  loop.fit(cfg, tmp_path)
  with (tmp_path / "train.csv").open() as file:
    row = list(csv.DictReader(file))[-1]
  want = cost.flops_per_token(cfg.model, 31) / 1e12
  got = float(row["flop_utilisation"]) / float(row["tokens_per_second"])
  assert got == pytest.approx(want, rel=1e-3)
