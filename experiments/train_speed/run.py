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
import pathlib
import statistics
import time

import jax
import numpy as np
from absl import app, flags

from configs.paper import base
from experiments import aot, program
from experiments.train_speed import bounds
from mtp_jax import config, metrics, sharding, train

_SIZES = flags.DEFINE_list("sizes", ["0.3B", "1.3B"], "Of configs/sizes.py.")
_HEADS = flags.DEFINE_list("heads", ["1", "2", "4"], "n, 1 first.")
_LOSSES = flags.DEFINE_list("losses", list(config.LOSSES), "To compare.")
_ROWS = flags.DEFINE_integer("rows", 2, "Per device, timed.", lower_bound=1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 4096, "Tokens of a row.")
_REMAT = flags.DEFINE_enum("remat", "full", config.REMAT_POLICIES, "Layers'.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns of each.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 3, "Of a turn, timed.", lower_bound=1)
_MEMORY = flags.DEFINE_float(
  "memory_gib", None, "Per device; without it what the device says."
)
_OUTPUT = flags.DEFINE_string("output", None, "File of the results.")
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
  """The training step and the bytes per device that it takes at most."""
  step = train.compile_step(cfg, mesh)
  step = step.lower(train.abstract_state(cfg, mesh), batch_of(cfg)).compile()
  held = step.memory_analysis()
  return step, (
    held.argument_size_in_bytes
    + held.temp_size_in_bytes
    + held.output_size_in_bytes
    - held.alias_size_in_bytes  # the state's buffers, donated
  )


def measure(size: str, limit: float) -> list[dict]:
  """A row per n and loss."""
  devices = jax.devices()
  mesh = sharding.make_mesh(config.Mesh(), devices)
  rows, programs, states, batches = [], [], {}, {}
  for n in map(int, _HEADS.value):
    for loss in _LOSSES.value:
      cfg = settings(size, n, loss, _ROWS.value * len(devices))
      step, held = compiled(cfg, mesh)
      rows.append(
        {
          "size": size,
          "n": n,
          "loss": loss,
          "rows": cfg.data.batch,
          "flops_per_token": metrics.flops_per_token(
            cfg.model, cfg.data.seq_len
          ),
          "gib": round(held / aot.GIB, 3),
        }
      )
      programs.append(step)
      print(rows[-1], flush=True)
    # On the host: the states of all n would not fit beside one another.
    states[n] = jax.device_get(train.init_state(cfg, mesh))
    shape = batch_of(cfg)["tokens"].shape
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab, shape)
    batches[n] = {
      "tokens": tokens.astype(np.int32),
      "segments": np.ones(shape, np.int32),
    }
  for row, times in zip(
    rows, _turns(rows, programs, states, batches, mesh), strict=True
  ):
    row["seconds"] = statistics.median(times)
    row["least_seconds"], row["most_seconds"] = min(times), max(times)
    tokens = row["rows"] * _SEQ_LEN.value
    row["tokens_per_second"] = tokens / row["seconds"]
    if peak := metrics.peak_flops(devices):
      work = row["tokens_per_second"] * row["flops_per_token"]
      row["flop_utilisation"] = work / peak
  del programs
  for row in rows:
    row["most_rows"] = _most_rows(size, row, states[row["n"]], mesh, limit)
    print(row, flush=True)
  return rows


def _most_rows(size, row, state, mesh, limit) -> int:
  """On all devices: `bounds.most_rows` by the compiler, or fewer if they do not run."""

  def made(count):
    cfg = settings(size, row["n"], row["loss"], count * mesh.size)
    return cfg, *compiled(cfg, mesh)

  count = bounds.most_rows(lambda count: made(count)[2], limit)
  while count:
    cfg, step, _ = made(count)
    batch = jax.tree.map(lambda a: np.ones(a.shape, a.dtype), batch_of(cfg))
    try:
      jax.block_until_ready(step(*_placed(state, batch, mesh)))
      break
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
    count -= 1
  return count * mesh.size


def _placed(state, batch, mesh):
  where = sharding.shardings(state, mesh), sharding.batch_sharding(mesh)
  return jax.device_put((state, batch), where)


def _turns(rows, programs, states, batches, mesh) -> list[list[float]]:
  """Seconds of a step of each program, a figure per round."""
  times = [[] for _ in rows]
  for _ in range(_ROUNDS.value):
    state, held = None, None
    for row, step, taken in zip(rows, programs, times, strict=True):
      if held != row["n"]:
        held = row["n"]
        del state  # before the next one comes
        state, batch = _placed(states[held], batches[held], mesh)
      state, found = step(state, batch)
      jax.block_until_ready(found)
      begin = time.perf_counter()
      for _ in range(_STEPS.value):
        state, found = step(state, batch)
      jax.block_until_ready(found)
      taken.append((time.perf_counter() - begin) / _STEPS.value)
      if not math.isfinite(found["loss"]):
        raise ValueError(f"{row}: the loss is {found['loss']}")
  return times


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


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  path, limit = pathlib.Path(_OUTPUT.value), memory()
  result = {
    "machine": program.machine(),
    "seq_len": _SEQ_LEN.value,
    "remat": _REMAT.value,
    "memory_gib": limit / aot.GIB,
    "rows": [],
  }
  for size in _SIZES.value:
    result["rows"] += measure(size, limit)
    result["bounds"] = bounds.verdicts(result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
  print(bounds.table(result["rows"]))
  for name, entry in result["bounds"].items():
    mark = "met" if entry["met"] else "NOT MET"
    print(f"{name}: {entry['figure']:.3f} (bound {entry['bound']}): {mark}")


if __name__ == "__main__":
  program.start(main)
