"""Stage 3: training steps, against their FLOPs and the device's memory."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax

from experiments.engineering.accelerator import exactness, record, scales
from experiments.engineering.train_speed import bounds
from experiments.measure import aot, steps
from mtp_jax import config, sharding
from mtp_jax.train import step as step_lib


class OutOfTime(Exception):
  """The search for the largest batch ends here."""


def run(stage: record.Stage, scale: scales.Scale) -> None:
  """Each size's steps in turns, then its largest batches."""
  mesh = sharding.make_mesh(config.Mesh())
  kernel, limit = exactness.working_attention(stage, scale), memory(scale)
  for part in scale.training:
    programs, states = [], {}
    heads = " and ".join(map(str, sorted({n for n, _ in part.programs})))
    for attention in dict.fromkeys((kernel, "xla")):
      setup = dataclasses.replace(part.setup, attention=attention)
      work = dataclasses.replace(part, setup=setup)
      name = f"{work.size}, n={heads}, {attention} attention"
      stage.attempt(
        f"{name}: programs",
        functools.partial(build, work, mesh, programs),
        kind=f"{work.size}: programs",
        estimate=30,
      )
      if programs or f"{name}: programs" in stage.section["left_out"]:
        break
    if not programs:
      continue
    stage.attempt(
      f"{name}: steps",
      functools.partial(turns, work, programs, states, mesh),
      kind=f"{work.size}: steps",
      estimate=20,
    )
    rows = {(p.row["n"], p.row["loss"]): p.row for p in programs}
    programs.clear()
    for n, loss in work.largest if limit else ():
      if (n, loss) in rows and n in states:
        stage.attempt(
          f"{name}: most rows, n={n}, {loss}",
          functools.partial(
            largest, stage, work, rows[n, loss], states[n], mesh, limit
          ),
          kind=f"{work.size}: most rows",
          estimate=20,
        )


def memory(scale: scales.Scale) -> float | None:
  """Bytes of a device that programs may use, where it is known."""
  if scale.memory:
    return scale.memory * aot.GIB
  return record.device()["bytes_limit"]


def build(
  work: scales.Training,
  mesh: jax.sharding.Mesh,
  programs: list[steps.Program],
) -> dict:
  """Compiles all steps side by side into `programs`; returns their rows."""
  found = record.together(
    {
      (n, loss): functools.partial(
        steps.program, work.setup, work.size, n, loss, mesh
      )
      for n, loss in work.programs
    }
  )
  rows = {}
  for (n, loss), each in found.items():
    if isinstance(each, Exception):
      rows[f"n={n}, {loss}"] = {"failed": record.reason(each)}
    else:
      rows[f"n={n}, {loss}"] = dict(each.row)
      programs.append(each)
  if not programs:
    raise ValueError(f"no step compiles: {rows}")
  return rows


def turns(
  work: scales.Training,
  programs: list[steps.Program],
  states: dict[int, step_lib.State],
  mesh: jax.sharding.Mesh,
) -> Iterator[dict]:
  """Rows and verdicts after each round; keeps a state per n in `states`."""
  states |= steps.states(programs, mesh)
  rows = [p.row for p in programs]
  for _ in steps.turns(programs, states, work.setup, mesh):
    yield {
      "remat": work.setup.remat,
      "tokens_of_a_row": work.setup.seq_len,
      "attention": work.setup.attention,
      "rows": rows,
      "bounds": bounds.verdicts(rows),
    }


def largest(
  stage: record.Stage,
  work: scales.Training,
  row: dict,
  state: step_lib.State,
  mesh: jax.sharding.Mesh,
  limit: float,
) -> Iterator[dict]:
  """The most rows that fit, or between which numbers the search ended.

  By the memory that the compiler tells, as in `train_speed`; the largest is
  then run. What the search asks for first is compiled side by side. Later
  programs are expected to take as long as the longest of them so far.
  """
  found = {"limit_gib": limit / aot.GIB, "fits": 0, "does_not_fit": None}
  found["gib"], slowest = {}, 0.0
  yield found  # what follows changes it
  ready = record.together(
    {
      cfg.data.batch: functools.partial(steps.compiled, cfg, mesh)
      for cfg in (
        steps.settings(
          work.setup, work.size, row["n"], row["loss"], count * mesh.size
        )
        for count in work.first
      )
    }
  )

  def compiled(cfg, mesh):
    nonlocal slowest
    rows = cfg.data.batch
    if isinstance(ready.get(rows), tuple):
      step, needed = ready.pop(rows)
    else:
      if slowest > stage.left:
        raise OutOfTime
      before = stage.left
      step, needed = steps.compiled(cfg, mesh)
      slowest = max(slowest, before - stage.left)
    if needed <= limit:
      found["fits"] = max(found["fits"], rows)
    else:
      found["does_not_fit"] = min(found["does_not_fit"] or math.inf, rows)
    found["gib"][rows] = needed / aot.GIB if math.isfinite(needed) else None
    stage.save()
    return step, needed

  try:
    found["most_rows"] = steps.most_rows(
      row, state, work.setup, mesh, limit, build=compiled
    )
  except OutOfTime:
    found["ended"] = "out of time: the bracket is what is known"
  yield found
