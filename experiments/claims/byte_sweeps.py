"""One program and one report for claims that compare models of code.

A claim's `scales.runs(scale)` lists its runs, made by `python_models.run`, and
at scale `paper` by `paper_runs`. Its `__main__` is `start(scales.runs,
report.section)`; its `report.section` is the one here, or begins with it.
"""

import functools
import pathlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax

from configs.paper import base
from experiments.measure import plots, python_models, sweep, tidy
from experiments.startup import options, program
from mtp_jax import config, tokenizer
from mtp_jax.data import corpora

HEAD_1 = "bits_per_byte_1"
SPEED = "tokens_per_forward_greedy"
SCALES = (*python_models.SIZES, "paper")
COLUMNS = {HEAD_1: "bits per byte, head 1", SPEED: "tokens per forward"}


def start(
  runs: Callable[[str], list[sweep.Run]],
  section: Callable[[list[tidy.Row], pathlib.Path], str],
  names: Iterable[str] = SCALES,
) -> None:
  """The program of a claim: flags, its runs, its table.

  Args:
    runs: takes the name of a scale.
    section: of the claim's report, see `sweep.run_and_show`.
    names: of the claim's scales.
  """
  scale = options.define_scale(
    names, "cpu", "Size of the models, and of their training."
  )
  output = options.define_output("Folder that takes everything.")
  minutes = options.define_minutes()
  pattern = options.define_runs()
  join = options.define_processes()

  def main(_: list[str]) -> None:
    join()
    some = sweep.chosen(runs(scale.value), pattern.value)
    sweep.run_and_show(some, output.value, minutes.value, section)

  program.start(main)


def paper_runs(
  claim: str,
  family: types.ModuleType,
  names: Mapping[str, str],
  heads: tuple[int, ...] = (),
) -> list[sweep.Run]:
  """The paper's own runs, on the corpora that their configs name.

  Each chip has one row of a microbatch, as planned (`base.one_row_per_chip`).
  A run resumes only on as many chips as it began on.

  Args:
    claim: of the runs.
    family: of `configs.paper`.
    names: a run's name in the claim's tables -> its name in `family.RUNS`.
    heads: see `python_models.run`; numbers above a model's n are left out.
  """
  found = []
  for name, run in names.items():
    cfg = family.get_config(run).check()
    file = f"{family.__name__.replace('.', '/')}.py"
    measure = functools.partial(
      _figures, cfg, tuple(k for k in heads if k <= cfg.model.n_future)
    )
    found.append(
      sweep.Run(
        claim,
        name,
        {"config": f"{file}:{run}"},
        cfg.train.seed,
        measure,
        check=functools.partial(check, file, cfg),
      )
    )
  return found


def _figures(cfg, heads, folder):
  """`python_models.figures` of a run of the paper, on the chips that are here.

  They are counted when it begins, once the processes have joined.
  """
  cfg = base.one_row_per_chip(cfg, jax.device_count())
  yield from python_models.figures(cfg, folder, heads)


def check(file: str, cfg: config.Config) -> None:
  """Raises ValueError if a run of the paper could not begin here.

  Args:
    file: in which the config stands.
    cfg: the run's; its batch has to divide by the chips, and its corpus and
      tokenizer have to be there.
  """
  base.one_row_per_chip(cfg, jax.device_count())
  try:
    tokenizer.load(cfg.data.tokenizer)
    corpora.files(cfg.data)
  except ValueError as error:
    raise ValueError(f"{error}. {file} says what it reads") from error


def final(rows: Sequence[tidy.Row]) -> list[tidy.Row]:
  """The rows of each run's last evaluation, every metric once."""
  last = {(row.run, row.seed, row.metric): row for row in rows}
  return list(last.values())


def table(rows: Sequence[tidy.Row]) -> str:
  """Markdown: head 1's loss and speed of each run when it ended."""
  rows = [row for row in final(rows) if row.metric in COLUMNS]
  lines = plots.group(rows, lambda r: r.run, lambda r: COLUMNS[r.metric])
  return plots.table(lines, "model", "{:.3f}")


def section(rows: Sequence[tidy.Row], path: pathlib.Path) -> str:
  """Draws head 1's loss and the speed by training step; returns the table."""
  claim = rows[0].claim
  for metric, title in COLUMNS.items():
    kept = [row for row in rows if row.metric == metric]
    lines = plots.group(kept, lambda r: r.run, lambda r: r.step)
    name = "loss" if metric == HEAD_1 else "speed"
    picture = path.with_name(f"{path.stem}_{name}.png")
    plots.curves(picture, {claim: lines}, ("step", title))
  return table(rows)
