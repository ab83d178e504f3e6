"""Time, FLOP utilisation and memory of a training step, heads in three ways.

  python -m experiments.train_speed.run --sizes=0.3B,1.3B \\
    --output=experiments/train_speed/gpu.json

For sizes of the paper with n = 1, 2, 4 heads of equal total layers: the serial
loss, the formula, and scan + checkpoint, all of a size in alternating turns
over the same rows; then the most rows that fit the device for each. Runs on
all devices of this machine, FSDP over them.
"""

import json
import math
import statistics
import time

import jax
import numpy as np
from absl import flags, logging

from configs.paper import base
from experiments import aot, program
from experiments.train_speed import bounds
from mtp_jax import config, metrics, sharding, train
from mtp_jax.model import model

_SIZES = flags.DEFINE_list("sizes", ["0.3B", "1.3B"], "Of configs/sizes.py.")
_HEADS = flags.DEFINE_list("heads", ["1", "2", "4"], "n, heads of a model.")
_LOSSES = flags.DEFINE_list("losses", list(config.LOSSES), "To compare.")
_ROWS = flags.DEFINE_integer("rows", 2, "Per device, timed.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 4096, "Tokens of a row.")
_REMAT = flags.DEFINE_enum("remat", "full", config.REMAT_POLICIES, "Layers'.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 3, "Of a turn, timed.", lower_bound=1)
_MEMORY = flags.DEFINE_float(
  "memory_gib", None, "Per device; without it what the device says."
)
_OUTPUT = program.define_path("output", None, "File of the results.")
flags.mark_flag_as_required("output")


def settings(size: str, n: int, loss: str, rows: int) -> config.Config:
  """A size of the paper in one microbatch of `rows` rows on all devices."""
  cfg = base.run(size, n, "unread", batch=8, steps=10_000)
  cfg.data.batch, cfg.data.seq_len = rows, _SEQ_LEN.value
  cfg.model.remat = _REMAT.value
  cfg.train.loss = loss
  cfg.train.loss_block = min(cfg.train.loss_block, cfg.data.seq_len)
  return cfg.check()


def batch_of(cfg: config.Config) -> dict:
  """Shapes of a step's batch."""
  shape = cfg.data.batch, cfg.data.seq_len + cfg.model.n_future
  tokens = jax.ShapeDtypeStruct(shape, np.int32)
  return {"tokens": tokens, "segments": tokens}


def compiled(cfg: config.Config, mesh: jax.sharding.Mesh):
  """The training step and the bytes per device that it takes at most.

  (None, inf) where the compiler gives up for want of memory.
  """
  step = train.compile_step(cfg, mesh)
  step = step.lower(train.abstract_state(cfg, mesh), batch_of(cfg))
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
  """Of a token: the model's, and what rematerialising the trunk adds.

  Whole layers run forward once more under 'full', attention alone under
  'dots'; heads are not rematerialised by the serial loss.
  """
  shape = cfg.model
  layer = model.count_parameters(shape)["layers"] / (
    shape.trunk_layers + shape.head_layers
  )
  attention = 2 * cfg.data.seq_len * shape.width
  again = {"none": 0, "dots": attention, "full": 2 * layer + attention}
  known = metrics.flops_per_token(shape, cfg.data.seq_len)
  return known + shape.trunk_layers * again[shape.remat]


def timed(size: str, mesh: jax.sharding.Mesh) -> tuple[list[dict], dict]:
  """A row per n and loss with its seconds, and a state on the host per n."""
  rows, programs, states, batches = [], [], {}, {}
  for n in map(int, _HEADS.value):
    for loss in _LOSSES.value:
      cfg = settings(size, n, loss, _ROWS.value * mesh.size)
      step, held = compiled(cfg, mesh)
      rows.append(
        {
          "size": size,
          "n": n,
          "loss": loss,
          "rows": cfg.data.batch,
          "model_flops": metrics.flops_per_token(cfg.model, cfg.data.seq_len),
          "executed_flops": executed_flops(cfg),
        }
      )
      if step:
        rows[-1]["gib"] = round(held / aot.GIB, 3)
      programs.append(step)
      logging.info("%s", rows[-1])
    # On the host: the states of all n would not fit beside one another.
    states[n] = jax.device_get(train.init_state(cfg, mesh))
    batches[n] = _batch(cfg)
  times = _turns(rows, programs, states, batches, mesh)
  for row, taken in zip(rows, times, strict=True):
    if taken:
      row["seconds"] = statistics.median(taken)
      row["least_seconds"], row["most_seconds"] = min(taken), max(taken)
      tokens = row["rows"] * _SEQ_LEN.value
      row["tokens_per_second"] = tokens / row["seconds"]
      if peak := metrics.peak_flops(list(mesh.devices.flat)):
        work = row["tokens_per_second"] * row["model_flops"]
        row["flop_utilisation"] = work / peak
  return rows, states


def most_rows(row: dict, state, mesh: jax.sharding.Mesh, limit: float) -> int:
  """On all devices: what `bounds.most_rows` finds, or fewer if it does not run.

  Args:
    row: from `timed`.
    state: on the host.
    mesh: all devices.
    limit: bytes of one of them.
  """
  best = 0, None  # the largest program that fits so far

  def needed(count):
    nonlocal best
    cfg = settings(row["size"], row["n"], row["loss"], count * mesh.size)
    step, held = compiled(cfg, mesh)
    if held <= limit and count > best[0]:
      best = count, step
    return held

  count = bounds.most_rows(needed, limit)
  while count:
    if count != best[0]:
      best = 0, None
      needed(count)
    cfg = settings(row["size"], row["n"], row["loss"], count * mesh.size)
    try:
      jax.block_until_ready(best[1](*_placed(state, _batch(cfg), mesh)))
      break
    except jax.errors.JaxRuntimeError as error:
      _if_exhausted(error)
    count = min(count - 1, count * 15 // 16)
  return count * mesh.size


def _batch(cfg):
  shape = batch_of(cfg)["tokens"].shape
  tokens = np.random.default_rng(0).integers(0, cfg.model.vocab, shape)
  return {
    "tokens": tokens.astype(np.int32),
    "segments": np.ones(shape, np.int32),
  }


def _placed(state, batch, mesh):
  where = sharding.shardings(state, mesh), sharding.batch_sharding(mesh)
  return jax.device_put((state, batch), where)


def _turns(rows, programs, states, batches, mesh) -> list[list[float]]:
  """Seconds of a step of each program, a figure per round; none: no room."""
  times = [[] for _ in rows]
  for _ in range(_ROUNDS.value):
    state, held = None, None
    for i, (row, step) in enumerate(zip(rows, programs, strict=True)):
      if step is None:
        continue
      if held != row["n"]:
        held, state = row["n"], None  # freed before the next one comes
        state, batch = _placed(states[held], batches[held], mesh)
      try:
        state, found = step(state, batch)
        jax.block_until_ready(found)
        begin = time.perf_counter()
        for _ in range(_STEPS.value):
          state, found = step(state, batch)
        jax.block_until_ready(found)
      except jax.errors.JaxRuntimeError as error:
        _if_exhausted(error)
        programs[i], held = None, None
        continue
      times[i].append((time.perf_counter() - begin) / _STEPS.value)
      if not math.isfinite(found["loss"]):
        raise ValueError(f"{row}: the loss is {found['loss']}")
  return times


def _if_exhausted(error):
  """Raises `error` unless it tells of too little memory."""
  if "RESOURCE_EXHAUSTED" not in str(error):
    raise error


def memory() -> float:
  """Bytes of a device that programs may use.

  Raises:
    ValueError: the device does not say, and --memory_gib is not given.
  """
  if _MEMORY.value:
    return _MEMORY.value * aot.GIB
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" not in stats:
    raise ValueError("this device does not tell its memory: give --memory_gib")
  return stats["bytes_limit"]


def main(_: list[str]) -> None:
  path, limit = _OUTPUT.value, memory()
  program.make_room(path)
  mesh = sharding.make_mesh(config.Mesh())
  result = {
    "machine": program.machine(),
    "seq_len": _SEQ_LEN.value,
    "remat": _REMAT.value,
    "memory_gib": limit / aot.GIB,
    "rows": [],
  }

  def save():  # what is known, before the next program may fail
    result["bounds"] = bounds.verdicts(result["rows"])
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

  for size in _SIZES.value:
    rows, states = timed(size, mesh)
    result["rows"] += rows
    save()
    for row in rows:
      row["most_rows"] = most_rows(row, states[row["n"]], mesh, limit)
      logging.info("%s", row)
      save()
  print(bounds.table(result["rows"]))
  for name, entry in result["bounds"].items():
    mark = "met" if entry["met"] else "NOT MET"
    print(f"{name}: {entry['figure']} (bound {entry['bound']}): {mark}")


if __name__ == "__main__":
  program.start(main)
