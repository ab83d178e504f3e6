"""Plans for TPU slices, made with the TPU compiler itself."""

import os
import re

import pytest

from experiments.measure import aot, planning
from mtp_jax import config
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import cost

pytest.importorskip("libtpu")  # it has no wheels but for Linux on x86

CONFIG = config.Config(
  model=config.Model(
    vocab=520, width=256, mlp=512, layers=4, attn_heads=4, kv_heads=2,
    n_future=2, dtype="bfloat16", remat="full",
  ),
  data=config.Data(seq_len=384, batch=8),
  train=config.Train(loss_block=64, accumulate=2),
  mesh=config.Mesh(data=2, model=2),
)  # fmt: skip


@pytest.fixture(scope="module")
def planned():
  return planning.training(CONFIG.check(), "v5e:2x2")


@pytest.mark.slow
def test_a_training_step_for_four_chips(planned):
  assert planned.fits
  assert (planned.chips, planned.mesh) == (4, {"data": 2, "model": 2})
  assert planned.rows == 2  # 8 rows, 2 microbatches, 2 chips along 'data'
  assert planned.peak_flops == 4 * cost.PEAK_FLOPS["TPU v5 lite"]
  parameters = planned.state["parameters"]
  # Two moments, and a few counts; norms are whole on every chip.
  assert planned.state["optimiser state"] == pytest.approx(
    2 * parameters, abs=64
  )
  assert planned.compiled.arguments >= 3 * parameters
  assert planned.needed < planned.hbm == int(15.75 * aot.GIB)
  assert planned.compiled.temporaries > parameters  # gradients are there


@pytest.mark.slow
def test_the_attention_kernel_is_in_the_step(planned):
  """Forward in trunk and heads and again in the trunk's backward pass; two
  backward kernels (dq; dk and dv) in both. No scores are left."""
  text = planned.compiled.text
  for kernel, times in (("fwd", 3), ("dq", 2), ("dkv", 2)):
    calls = re.findall(
      rf"^  %splash_mha_{kernel}\S* = .*custom-call", text, re.M
    )
    assert len(calls) == times, kernel
  assert "[2,384,64]" in text  # one row's queries, by head
  assert "384,384]" not in text


@pytest.mark.slow
def test_flops_count_every_turn(planned):
  """Six per parameter and token, eight where a layer is run again."""
  tokens = CONFIG.data.batch * CONFIG.data.seq_len
  D, V, N = CONFIG.model.width, CONFIG.model.vocab, CONFIG.model.n_future
  layer = D * D + 2 * D * (D // 2) + D * D + 3 * D * CONFIG.model.mlp
  scores = 2 * CONFIG.data.seq_len * D  # q k and weights v, none masked away
  last = D * CONFIG.model.mlp  # a layer's last product is not run again
  trunk = 2 * (8 * layer - 2 * last + 8 * scores)
  heads = 2 * (6 * layer + 6 * scores) + 6 * N * D * V
  # Beside them only sums of N weighted losses.
  assert planned.flops / tokens == pytest.approx(trunk + heads, rel=1e-6)


@pytest.mark.slow
def test_collectives_have_parts_and_turns(planned):
  found = {(c.kind, c.part) for c in planned.collectives}
  for part in ("trunk forward", "trunk backward", "heads"):
    assert any(p == part for _, p in found), found
  rows = planning.totals(planned.collectives)
  assert sum(r[2] for r in rows) == sum(c.times for c in planned.collectives)
  assert all(0 <= share <= 1 for *_, share in rows)


def test_a_decoding_pass():
  cfg = CONFIG.check()
  got = planning.decoding(cfg, "v5e:2x2", batch=6, cache_len=512)
  assert got.fits and got.rows == 3 and got.tokens == 12
  C = cfg.model.width // cfg.model.attn_heads
  # Four layers' keys and values, rows and kv heads over two chips each.
  cache = 4 * 2 * (6 // 2) * 512 * (2 // 2) * C * 2
  assert got.state["cache"] == cache
  assert got.compiled.arguments >= cache + got.state["parameters"]
  with pytest.raises(ValueError, match="decode_batch 7 does not divide by 2"):
    planning.decoding(cfg, "v5e:2x2", batch=7, cache_len=512)


@pytest.mark.slow
def test_a_pass_over_a_tree_copies_no_cache():
  """Compiled for the TPU: rows and kv heads split, the winning path moved.

  The heads are 128 channels wide, as a TPU's lanes and the paper's models are.
  """
  cfg = CONFIG.replace(model={"attn_heads": 2}).check()
  tree = tree_lib.from_paths([[0], [1], [2]])
  got = planning.decoding(cfg, "v5e:2x2", batch=8, cache_len=65536, tree=tree)
  assert got.fits and got.tokens == 8 * 4
  assert got.compiled.temporaries < 0.1 * got.state["cache"]


def test_what_does_not_fit_is_said_with_the_remedy():
  """The compiler itself gives up: 17 GiB of moments and parameters."""
  cfg = CONFIG.replace(
    model={"vocab": 2**20, "width": 1024},
    mesh={"data": -1, "model": 1},
    train={"accumulate": 1},
  )
  got = planning.training(cfg.check(), "v5e:1x1")
  assert not got.fits and not got.compiled.fits
  assert got.compiled.peak > got.hbm
  text = "\n".join(planning.describe(got))
  assert "DOES NOT FIT" in text and "of 15.75" in text
  assert "gradients alone take" in planning.advice(got, cfg)[0]


def refused(rows, **changes):
  cfg = CONFIG
  for path, value in changes.items():
    section, name = path.split("__")
    cfg = cfg.replace(**{section: {name: value}})
  compiled = aot.Compiled(False, 1.0, 0, 0, 30 * aot.GIB, 0, "")
  state = {"parameters": 2 * aot.GIB, "optimiser state": 4 * aot.GIB}
  made = planning.Plan(
    "training step", "v5e:2x2", 4, {"data": 4, "model": 1}, rows, 1, state,
    compiled, 16 * aot.GIB, 1, 1.0, [],
  )  # fmt: skip
  return planning.advice(made, cfg)


def test_advice():
  """Eight rows take 20 GiB beside the 10 that stay, and 6 are left: 2 rows."""
  lines = refused(8.0)
  assert "--config.train.accumulate=8 leaves 2 rows" in lines[0]
  assert "larger slice" in lines[-1]
  lines = refused(1.0, model__remat="none", train__loss="formula")
  assert "remat=full" in lines[0] and "loss=serial" in lines[1]
  assert (
    "mesh.data=2 --config.mesh.model=2 --config.train.accumulate=4"
    in (lines[2])
  )


def test_unknown_slices_are_one_line():
  for name in ("v5p", "v5e:3x3", "tpu:2x2"):
    with pytest.raises(ValueError, match=f"no TPU slice '{name}'.*Known forms"):
      aot.topology(name)
  with pytest.raises(ValueError, match="'TPU v3', whose memory is not known"):
    aot.topology("v3:2x2x1")


def test_a_v4_chip_is_one_device():
  devices = aot.topology("v4:2x2x1")
  assert {d.device_kind for d in devices} == {"TPU v4"} and len(devices) == 4
  assert "XLA_FLAGS" not in os.environ  # libtpu dies of those unknown to it


def test_settings_that_do_not_fit_the_slice():
  cfg = CONFIG.replace(mesh={"data": 3, "model": 1})
  with pytest.raises(ValueError, match="does not use exactly the 4 devices"):
    planning.training(cfg, "v5e:2x2")
  cfg = CONFIG.replace(mesh={"data": -1, "model": 1}, data={"batch": 6})
  with pytest.raises(ValueError, match="batch 6 in 2 microbatches does not"):
    planning.training(cfg, "v5e:2x2")


@pytest.mark.slow
def test_the_trunk_receives_its_weights(planned):
  """Once forward and twice backward at most (run again, and for its own
  gradient), in each of two microbatches; half of them is on the other chip."""
  D, F, K = CONFIG.model.width, CONFIG.model.mlp, CONFIG.model.kv_heads
  layer = 2 * D * D + 2 * D * K * (D // CONFIG.model.attn_heads) + 3 * D * F
  # bfloat16, 2 layers, 2 microbatches, split over 'model' in two.
  weights = 2 * layer * 2 * 2 // 2
  for part, most in (("trunk forward", 1), ("trunk backward", 2)):
    gathered = sum(
      c.times * c.received
      for c in planned.collectives
      if c.part == part and c.kind in ("all-gather", "collective-permute")
    )
    assert 0.9 * weights / 2 <= gathered <= 1.3 * most * weights, part
