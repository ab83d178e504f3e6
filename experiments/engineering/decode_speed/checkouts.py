"""Decoding passes of two checkouts, in alternating turns.

  git worktree add ../before 77ee73d
  python -m experiments.engineering.decode_speed.checkouts --before=../before \\
    --config=configs/decode_speed.py:smollm2 --output=runs/checkouts.json

Random weights. A pass reads a window of drafts behind --length tokens, asks
head 1 at every one of them and keeps none; heads that draft take no part. Last
comes a whole chunk of a prompt. Each checkout has a process; in each round both
time every window, one after the other, so that what else the machine does for
longer than a round is not in the ratios.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys

from absl import flags

from experiments.measure import study, timing
from experiments.startup import options, program
from mtp_jax import config
from mtp_jax.decode import window as window_lib

_CONFIG = options.define_config()
_BEFORE = options.define_path("before", None, "Checkout to compare with.")
_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Rows at once.")
_WIDTHS = flags.DEFINE_list("widths", ["1", "2", "4", "8", "16"], "Windows.")
_MOST = flags.DEFINE_integer("most", 128, "Tokens of a pass, all rows.")
_LENGTH = flags.DEFINE_integer("length", 256, "Tokens in the cache.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Turns of each.", lower_bound=1)
_OUTPUT = options.define_output("JSON file for the results.")
flags.mark_flag_as_required("before")


def main(_: list[str]) -> None:
  """Times both checkouts in alternating turns; prints and writes the ratios."""
  options.make_room(_OUTPUT.value)
  cfg = _CONFIG.value.check().model
  here = pathlib.Path(__file__).parents[3]
  folders = {"before": _BEFORE.value, "after": here}
  windows = [
    (b, w)
    for b in map(int, _BATCHES.value)
    for w in map(int, _WIDTHS.value)
    if b * w <= _MOST.value
  ]
  windows.append((1, window_lib.CHUNK))
  workers = {name: _start(folder, cfg) for name, folder in folders.items()}
  rows = [
    {"batch": b, "width": w, "seconds": {name: [] for name in workers}}
    for b, w in windows
  ]
  result = study.provenance(seed=0) | {"length": _LENGTH.value}
  for turn in range(_ROUNDS.value + 1):  # the first one compiles
    for row in rows:
      for name, worker in workers.items():
        seconds = _ask(worker, row["batch"], row["width"])
        row["seconds"][name] += [seconds] * (turn > 0)
    if turn:
      study.write_json(_OUTPUT.value, result | {"rows": rows})
  for worker in workers.values():
    worker.stdin.close()
    worker.wait()
  print(table(rows))


def table(rows: list[dict]) -> str:
  """Markdown: medians, and the medians of the rounds' ratios."""
  lines = [
    "| batch | window | before, ms | after, ms | after / before "
    "| of the fastest turns | after, in first-row passes before "
    "| of the fastest turns |",
    "|---|---|---|---|---|---|---|---|",
  ]
  one = rows[0]["seconds"]["before"]
  for row in rows:
    before, after = row["seconds"]["before"], row["seconds"]["after"]
    a, b = statistics.median(before), statistics.median(after)
    lines.append(
      f"| {row['batch']} | {row['width']} | {a * 1e3:.1f} | {b * 1e3:.1f} "
      f"| {timing.median_ratio(after, before):.2f} "
      f"| {min(after) / min(before):.2f} "
      f"| {timing.median_ratio(after, one):.2f} | {min(after) / min(one):.2f} |"
    )
  return "\n".join(lines)


def _start(folder, cfg) -> subprocess.Popen:
  # The other checkout may lack newer fields, whose default is what it does.
  usual = dataclasses.asdict(config.Model())
  given = {k: v for k, v in dataclasses.asdict(cfg).items() if v != usual[k]}
  given = json.dumps(given | {"length": _LENGTH.value})
  # By its path, since the other checkout may not have it.
  return subprocess.Popen(
    [sys.executable, pathlib.Path(__file__).with_name("passes.py"), given],
    env=os.environ | {"PYTHONPATH": str(folder)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def _ask(worker, batch: int, width: int) -> float:
  worker.stdin.write(f"{batch} {width}\n")
  worker.stdin.flush()
  return float(worker.stdout.readline())


if __name__ == "__main__":
  program.start(main)
