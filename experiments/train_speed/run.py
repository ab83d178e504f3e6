"""Time, FLOP utilisation and memory of a training step, heads in three ways.

  python -m experiments.train_speed.run --sizes=0.3B,1.3B \\
    --output=experiments/train_speed/gpu.json

For sizes of the paper with n = 1, 2, 4 heads of equal total layers: the serial
loss, the formula, and scan + checkpoint, all of a size in alternating turns
over the same rows; then the most rows that fit the device for each. Runs on
all devices of this machine, FSDP over them.
"""

import functools
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from configs.paper import base
from experiments import aot, program
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
_OUTPUT = flags.DEFINE_string(
  "output", None, "File of the results.", allow_override=True
)
flags.mark_flag_as_required("output")

# The bounds, and what they are about.
OVER_FLOPS = 1.03  # serial's step time over n = 1's, by the ratio of FLOPs
UTILISATION = 0.45  # of serial at 1.3B
ROWS_OVER_FORMULA = 3  # the most rows of serial over the formula's, n = 4


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


def most_rows(needed: Callable[[int], int], limit: float) -> int:
  """The most rows of which `needed(rows)` bytes are at most `limit`.

  Memory is nearly affine in rows, so a program or two beside the first two
  tell, where trying one count after another would compile dozens.

  Args:
    needed: bytes that a program for so many rows takes; rising.
    limit: bytes.

  Returns:
    Rows; 0 where a single one is too many.
  """
  known = functools.cache(needed)
  if known(1) > limit:
    return 0
  low, high = 1, 2  # low fits; high is the next to try
  tried = 1
  while True:
    if known(high) > limit:
      break
    per_row = max((known(high) - known(tried)) / (high - tried), 1)
    tried = low = high
    high = low + max(1, int((limit - known(low)) / per_row))
  while high - low > 1:
    per_row = (known(high) - known(low)) / (high - low)
    guess = low + int((limit - known(low)) / max(per_row, 1))
    guess = min(max(guess, low + 1), high - 1)
    low, high = (guess, high) if known(guess) <= limit else (low, guess)
  return low


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
  """On all devices: `most_rows` by the compiler, or fewer if they do not run."""

  def made(count):
    cfg = settings(size, row["n"], row["loss"], count * mesh.size)
    return cfg, *compiled(cfg, mesh)

  count = most_rows(lambda count: made(count)[2], limit)
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


def verdicts(rows: list[dict]) -> dict[str, dict]:
  """Each bound's figure beside it, where it was measured."""
  at = {(row["size"], row["n"], row["loss"]): row for row in rows}
  found = {}

  def add(name, figure, bound, at_most):
    met = figure <= bound if at_most else figure >= bound
    found[name] = {"figure": figure, "bound": bound, "met": met}

  for (size, n, loss), row in at.items():
    one, formula = at.get((size, 1, loss)), at.get((size, n, "formula"))
    if loss != "serial":
      continue
    if n > 1 and one:
      ratio = row["seconds"] / row["rows"] / (one["seconds"] / one["rows"])
      work = row["flops_per_token"] / one["flops_per_token"]
      name = f"{size}: step time over n=1's, by the ratio of FLOPs, n={n}"
      add(name, ratio / work, OVER_FLOPS, True)
    if size == "1.3B" and "flop_utilisation" in row:
      name = f"{size}: FLOP utilisation, n={n}"
      add(name, row["flop_utilisation"], UTILISATION, False)
    if n == 4 and formula and formula["most_rows"]:
      name = f"{size}: most rows over the formula's, n={n}"
      ratio = row["most_rows"] / formula["most_rows"]
      add(name, ratio, ROWS_OVER_FORMULA, False)
  return found


def table(rows: list[dict]) -> str:
  """The README's table."""
  lines = [
    "| size | n | loss | s per step | tokens/s | FLOP utilisation | GiB | "
    "most rows |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    use = row.get("flop_utilisation")
    lines.append(
      f"| {row['size']} | {row['n']} | {row['loss']} | {row['seconds']:.3f} | "
      f"{row['tokens_per_second']:,.0f} | {'' if use is None else f'{use:.3f}'}"
      f" | {row['gib']:.2f} | {row['most_rows']} |"
    )
  return "\n".join(lines)


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
    result["bounds"] = verdicts(result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
  print(table(result["rows"]))
  for name, entry in result["bounds"].items():
    mark = "met" if entry["met"] else "NOT MET"
    print(f"{name}: {entry['figure']:.3f} (bound {entry['bound']}): {mark}")


if __name__ == "__main__":
  program.start(main)
