"""Does weight traffic stay behind compute when heads run one by one?

  python -m experiments.overlap.run

Compiles the training step at 0.3B for n = 1, 2, 4 at equal total layers, with
one row per chip and FSDP over 8 chips, and reads from each schedule what of
the collectives runs behind products and kernels and what the chip waits for.
About 10 minutes on two idle cores.
"""

import csv
import datetime
import importlib.metadata
import json
import pathlib

import jax
from absl import app, flags

from configs import sizes
from experiments import planning, program
from mtp_jax import config

FOLDER = pathlib.Path(__file__).parent
HEADS = (1, 2, 4)

# Bytes per second that a chip's links take in, all of them together, from
# the maker's data sheet.
LINKS = {"v5e": 200e9, "v5p": 600e9}

_SIZE = flags.DEFINE_enum("size", "0.3B", list(sizes.SIZES), "Of table S14.")
_SLICES = flags.DEFINE_list("slices", ["v5e:2x4", "v5p:2x2x2"], "TPU slices.")
_OUTPUT = flags.DEFINE_string("output", str(FOLDER), "Folder of the results.")


def settings(size: str, n_future: int, chips: int) -> config.Config:
  """The step that is compiled: one row of 4096 tokens per chip."""
  model = sizes.model(size, n_future)
  model.dtype, model.remat = "bfloat16", "full"
  return config.Config(
    model=model,
    data=config.Data(seq_len=4096, batch=chips),
    train=config.Train(loss_block=1024),
  ).check()


def line(size: str, n_future: int, slice_: str, chips: int) -> dict:
  """One program, told in a line."""
  plan = planning.training(settings(size, n_future, chips), slice_)
  by_part = {"heads": [], "rest": []}
  for c in plan.collectives:
    part = "heads" if c.part == "heads" else "rest"
    by_part[part].append(c)
  row = {"slice": slice_, "n": n_future, "step_flops": plan.flops}
  for part, found in by_part.items():
    total = sum(c.times * c.received for c in found)
    waited = sum(c.times * c.received for c in found if not c.hidden)
    row[f"{part}_mib"] = round(total / 2**20, 1)
    row[f"{part}_waited_mib"] = round(waited / 2**20, 1)
  waited = sum(c.times * c.received for c in plan.collectives if not c.hidden)
  compute = plan.flops / plan.peak_flops
  wait = waited / LINKS[slice_.split(":")[0]]
  return row | {
    "compute_ms": round(1e3 * compute, 3),  # at the chip's peak
    "wait_ms": round(1e3 * wait, 3),  # at the links' full rate
    "compile_s": round(plan.compiled.seconds),
  }


def verdicts(rows: list[dict]) -> dict[str, float]:
  """Growth of compute and wait together over growth of compute alone."""
  found = {}
  for slice_ in dict.fromkeys(row["slice"] for row in rows):
    mine = {row["n"]: row for row in rows if row["slice"] == slice_}
    for n in HEADS[1:]:
      work = mine[n]["step_flops"] / mine[1]["step_flops"]
      time = (mine[n]["compute_ms"] + mine[n]["wait_ms"]) / (
        mine[1]["compute_ms"] + mine[1]["wait_ms"]
      )
      found[f"{slice_} n={n}"] = round(time / work, 4)
  return found


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  rows = [
    line(_SIZE.value, n, slice_, 8) for slice_ in _SLICES.value for n in HEADS
  ]
  output = pathlib.Path(_OUTPUT.value)
  with (output / f"{_SIZE.value}.csv").open("w", newline="") as file:
    table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
  found = verdicts(rows)
  record = {
    "size": _SIZE.value,
    "step_over_flops": found,
    "date": datetime.date.today().isoformat(),
    "jax": jax.__version__,
    "libtpu": importlib.metadata.version("libtpu"),
  }
  text = json.dumps(record, indent=2)
  (output / f"{_SIZE.value}.json").write_text(f"{text}\n")
  for row in rows:
    print(row)
  print(found)


if __name__ == "__main__":
  program.start(main)
