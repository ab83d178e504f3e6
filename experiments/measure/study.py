"""What every measuring program writes down: provenance, rows, verdicts."""

import csv
import dataclasses
import datetime
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mtp_jax.train import logs

# Whose versions a result names, where they are installed.
PACKAGES = (
  "jax",
  "jaxlib",
  "libtpu",
  "flax",
  "optax",
  "orbax-checkpoint",
  "grain",
)


def provenance(seed: int | None = None) -> dict[str, Any]:
  """The beginning of every result: what was run, on what, and when.

  `study.write_json(path, study.provenance(seed=0) | {"seconds": 1.5})`

  Args:
    seed: of all that is random; None leaves it out.

  Returns:
    `command`, `commit`, `machine` (date, device, host, versions), `seed`.
  """
  record = {"command": command(), "commit": commit(), "machine": machine()}
  return record if seed is None else record | {"seed": seed}


def command() -> str:
  """The program that runs and its flags, as a shell takes them."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  program = ["python", sys.argv[0]]
  if spec:
    program = ["python", "-m", spec.name.removesuffix(".__main__")]
  return shlex.join([*program, *sys.argv[1:]])


def commit() -> str:
  """The commit of this code, `-dirty` where files differ; or 'unknown'."""
  try:
    return subprocess.run(
      ["git", "describe", "--always", "--dirty", "--abbrev=40"],
      cwd=pathlib.Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    return "unknown"


def machine() -> dict[str, str]:
  """Date, device, host, and the versions of Python and of `PACKAGES`."""
  return {
    "date": _today(),
    "device": device(),
    "host": f"{_cores()} cores, {platform.machine()}",
    **versions("python", *PACKAGES),
  }


def stamp(*packages: str) -> dict[str, str]:
  """Columns of a CSV row that is added to others: date and versions."""
  return {"date": _today(), **versions(*packages)}


def versions(*names: str) -> dict[str, str]:
  """Versions of packages, and of 'python'; those not installed are left out."""
  found = {"python": platform.python_version()}
  for name in names:
    try:
      found.setdefault(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
      pass
  return {name: found[name] for name in names if name in found}


def device() -> str:
  """The processor or accelerator, in words."""
  first = jax.devices()[0]
  if first.platform != "cpu":
    return f"{len(jax.devices())} x {first.device_kind}"
  name = platform.processor()
  info = pathlib.Path("/proc/cpuinfo")
  if info.exists():
    lines = info.read_text(encoding="utf-8").splitlines()
    name = next(x for x in lines if x.startswith("model name")).split(": ")[1]
  return f"{_cores()} x {name}"


def _cores() -> int:
  """Those that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count()


def _today() -> str:
  return datetime.date.today().isoformat()


def write_json(path: pathlib.Path, result: Mapping[str, Any]) -> None:
  """Writes a result, all or nothing.

  A dataclass, such as a `Bound`, becomes a dict; a NumPy number a float.
  """

  def plain(value):
    if dataclasses.is_dataclass(value):
      return dataclasses.asdict(value)
    return float(value)

  logs.write_whole(path, json.dumps(result, indent=1, default=plain) + "\n")


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Writes a header and rows of the same keys, all or nothing.

  Floats get nine significant digits, as in a run's logs.
  """
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
  writer.writeheader()
  writer.writerows(
    {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
    for row in rows
  )
  logs.write_whole(path, text.getvalue())


def read_csv(path: pathlib.Path) -> list[dict[str, str]]:
  """Rows of a CSV file as strings; none where there is no file."""
  if not path.exists():
    return []
  with path.open(newline="", encoding="utf-8-sig") as file:  # a BOM
    return list(csv.DictReader(file))


@dataclasses.dataclass(frozen=True)
class Bound:
  """A figure, its bound, and whether the bound is met.

  `str(Bound.at_most(1.02, 1.05))` is '1.02 (bound 1.05): met'.
  """

  figure: float
  bound: float | None = None  # None: the figure is for comparison
  met: bool | None = None

  @classmethod
  def at_most(cls, figure: float, bound: float) -> "Bound":
    """Met by a figure up to `bound`; never by NaN."""
    return cls(figure, bound, bool(figure <= bound))

  @classmethod
  def at_least(cls, figure: float, bound: float) -> "Bound":
    """Met by a figure from `bound` on; never by NaN."""
    return cls(figure, bound, bool(figure >= bound))

  def __str__(self) -> str:
    bound = "" if self.bound is None else f" (bound {self.bound:g})"
    return f"{self.figure:.4g}{bound}: {verdict(self.met)}"


def verdict(met: bool | None) -> str:
  """The words for `Bound.met`."""
  if met is None:
    return "for comparison"
  return "met" if met else "NOT MET"
