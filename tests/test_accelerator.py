"""The call that measures an accelerator, in small on a CPU."""

import dataclasses
import json
import multiprocessing
import re
import signal
import time
import types
import warnings

import forked
import jax
import pytest
import stages

from experiments.engineering.accelerator import (
  byte_model,
  exactness,
  record,
  scales,
  supervise,
)
from experiments.measure import steps
from mtp_jax import config, sharding
from mtp_jax.decode import tree as tree_lib
from mtp_jax.train import step


@pytest.fixture
def clock():
  now = [1000.0]

  def clock():
    return now[0]

  clock.passes = lambda seconds: now.__setitem__(0, now[0] + seconds)
  return clock


@pytest.fixture
def stage(tmp_path, clock):
  return record.Stage(tmp_path, "decoding", 1100.0, clock=clock)


def test_what_no_longer_fits_is_left_out(stage, clock, tmp_path):
  def work(seconds):
    clock.passes(seconds)
    return {"took": seconds}

  def attempt(name, kind, seconds, estimate=0.0):
    return stage.attempt(
      name, lambda: work(seconds), kind=kind, estimate=estimate
    )

  assert attempt("a", "long", 45, estimate=100) == {"took": 45}
  assert attempt("b", "short", 8, estimate=101) is None
  assert attempt("c", "short", 8) == {"took": 8}
  assert attempt("d", "long", 1) == {"took": 1}  # 47 s are left
  assert attempt("e", "long", 1, estimate=1) == {"took": 1}  # and 46
  assert attempt("f", "long", 1) == {"took": 1}  # and 45
  assert attempt("g", "long", 1, estimate=1) is None  # 44: the longest took 45
  assert attempt("h", "short", 44) == {"took": 44}
  assert attempt("i", "new", 0) is None  # nothing is left
  section = record.read(tmp_path)["stages"]["decoding"]
  assert list(section["results"]) == ["a", "c", "d", "e", "f", "h"]
  assert section["left_out"] == {
    "b": "expected to take 101 s, 55 s left",
    "g": "expected to take 45 s, 44 s left",
    "i": "expected to take 0 s, 0 s left",
  }
  assert section["seconds"]["h"] == 44


def test_what_fails_costs_only_itself(stage, tmp_path):
  def half():
    yield {"rows": 1}
    yield {"rows": 2}
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 90 GiB\nwanted")

  assert stage.attempt("half", half, kind="x") == {"rows": 2}
  assert stage.attempt("none", lambda: 1 / 0, kind="x") is None
  assert stage.attempt("whole", lambda: {"rows": 3}, kind="x") == {"rows": 3}
  stage.finish()
  section = record.read(tmp_path)["stages"]["decoding"]
  assert section["failed"] == {
    "half": "JaxRuntimeError: RESOURCE_EXHAUSTED: 90 GiB wanted",
    "none": "ZeroDivisionError: division by zero",
  }
  assert section["results"] == {"half": {"rows": 2}, "whole": {"rows": 3}}
  assert section["status"] == "finished" and section["running"] is None


def test_works_side_by_side():
  found = record.together({1: lambda: "one", 2: lambda: 1 / 0})
  assert found[1] == "one" and isinstance(found[2], ZeroDivisionError)


@pytest.mark.parametrize(
  "work, status",
  [
    (stages.crash, "ended by SIGABRT"),
    (stages.hang, "ended 0.1 s after its time"),
    (stages.fail, "ended by exit code 1"),
  ],
)
def test_a_stage_that_ends_badly(work, status, tmp_path, monkeypatch):
  monkeypatch.setattr(supervise, "GRACE", 0.1)
  monkeypatch.setattr(supervise, "LEAST", 0.1)
  stage = record.Stage(tmp_path, "training", time.time() + 9)
  stage.section["running"] = "1.3B"
  stage.section["results"]["0.3B"] = {"seconds": 1}
  stage.save()
  processes = multiprocessing.get_context("spawn")
  until = time.time() + (1 if work is stages.hang else 60)
  supervise.run(processes, work, "training", tmp_path, until, "cpu")
  whole = record.read(tmp_path)
  section = whole["stages"]["training"]
  assert section["status"] == section["failed"]["1.3B"] == status
  assert section["results"] == {"0.3B": {"seconds": 1}}
  assert section["running"] is None
  assert record.ended_badly(record.of_last_call(whole)) == [
    f"training: {status}"
  ]


def test_no_time_at_all(tmp_path):
  """What an earlier call found stays where it is looked for."""
  done = record.Stage(tmp_path, "decoding", time.time() + 9)
  done.attempt("device", lambda: {"flops_per_second": 1e9}, kind="device")
  done.finish()
  record.begin_call(tmp_path, {})
  for name in ("training", "decoding"):
    supervise.run(None, None, name, tmp_path, time.time(), "cpu")
  whole = record.read(tmp_path)
  assert whole["stages"]["training"]["status"] == "left out: no time"
  assert whole["stages"]["decoding"] == done.section
  assert not record.of_last_call(whole) and not whole["earlier"]
  assert whole["calls"][0]["left_out"] == ["training", "decoding"]


def test_a_section_that_was_killed_is_no_running_one(tmp_path):
  killed = record.Stage(tmp_path, "decoding", time.time() + 9)
  killed.section["running"] = "model"
  killed.save()
  record.begin_call(tmp_path, {})
  section = record.read(tmp_path)["stages"]["decoding"]
  assert section["status"] == section["failed"]["model"] == "killed"
  again = record.Stage(tmp_path, "decoding", time.time() + 9)
  assert again.whole["earlier"] == [{"decoding": section}]
  assert again.section["status"] == "running"


def test_a_stage_that_is_interrupted_as_it_starts(tmp_path):
  def interrupt(**_):
    raise KeyboardInterrupt

  record.begin_call(tmp_path, {})
  child = types.SimpleNamespace(start=interrupt, pid=None, exitcode=None)
  processes = types.SimpleNamespace(Process=lambda **_: child)
  with pytest.raises(KeyboardInterrupt):
    supervise.run(processes, None, "training", tmp_path, time.time() + 9, "cpu")
  section = record.read(tmp_path)["stages"]["training"]
  assert section["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_call_lists_what_it_did_not_do(number, tmp_path):
  process = forked.Process(
    ["-m", "experiments.engineering.accelerator", f"--output={tmp_path}"]
  )
  path, section = tmp_path / record.FILE, {}
  while not section.get("results"):
    assert process.poll() is None, process.communicate()
    time.sleep(0.05)
    if path.exists():
      section = json.loads(path.read_text())["stages"].get("exactness", {})
  process.send_signal(number)
  out, _ = process.communicate()
  assert process.returncode == 128 + number
  whole = record.read(tmp_path)
  assert whole["stages"]["exactness"]["status"] == "interrupted"
  assert whole["calls"][0]["left_out"] == ["decoding", "training", "byte model"]
  assert whole["stages"]["decoding"] == {"status": "left out: interrupted"}
  assert "exactness: interrupted" in out and "not begun by this call" in out


def test_the_byte_model_is_as_large_as_the_time_allows():
  models = scales.SCALES["gpu"].byte_models

  def width(rate, seconds):
    return byte_model.choose_model(models, rate, seconds).width

  assert width(1e14, -5) == width(1e12, 10) == 256
  widths = [width(1e14, s) for s in (10, 200, 1000, 10_000, 1_000_000)]
  assert widths == [256, 384, 512, 768, 1024]


@pytest.mark.parametrize(
  ("left", "training"), [(200, 120), (118, 118 / 3), (84, 28), (0, 0)]
)
def test_training_has_a_third_of_the_time_at_least(left, training):
  """With 118 s left and 120 reserved, two steps were once trained."""
  stage = types.SimpleNamespace(left=left)
  scale = scales.SCALES["gpu"]
  assert scale.reserve == 80
  assert byte_model.training_seconds(stage, scale) == training


def test_the_shapes_for_an_accelerator_are_sound():
  """They are not run here. cuDNN and splash take heads of 64 and 128."""
  gpu = scales.SCALES["gpu"]
  for cfg in (gpu.checked, gpu.decoding.model, *gpu.byte_models):
    cfg.check()
    assert cfg.width // cfg.attn_heads in (64, 128)
  trees = [tree for group in gpu.decoding.groups for tree in group]
  assert {t.size for t in trees} == {1, 2, 4, 8, 16, 64}
  assert all(t.heads <= 8 for t in trees)
  assert {g[0] for g in gpu.decoding.groups} == {tree_lib.chain(1)}
  for work in gpu.training:
    assert set(work.largest) <= set(work.programs)
    assert work.setup.seq_len % 64 == 0


def test_cudnn_takes_the_shapes_that_are_trained(monkeypatch):
  """Lowered for CUDA, forward and backward; not run: no GPU."""
  module = "jax._src.cudnn.fused_attention_stablehlo"
  monkeypatch.setattr(f"{module}.check_cudnn_version", lambda: 91200)
  gpu, mesh = scales.SCALES["gpu"], sharding.make_mesh(config.Mesh())
  runs = [
    steps.settings(work.setup, work.size, 4, loss, work.setup.rows)
    for work in gpu.training
    for loss in ("serial", "formula")  # all heads: jax 0.11 maps no mask
  ]
  byte_run = dataclasses.replace(gpu.byte_run, model=gpu.byte_models[0])
  for cfg in (*runs, byte_run):
    cfg = cfg.replace(model={"attention": "cudnn"}).check()
    traced = step.compile_step(cfg, mesh).trace(
      step.abstract_state(cfg, mesh), steps.batch_of(cfg)
    )
    with warnings.catch_warnings():
      warnings.simplefilter("error")  # a refusal is a warning
      text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = set(re.findall(r"@(__cudnn[^(]*)\(", text))
    forward = "__cudnn$fmhaScaleBiasSoftmax"
    assert kernels == {forward, f"{forward}Backward"}


def test_a_training_is_told_to_stop_once_it_would_save():
  heard = []
  begin = time.monotonic()
  with byte_model.stopped_after(0.1):
    time.sleep(0.4)  # nothing takes the signal yet: it would end the process
    old = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    while not heard:
      assert time.monotonic() - begin < 30
      time.sleep(0.01)
  with byte_model.stopped_after(0.1):
    pass  # done in time
  time.sleep(0.2)
  signal.signal(signal.SIGTERM, old)
  assert heard == [1]


def test_a_kernel_that_is_wrong_or_fails_is_not_trained_with(stage):
  scale = scales.SCALES["gpu"]

  def chosen(**section):
    stage.whole["stages"]["exactness"] = section
    return exactness.working_attention(stage, scale)

  small, large = (
    exactness.attention_name(shape, documents=True) for shape in scale.attention
  )
  assert chosen() == "auto"
  assert chosen(results={small: {"met": True}}, failed={}) == "auto"
  assert chosen(results={small: {"met": True}, large: {"met": False}}) == "xla"
  assert chosen(results={}, failed={large: "INTERNAL: no engine"}) == "xla"


@pytest.mark.slow
def test_start_to_end_after_a_call_that_was_killed(tmp_path):
  path, first = tmp_path / record.FILE, {}

  def start():
    arguments = "--minutes=120", f"--output={tmp_path}"
    return forked.Process(
      ["-m", "experiments.engineering.accelerator", *arguments]
    )

  killed = start()
  while not first.get("results"):
    assert killed.poll() is None, killed.communicate()
    time.sleep(0.05)
    if path.exists():  # whole, whenever it is read
      first = json.loads(path.read_text())["stages"].get("exactness", {})
  killed.kill()
  killed.communicate()  # ends with its stage, which ends with it
  first = json.loads(path.read_text())["stages"]["exactness"]
  assert first["results"] and first["status"] == "running"
  record.close(first, "killed")

  process = start()
  out, err = process.communicate(timeout=1800)
  assert process.returncode == 0, err
  whole = json.loads(path.read_text())
  assert whole["earlier"] == [{"exactness": first}]
  assert len(whole["calls"]) == 2
  assert len(whole["calls"][1]["commit"]) >= 40
  results = {}
  for name, section in whole["stages"].items():
    assert f"{name}: finished" in out
    assert not section["failed"] and not section["left_out"], section
    assert section["scale"] == "cpu" and section["machine"]["jax"]
    results[name] = section["results"]
  assert re.search(r"batch 3: .*, tree 3: [\d.]+ ms, [\d.]+ of ordinary", out)
  assert "of 2 texts the same" in out and "NOT MET" not in out
  assert list(results) == ["exactness", "decoding", "training", "byte model"]
  assert [r["met"] for r in results["exactness"].values()] == [True] * 4
  rows = results["decoding"]["batch 3: ordinary, tree 3"]
  assert list(rows) == ["ordinary", "tree 3"]
  assert [r["tokens_per_pass"] for r in rows.values()] == [1, 2]
  assert all(r["seconds"] > 0 and r["of_flops"] > 0 for r in rows.values())
  (row,) = results["training"]["1M, n=4, auto attention: steps"]["rows"]
  assert row["n"] == 4 and row["seconds"] > 0
  most = results["training"]["1M, n=4, auto attention: most rows, n=4, serial"]
  assert 1 <= most["most_rows"] == most["fits"] == most["does_not_fit"] - 1
  assert results["byte model"]["training"]["steps"] == 3
  rows = results["byte model"]["batch 2"]
  assert rows["chain 2"]["same_texts"]["of"] == 2
  assert rows["ordinary"]["speedup"] == 1


def test_bad_calls(tmp_path, call):
  def error(*arguments):
    code, _, err = call(
      *arguments, module="experiments.engineering.accelerator"
    )
    assert code == 1 and err.count("\n") == 1
    return err

  assert "no stage 'decode'; there are exactness, decoding" in error(
    f"--output={tmp_path}", "--stages=decode"
  )
  (tmp_path / record.FILE).write_text("[]")
  assert "is not what this program wrote" in error(f"--output={tmp_path}")
  for wrong in (
    '{"calls": {}, "stages": [], "earlier": 3}',
    '{"calls": [], "stages": {"exactness": 3}, "earlier": []}',
  ):
    (tmp_path / record.FILE).write_text(wrong)
    assert "is not what this program wrote" in error(f"--output={tmp_path}")
  assert f"{tmp_path / record.FILE} is a file; name a folder" in error(
    f"--output={tmp_path / record.FILE}"
  )
  assert "--output is required" in error()
