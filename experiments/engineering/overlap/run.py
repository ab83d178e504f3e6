"""Does weight traffic stay behind compute when heads run one by one?

  python -m experiments.engineering.overlap.run

Compiles the training step at 0.3B for n = 1, 2, 4 at equal total layers, with
one row per chip and FSDP over 8 chips, and reads from each schedule what of
the collectives runs behind products and kernels and what the chip waits for.
13 minutes of compiling, on cores shared with other work.
"""

import pathlib

from absl import flags

from configs import sizes
from experiments.measure import planning, steps, study
from experiments.startup import options, program

FOLDER = pathlib.Path(__file__).with_name("results")
HEADS = (1, 2, 4)
CHIPS = 8  # of each slice, with one row of 4096 tokens each
OVER_FLOPS = 1.03  # growth of compute and wait over growth of compute alone

# Bytes per second that a chip's links take in, all of them together, from
# the maker's data sheet.
LINKS = {"v5e": 200e9, "v5p": 600e9}

_SIZE = flags.DEFINE_enum("size", "0.3B", list(sizes.SIZES), "Of table S14.")
_SLICES = flags.DEFINE_list("slices", ["v5e:2x4", "v5p:2x2x2"], "TPU slices.")
_OUTPUT = options.define_output("Folder of the results.", str(FOLDER))


def line(plan: planning.Plan, n_future: int) -> dict:
  """The figures of one program, a row of the table."""
  row = {"slice": plan.topology, "n": n_future, "step_flops": plan.flops}
  waited = 0
  for part in ("heads", "rest"):
    mine = [
      c for c in plan.collectives if (c.part == "heads") == (part == "heads")
    ]
    total = sum(c.times * c.received for c in mine)
    here = sum(c.times * c.received for c in mine if not c.hidden)
    row[f"{part}_mib"] = round(total / 2**20, 1)
    row[f"{part}_waited_mib"] = round(here / 2**20, 1)
    waited += here
  links = LINKS[plan.topology.split(":")[0]]
  return row | {
    "compute_ms": round(1e3 * plan.flops / plan.peak_flops, 3),  # at the peak
    "wait_ms": round(1e3 * waited / links, 3),  # at the links' full rate
    "compile_s": round(plan.compiled.seconds),
  }


def details(plan: planning.Plan) -> list[dict]:
  """What the heads' loop receives, and what runs while it is under way."""
  return [
    {
      "slice": plan.topology,
      "kind": c.kind,
      "times": c.times,
      "received_kib": round(c.received / 1024),
      "products_and_kernels_meanwhile": c.behind,
    }
    for c in plan.collectives
    if c.part == "heads"
  ]


def verdicts(rows: list[dict]) -> dict[str, study.Bound]:
  """Growth of compute and wait together over growth of compute alone."""
  found = {}
  for slice_ in dict.fromkeys(row["slice"] for row in rows):
    mine = {row["n"]: row for row in rows if row["slice"] == slice_}
    for n in HEADS[1:]:
      work = mine[n]["step_flops"] / mine[1]["step_flops"]
      time = (mine[n]["compute_ms"] + mine[n]["wait_ms"]) / (
        mine[1]["compute_ms"] + mine[1]["wait_ms"]
      )
      found[f"{slice_} n={n}"] = study.Bound.at_most(time / work, OVER_FLOPS)
  return found


def main(_: list[str]) -> None:
  """Compiles the step for each slice and number of heads; writes the tables."""
  options.make_room(_OUTPUT.value / f"{_SIZE.value}.csv")
  rows, heads = [], []
  for slice_ in _SLICES.value:
    for n in HEADS:
      plan = planning.training(
        steps.settings(steps.Setup(), _SIZE.value, n, "serial", CHIPS), slice_
      )
      rows.append(line(plan, n))
    heads += details(plan)  # of the most heads
  output = _OUTPUT.value
  study.write_csv(output / f"{_SIZE.value}.csv", rows)
  study.write_csv(output / f"{_SIZE.value}_heads.csv", heads)
  result = study.provenance() | {"size": _SIZE.value, "bounds": verdicts(rows)}
  study.write_json(output / f"{_SIZE.value}.json", result)
  for row in rows:
    print(row)
  for name, bound in result["bounds"].items():
    print(f"{name}: {bound}")


if __name__ == "__main__":
  program.start(main)
