"""Time, FLOP utilisation and memory of a training step, heads in three ways.

  python -m experiments.engineering.train_speed.run --sizes=0.3B,1.3B \\
    --output=experiments/engineering/train_speed/gpu.json

For sizes of the paper with n = 1, 2, 4 heads of equal total layers: the serial
loss, the formula, and scan + checkpoint, all of a size in alternating turns
over the same rows; then the most rows that fit the device for each. Runs on
all devices of this machine, FSDP over them.
"""

import jax
from absl import flags, logging

from experiments.engineering.train_speed import bounds
from experiments.measure import aot, steps, study
from experiments.startup import options, program
from mtp_jax import config, sharding

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
_OUTPUT = options.define_output("File of the results.")


def memory() -> float:
  """Bytes of a device that programs may use.

  Raises:
    ValueError: the device does not say, and --memory_gib is not given.
  """
  if _MEMORY.value:
    return _MEMORY.value * aot.GIB
  stats = jax.devices()[0].memory_stats() or {}
  if "bytes_limit" not in stats:
    raise ValueError(
      "this device does not report its memory: give --memory_gib"
    )
  return stats["bytes_limit"]


def main(_: list[str]) -> None:
  """Times the step with each kind of loss; results so far are kept as JSON."""
  path, limit = _OUTPUT.value, memory()
  options.make_room(path)
  mesh = sharding.make_mesh(config.Mesh())
  setup = steps.Setup(
    rows=_ROWS.value,
    seq_len=_SEQ_LEN.value,
    remat=_REMAT.value,
    rounds=_ROUNDS.value,
    steps=_STEPS.value,
  )
  result = study.provenance(seed=0) | {
    "seq_len": setup.seq_len,
    "remat": setup.remat,
    "memory_gib": limit / aot.GIB,
    "rows": [],
  }

  def save():  # what is known, before the next program may fail
    result["bounds"] = bounds.verdicts(result["rows"])
    study.write_json(path, result)

  for size in _SIZES.value:
    programs = []
    for n in map(int, _HEADS.value):
      for loss in _LOSSES.value:
        programs.append(steps.program(setup, size, n, loss, mesh))
        logging.info("%s", programs[-1].row)
    rows, states = [p.row for p in programs], steps.states(programs, mesh)
    for _ in steps.turns(programs, states, setup, mesh):
      pass
    del programs
    result["rows"] += rows
    save()
    for row in rows:
      row["most_rows"] = steps.most_rows(
        row, states[row["n"]], setup, mesh, limit
      )
      logging.info("%s", row)
      save()
  print(bounds.table(result["rows"]))
  for name, bound in result["bounds"].items():
    print(f"{name}: {bound}")


if __name__ == "__main__":
  program.start(main)
