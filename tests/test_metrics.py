"""Writers: what a cut-off run left behind does not stay."""

import csv
import gzip
import json
import struct

import jax
import pytest
from tensorboardX.proto import event_pb2

from mtp_jax import config, metrics
from mtp_jax.model import model


def rows(path):
  with path.open() as file:
    return list(csv.DictReader(file))


def events(folder):
  """(step, tag, value) of the event files in the order of their making."""
  found = []
  for path in sorted(folder.iterdir()):
    raw = path.read_bytes()
    while raw:
      (size,) = struct.unpack("<Q", raw[:8])
      event = event_pb2.Event.FromString(raw[12 : 12 + size])
      found += [(event.step, v.tag, v) for v in event.summary.value]
      raw = raw[16 + size :]
  return found


def test_csv_and_events_hold_the_numbers(tmp_path):
  writer = metrics.Writer(tmp_path / "w", 0)
  writer.write("train", 10, {"loss": 1.5, "nats_1": 0.25})
  writer.write("train", 20, {"loss": 1.25, "nats_1": 1 / 3})
  writer.write("held_out", 20, {"loss": 7})
  writer.write_text("sample", 20, "a text")
  assert rows(tmp_path / "w/train.csv") == [  # before it is closed
    {"step": "10", "loss": "1.5", "nats_1": "0.25"},
    {"step": "20", "loss": "1.25", "nats_1": "0.333333333"},
  ]
  writer.close()
  assert rows(tmp_path / "w/held_out.csv") == [{"step": "20", "loss": "7"}]
  assert "step 20\na text" in (tmp_path / "w/sample.txt").read_text()
  found = events(tmp_path / "w/tensorboard")
  scalars = {(s, t): v.simple_value for s, t, v in found}
  assert scalars[10, "train/loss"] == 1.5
  assert scalars[20, "held_out/loss"] == 7
  assert (20, "sample/text_summary") in scalars


def test_a_resumed_run_goes_on_where_the_checkpoint_is(tmp_path):
  writer = metrics.Writer(tmp_path, 0)
  for step in (10, 20, 30):
    writer.write("train", step, {"loss": step})
  writer.close()
  with (tmp_path / "train.csv").open("a") as file:
    file.write("40,")  # killed while it wrote
  writer = metrics.Writer(tmp_path, 20)
  writer.write("train", 30, {"loss": 31})
  writer.close()
  assert [(r["step"], r["loss"]) for r in rows(tmp_path / "train.csv")] == [
    ("10", "10"),
    ("20", "20"),
    ("30", "31"),
  ]


def test_other_processes_write_nothing(tmp_path):
  writer = metrics.Writer(tmp_path / "w", 0, active=False)
  writer.write("train", 1, {"loss": 1})
  writer.write_text("sample", 1, "text")
  writer.close()
  assert not (tmp_path / "w").exists()


def test_progress_writes_lines_where_there_is_no_terminal(capsys):
  progress = metrics.Progress(20, 5)
  progress.advance(6)
  progress.report(10, "loss [1.5]")
  progress.close()
  metrics.Progress(20, 5, active=False).say("nothing")
  assert capsys.readouterr().out == "step 10/20  loss [1.5]\n"


@pytest.mark.parametrize("head", config.HEAD_KINDS)
def test_model_flops_are_those_of_the_program(head):
  """Against XLA's count of one pass with unrolled layers, masks aside."""
  cfg = config.Model(
    vocab=101, width=64, mlp=192, layers=5, n_future=3, head=head
  )
  B, T = 2, 32
  net = jax.eval_shape(lambda k: model.Model(cfg, k), jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((B, T), "int32")

  def forward(net, tokens):
    x = net.look_up(tokens)
    ctx = model.layers.training_context(tokens * 0, cfg)
    for i in range(cfg.trunk_layers):
      x = jax.tree.map(lambda a, i=i: a[i], net.trunk)(x, ctx)
    return net.heads.logits(net.heads(x, ctx))

  compiled = jax.jit(forward).lower(net, tokens).compile()
  counted = compiled.cost_analysis()["flops"]
  # The whole square of scores is computed, of which half counts.
  masked = 2 * B * T * T * cfg.width * (cfg.trunk_layers + cfg.head_layers)
  ours = metrics.flops_per_token(cfg, T) * B * T / 3 + masked
  # Norms, rotations and softmax are not matrix products.
  assert ours < counted < 1.15 * ours


def test_peak_is_unknown_here():
  assert metrics.peak_flops() is None


def test_clock_leaves_out_compiling_and_pauses(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  clock = metrics.Clock(config.Model(), config.Data(batch=2, seq_len=5))
  now[0] += 50  # compiles
  clock.step()
  for _ in range(4):
    with clock.waiting():
      now[0] += 1
    now[0] += 3
    clock.step()
  with clock.paused():
    now[0] += 1000
  found = clock.lap()
  assert found["step_seconds"] == 4
  assert found["tokens_per_second"] == 2.5
  assert found["data_wait_share"] == 0.25
  assert found["paused_seconds"] == 1000
  flops = metrics.flops_per_token(config.Model(), 5)
  assert found["model_flops_per_second"] == 2.5 * flops


def test_a_trace_holds_its_steps_and_no_others(tmp_path):
  trace = metrics.Trace(tmp_path, range(3, 5))
  double = jax.jit(lambda x: x * 2)
  for step in range(1, 8):
    with trace.step(step):
      x = double(step)
    trace.end(step, x)
  trace.close()
  (path,) = tmp_path.rglob("*.trace.json.gz")
  found = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  steps = [e["args"]["step_num"] for e in found if e.get("name") == "train"]
  assert sorted(steps) == ["3", "4"]
  assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_a_run_that_ends_inside_its_trace_writes_it(tmp_path):
  trace = metrics.Trace(tmp_path / "first", range(3, 50))
  with trace.step(3):
    pass
  trace.end(3, 0)
  trace.close()
  assert list(tmp_path.rglob("*.xplane.pb"))
  other = metrics.Trace(tmp_path / "other", range(1, 3), active=False)
  with other.step(1):
    pass
  other.close()
  assert not (tmp_path / "other").exists()
