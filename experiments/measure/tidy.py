"""The CSV file of a sweep: one tidy row per figure.

A figure stands beside the run that measured it: its claim, name, settings and
seed, the training step, and where and when it was measured.
"""

import csv
import datetime
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.measure import study
from mtp_jax.train import logs

FILE = "sweep.csv"
LAST = "seconds"  # the metric of the row that ends a finished run

Key = tuple[str, str, int]  # claim, name and seed, which name a run


class Row(NamedTuple):
  """A figure as it stands in the file, and its run."""

  claim: str
  run: str
  overrides: dict[str, Any]
  seed: int
  step: int
  metric: str
  value: float
  hardware: str
  versions: str
  date: str
  commit: str

  @property
  def key(self) -> Key:
    """What names the row's run."""
    return self.claim, self.run, self.seed


def read(path: pathlib.Path) -> list[Row]:
  """The rows of a sweep's CSV file; none where there is no file.

  A last row that was cut by a kill is left out.

  Args:
    path: the file, or a folder with sweep.csv.

  Raises:
    ValueError: a row is damaged, or there twice; names the file and the row.
  """
  file, rows, seen = path / FILE if path.is_dir() else path, [], set()
  try:
    lines = study.read_csv(file)
    whole = file.exists() and file.read_bytes().endswith(b"\n")
    if lines and [*lines[0]][: len(Row._fields)] != [*Row._fields]:
      raise ValueError(f"the header is not {','.join(Row._fields)}")
    for i, row in enumerate(lines, 1):
      if None in row:
        raise ValueError("it has too many cells")
      if None in row.values() or not row["commit"]:
        if i < len(lines):
          raise ValueError("it is cut short, and others follow it")
        continue
      # Perhaps cut, unless it ends as the row before it does.
      if i == len(lines) and not whole:
        if not rows or row["commit"] != rows[-1].commit:
          continue
      row["overrides"] = json.loads(row["overrides"])
      row |= {name: int(row[name]) for name in ("seed", "step")}
      row = Row(**row | {"value": float(row["value"])})
      if not math.isfinite(row.value) or row.step < 0:
        raise ValueError(f"step {row.step}, value {row.value}")
      if (figure := (*row.key, row.step, row.metric)) in seen:
        raise ValueError("it repeats a figure")
      seen.add(figure)
      rows.append(row)
  except (ValueError, KeyError, TypeError, csv.Error) as error:
    raise ValueError(
      f"row {len(rows) + 1} of {file} is damaged ({error}): repair it, or "
      "remove all rows of its run, and the run's folder"
    ) from error
  return rows


def write(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes a header, and rows as `read` reads them, all or nothing."""
  if rows:
    plain = [r._asdict() | {"overrides": settings(r.overrides)} for r in rows]
    study.write_csv(path, plain)
  else:
    logs.write_whole(path, ",".join(Row._fields) + "\n")


def line(row: Row) -> list:
  """The cells of a row, for a `csv.writer`."""
  value = f"{float(row.value):.9g}"
  return list(row._replace(overrides=settings(row.overrides), value=value))


def settings(overrides: Mapping[str, Any]) -> str:
  """A run's overrides as they stand in the file."""
  return json.dumps(dict(overrides), sort_keys=True)


def here() -> dict[str, str]:
  """Hardware, versions, date and commit of what this process measures."""
  found = study.versions("python", *study.PACKAGES)
  return {
    "hardware": study.device(),
    "versions": " ".join(f"{k} {v}" for k, v in found.items()),
    "date": datetime.date.today().isoformat(),
    "commit": study.commit(),
  }


def ended(rows: Sequence[Row]) -> set[Key]:
  """The keys of runs that are finished."""
  return {row.key for row in rows if row.metric == LAST}


def finished(rows: Sequence[Row], claim: str) -> list[Row]:
  """The rows of a claim's runs that were not cut short: what a table shows."""
  keys = {key for key in ended(rows) if key[0] == claim}
  return [row for row in rows if row.key in keys]


def origin(rows: Sequence[Row]) -> str:
  """One line for a README: hardware, date, versions, commit, time in all.

  The time of a run that was resumed is that of its last start.
  """
  parts = [
    "; ".join(dict.fromkeys(getattr(row, name) for row in rows))
    for name in ("hardware", "date", "versions", "commit")
  ]
  seconds = sum(row.value for row in rows if row.metric == LAST)
  seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
  return f"{', '.join(parts)}; seeds {seeds}; {seconds / 60:.1f} minutes in all"
