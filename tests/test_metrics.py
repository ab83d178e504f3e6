"""Measures of a run: FLOPs, time, a profile."""

import dataclasses
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import config
from mtp_jax.model import cost, model
from mtp_jax.train import loop, metrics


@pytest.mark.parametrize("head", config.HEAD_KINDS)
def test_model_flops_are_those_of_the_program(head):
  """Against XLA's count of one pass with unrolled layers, masks aside."""
  channels = 24 if head == "causal" else 0  # of their own, or width / heads
  cfg = config.Model(
    vocab=101,
    width=64,
    mlp=192,
    layers=5,
    n_future=3,
    head=head,
    attn_channels=channels,
  )
  B, T = 2, 32
  net = jax.eval_shape(lambda k: model.Model(cfg, k), jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((B, T), "int32")

  def forward(net, tokens):
    x = net.look_up(tokens)
    ctx = model.layers.training_context(tokens * 0, cfg)
    for i in range(cfg.trunk_layers):
      x = jax.tree.map(lambda a, i=i: a[i], net.trunk)(x, ctx)
    states, heads = [], net.heads  # unrolled too: XLA counts a loop once
    for i in range(cfg.n_future):
      states.append(heads.run_without_remat(heads.layer(i), x, ctx))
      x = states[-1] if heads.order else x
    return heads.logits(heads.normalise(jnp.stack(states)))

  compiled = jax.jit(forward).lower(net, tokens).compile()
  counted = compiled.cost_analysis()["flops"]
  # The whole square of scores is computed, of which half counts.
  wide = cfg.attn_heads * cfg.channels
  masked = 2 * B * T * T * wide * (cfg.trunk_layers + cfg.head_layers)
  ours = cost.flops_per_token(cfg, T) * B * T / 3 + masked
  # Norms, rotations and softmax are not matrix products.
  assert ours < counted < 1.15 * ours


def test_a_sliding_window_saves_the_scores_that_it_hides():
  cfg = config.Model(layers=5, attn_channels=24)
  T, window = 32, 9
  slid = dataclasses.replace(cfg, sliding_window=window)
  seen = np.tril(np.ones((T, T))) - np.tril(np.ones((T, T)), -window)
  saved = np.tril(np.ones((T, T))).sum() - seen.sum()
  got = cost.flops_per_token(cfg, T) - cost.flops_per_token(slid, T)
  assert got * T == pytest.approx(12 * saved * 4 * 24 * 5, rel=0.05)
  wider = dataclasses.replace(cfg, sliding_window=T)
  assert cost.flops_per_token(wider, T) == cost.flops_per_token(cfg, T)


def test_peak_is_unknown_here():
  assert cost.peak_flops() is None


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
  flops = cost.flops_per_token(config.Model(), 5)
  assert found["model_flops_per_second"] == 2.5 * flops


def test_a_profile_that_would_crash_in_libtpu_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(
    metrics.xla_client, "pjrt_plugin_loaded", lambda name: name == "tpu"
  )
  with pytest.raises(ValueError, match="libtpu .* JAX_PLATFORMS=cpu, or run"):
    loop.fit(config.Config(), tmp_path / "w", profile=range(2, 3))
  assert not (tmp_path / "w").exists()


# Traced in a process of its own: libtpu, which other tests load to compile for
# TPUs, crashes the profiler.
TRACES = """
import pathlib, sys, jax
from mtp_jax.train import metrics
folder = pathlib.Path(sys.argv[1])

trace = metrics.Trace(folder / "steps", range(3, 5))
double = jax.jit(lambda x: x * 2)
for step in range(1, 8):
  with trace.step(step):
    x = double(step)
  trace.end(step, x)
trace.close()

trace = metrics.Trace(folder / "ends_inside", range(3, 50))
with trace.step(3):
  pass
trace.end(3, 0)
trace.close()

trace = metrics.Trace(folder / "inactive", range(1, 3), active=False)
with trace.step(1):
  pass
trace.close()
"""


def test_a_trace_holds_its_steps_and_no_others(run_with_devices, tmp_path):
  run_with_devices(1, TRACES, str(tmp_path))
  (path,) = (tmp_path / "steps").rglob("*.trace.json.gz")
  found = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
  steps = [e["args"]["step_num"] for e in found if e.get("name") == "train"]
  assert sorted(steps) == ["3", "4"]
  assert len(list((tmp_path / "steps").rglob("*.xplane.pb"))) == 1
  # A run that ends inside its trace writes it.
  assert list((tmp_path / "ends_inside").rglob("*.xplane.pb"))
  assert not (tmp_path / "inactive").exists()
