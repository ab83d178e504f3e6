"""A training step of the paper's sizes: its program, its time, its memory."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from configs.paper import base
from experiments.measure import aot, largest, timing
from mtp_jax import config, sharding
from mtp_jax.data import batch as batch_lib
from mtp_jax.model import cost, model
from mtp_jax.train import step as step_lib


@dataclasses.dataclass(frozen=True)
class Setup:
  """On what a step is timed, and how often."""

  rows: int = 2  # per device
  seq_len: int = 4096  # tokens of a row
  vocab: int = 32_000
  remat: str = "full"  # the layers'
  attention: str = "auto"  # one of config.ATTENTION
  rounds: int = 5  # turns of each program
  steps: int = 3  # of a turn, timed


@dataclasses.dataclass
class Program:
  """A compiled step and what is known of it."""

  cfg: config.Config
  step: Callable | None  # None: it does not fit into memory
  row: dict  # of the results


def settings(
  setup: Setup, size: str, n: int, loss: str, rows: int
) -> config.Config:
  """A size of the paper in one microbatch of `rows` rows on all devices."""
  cfg = base.run(size, n, "unread", batch=8, steps=10_000)
  block = min(cfg.train.loss_block, setup.seq_len)
  return cfg.replace(
    data={"batch": rows, "seq_len": setup.seq_len},
    model={
      "vocab": setup.vocab,
      "remat": setup.remat,
      "attention": setup.attention,
    },
    train={"loss": loss, "loss_block": block},
  ).check()


def batch_of(cfg: config.Config) -> batch_lib.Batch:
  """Shapes of a step's batch."""
  length = cfg.data.seq_len + cfg.model.reach
  return batch_lib.abstract(cfg.data.batch, length)


def compiled(cfg: config.Config, mesh: jax.sharding.Mesh):
  """The training step and the bytes per device that it takes at most.

  (None, inf) where the compiler gives up for want of memory.
  """
  step = step_lib.compile_step(cfg, mesh)
  step = step.lower(step_lib.abstract_state(cfg, mesh), batch_of(cfg))
  try:
    step = step.compile()
  except jax.errors.JaxRuntimeError as error:
    _if_exhausted(error)
    return None, math.inf
  held = step.memory_analysis()
  return step, (
    held.argument_size_in_bytes
    + held.temp_size_in_bytes
    + held.output_size_in_bytes
    - held.alias_size_in_bytes  # the state's buffers, donated
  )


def executed_flops(cfg: config.Config) -> float:
  """FLOPs of a token: the model's, and those of rematerialising the trunk.

  Whole layers run forward once more under 'full', attention alone under
  'dots'; heads are not rematerialised by the serial loss.
  """
  shape = cfg.model
  layer = model.count_parameters(shape)["layers"] / (
    shape.trunk_layers + shape.head_layers
  )
  attention = 2 * cfg.data.seq_len * shape.width
  again = {"none": 0, "dots": attention, "full": 2 * layer + attention}
  known = cost.flops_per_token(shape, cfg.data.seq_len)
  return known + shape.trunk_layers * again[shape.remat]


def program(
  setup: Setup, size: str, n: int, loss: str, mesh: jax.sharding.Mesh
) -> Program:
  """Compiles a step; its row has FLOPs per token, and GiB per device."""
  cfg = settings(setup, size, n, loss, setup.rows * mesh.size)
  step, held = compiled(cfg, mesh)
  row = {
    "size": size,
    "n": n,
    "loss": loss,
    "rows": cfg.data.batch,
    "model_flops": cost.flops_per_token(cfg.model, cfg.data.seq_len),
    "executed_flops": executed_flops(cfg),
  }
  if step:
    row["gib"] = round(held / aot.GIB, 3)
  return Program(cfg, step, row)


def states(
  programs: Sequence[Program], mesh: jax.sharding.Mesh
) -> dict[int, step_lib.State]:
  """A fresh state per n, on the host: the device would not hold them all."""
  first = {p.row["n"]: p.cfg for p in reversed(programs)}
  return {
    n: jax.device_get(step_lib.init_state(cfg, mesh))
    for n, cfg in first.items()
  }


def turns(
  programs: Sequence[Program],
  held: dict[int, step_lib.State],
  setup: Setup,
  mesh: jax.sharding.Mesh,
) -> Iterator[None]:
  """Times all programs in alternating turns and writes their rows.

  Rows are up to date after each round, when this yields. A program that finds
  no room when it runs drops out, with the figures that it has.

  Args:
    programs: those of a size, with equal n beside each other.
    held: from `states`.
    setup: how often.
    mesh: all devices.

  Raises:
    ValueError: a loss that is not finite.
  """
  times, open_ = [[] for _ in programs], [bool(p.step) for p in programs]
  for _ in range(setup.rounds):
    n, state = None, None
    for i, each in enumerate(programs):
      if not open_[i]:
        continue
      if n != each.row["n"]:
        n, state = each.row["n"], None  # freed before the next one comes
        state, batch = _placed(held[n], _batch(each.cfg), mesh)
      try:
        state, found = each.step(state, batch)
        jax.block_until_ready(found)
        begin = time.perf_counter()
        for _ in range(setup.steps):
          state, found = each.step(state, batch)
        jax.block_until_ready(found)
      except jax.errors.JaxRuntimeError as error:
        _if_exhausted(error)
        open_[i], n = False, None
        continue
      times[i].append((time.perf_counter() - begin) / setup.steps)
      if not math.isfinite(found["loss"]):
        raise ValueError(f"{each.row}: the loss is {found['loss']}")
      each.row |= _rates(each, times[i], mesh)
    yield


def most_rows(
  row: dict,
  state: step_lib.State,
  setup: Setup,
  mesh: jax.sharding.Mesh,
  limit: float,
  *,
  build: Callable = compiled,
) -> int:
  """The most rows of all devices together; see `largest.most_rows`.

  Args:
    row: of a `Program`.
    state: on the host, from `states`.
    setup: its tokens per row and kernels.
    mesh: all devices.
    limit: bytes of one of them.
    build: `compiled`, or what does the same and may raise to end the search.
  """
  best = 0, None  # the largest program that fits so far

  def of(count):
    count *= mesh.size
    return settings(setup, row["size"], row["n"], row["loss"], count)

  def needed(count):
    nonlocal best
    step, held = build(of(count), mesh)
    if held <= limit and count > best[0]:
      best = count, step
    return held

  count = largest.most_rows(needed, limit)
  while count:
    if count != best[0]:
      best = 0, None
      needed(count)
    try:
      jax.block_until_ready(best[1](*_placed(state, _batch(of(count)), mesh)))
      break
    except jax.errors.JaxRuntimeError as error:
      _if_exhausted(error)
    count = min(count - 1, count * 15 // 16)
  return count * mesh.size


def _rates(each, taken, mesh) -> dict:
  """Seconds of a step, and what follows from them."""
  tokens = each.cfg.data.batch * each.cfg.data.seq_len
  tokens /= statistics.median(taken)
  found = timing.spread(taken) | {"tokens_per_second": tokens}
  if peak := cost.peak_flops(list(mesh.devices.flat)):
    found["flop_utilisation"] = tokens * each.row["model_flops"] / peak
  return found


def _batch(cfg):
  shape = batch_of(cfg).tokens.shape
  tokens = np.random.default_rng(0).integers(0, cfg.model.vocab, shape)
  return batch_lib.of(tokens.astype(np.int32))


def _placed(state, batch, mesh):
  where = sharding.shardings(state, mesh), sharding.batch_sharding(mesh)
  return jax.device_put((state, batch), where)


def _if_exhausted(error):
  """Raises `error` unless its cause is a lack of memory."""
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error
