"""Which slice holds each training run of the paper, asked of the compiler.

  python -m experiments.engineering.paper_plans.run

Compiles the training step of every run in configs/paper ahead of time for
slices of growing size until it fits, and once more with the formula's loss on
the slice found. One row of T tokens per chip and microbatch, so a run's batch
does not count: runs that differ in nothing else share a line. Lines already
in the results are not compiled again. One to four minutes a line.
"""

import importlib
import json
import pathlib

from absl import logging

from configs.paper import base
from experiments.measure import aot, planning, study
from experiments.startup import options, program
from mtp_jax import config, sharding
from mtp_jax.train import step

FOLDER = pathlib.Path(__file__).with_name("results")
FAMILIES = (
  "scaling",
  "bytes_7b",
  "code_7b",
  "language_7b",
  "induction",
  "arithmetic",
  "summarisation",
  "codecontests",
  "llama2_heads",
)
SLICES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16")  # of v5e chips

FIRST = (  # what a bound is about
  "scaling:13B-n1",
  "scaling:13B-n4",
  "bytes_7b:7B-n1",
  "bytes_7b:7B-n32",
  "scaling:6.7B-n1",
  "scaling:6.7B-n4",
)

_RESULTS = options.define_path(
  "results", str(FOLDER / "v5e.csv"), "File that takes a line per program."
)


def runs() -> dict[str, config.Config]:
  """Every run of the paper: 'scaling:13B-n4' -> its config."""
  found = {}
  for family in FAMILIES:
    module = importlib.import_module(f"configs.paper.{family}")
    for name in module.RUNS:
      found[f"{family}:{name}"] = module.get_config(name).check()
  return found


def distinct(runs: dict[str, config.Config]) -> dict[str, list[str]]:
  """Runs by the first of them that takes the same memory."""
  first, groups = {}, {}
  for name, cfg in runs.items():
    key = cfg.model, cfg.data.seq_len
    groups.setdefault(first.setdefault(key, name), []).append(name)
  return groups


def plausible(cfg: config.Config, name: str) -> bool:
  """Whether parameters, moments and gradients alone leave room."""
  devices = aot.topology(f"v5e:{name}")
  mesh = sharding.make_mesh(config.Mesh(), devices)
  state = step.abstract_state(cfg, mesh)
  held = aot.bytes_per_chip(state) + 2 * aot.bytes_per_chip(state.model)
  return held < aot.HBM[devices[0].device_kind] * aot.GIB


def line(name: str, cfg: config.Config, slice_: str, loss: str) -> dict:
  """The plan of `cfg` with a loss on a slice, as a row of the CSV file."""
  chips = len(aot.topology(f"v5e:{slice_}"))
  cfg = base.one_row_per_chip(cfg, chips).replace(train={"loss": loss})
  made = planning.training(cfg, f"v5e:{slice_}")
  state = {k: round(v / aot.GIB, 3) for k, v in made.state.items()}
  return {
    "run": name,
    "slice": made.topology,
    "loss": loss,
    "fits": made.fits,
    "peak_gib": round(made.needed / aot.GIB, 3),
    "hbm_gib": round(made.hbm / aot.GIB, 2),
    "parameters_gib": state["parameters"],
    "optimiser_gib": state["optimiser state"],
    "temporaries_gib": round(made.compiled.temporaries / aot.GIB, 3),
    "microbatches": cfg.train.accumulate,
    "step_flops": made.flops,
    "compile_s": round(made.compiled.seconds),
    **study.stamp("jax", "libtpu"),
  }


def main(_: list[str]) -> None:
  """Plans every distinct run; what the results hold already is skipped."""
  path = _RESULTS.value
  every = runs()
  groups = distinct(every)
  first = [name for name in FIRST if name in groups]
  for name in [*first, *(name for name in groups if name not in first)]:
    slice_ = smallest(path, name, every[name])
    planned(path, name, every[name], slice_, "formula")


def smallest(path: pathlib.Path, name: str, cfg: config.Config) -> str:
  """The first slice that holds `cfg` with the serial loss."""
  for slice_ in SLICES:
    if plausible(cfg, slice_):
      if planned(path, name, cfg, slice_, "serial")["fits"] == "True":
        return slice_
  raise ValueError(f"{name} fits none of the slices {', '.join(SLICES)}")


def planned(path, name, cfg, slice_, loss) -> dict[str, str]:
  """The line of a program: from the results, or planned now and added."""
  key = name, f"v5e:{slice_}", loss
  rows = study.read_csv(path)
  for row in rows:
    if (row["run"], row["slice"], row["loss"]) == key:
      return row
  row = line(name, cfg, slice_, loss)
  logging.info("%s", json.dumps(row))
  study.write_csv(path, [*rows, row])
  return study.read_csv(path)[-1]


if __name__ == "__main__":
  program.start(main)
