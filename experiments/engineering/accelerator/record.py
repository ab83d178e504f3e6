"""What a stage does within its time, written down as it happens."""

import collections
import concurrent.futures
import contextlib
import copy
import datetime
import json
import pathlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from absl import logging

from experiments.measure import study

FILE = "results.json"
_EMPTY = {"calls": [], "stages": {}, "earlier": []}


class Stage:
  """A stage's section of the results, and the time that it has.

  The whole file is written anew, and at once, after every change: a call that
  is killed leaves all that was known. Sections of other stages stay.

  Attributes:
    folder: of the file.
    whole: everything in it.
    section: of it, this stage's: `results`, `failed`, `left_out` and `seconds`
      by the name of the attempt, and which one is `running`.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    name: str,
    until: float,
    *,
    clock: Callable[[], float] = time.time,
  ):
    """Begins the section, or goes on with that of the last call.

    The section of a call before moves to `earlier`.

    Args:
      folder: holds `FILE`.
      name: the stage's.
      until: when its time ends, by `clock`.
      clock: seconds.
    """
    self.folder, self._until, self._clock = folder, until, clock
    self._taken = collections.defaultdict(list)  # seconds by kind
    self.whole = read(folder)
    if name not in of_last_call(self.whole):
      self._begin(name)
    self.section = self.whole["stages"][name]

  def _begin(self, name):
    before = self.whole["stages"].pop(name, {})
    if "call" in before:
      self.whole["earlier"].append({name: before})
    self.whole["stages"][name] = {
      "call": len(self.whole["calls"]),
      "status": "running",
      "begun": now(),
      "seconds_at_most": round(self.left, 1),
      "seconds": {},
      "running": None,
      "results": {},
      "failed": {},
      "left_out": {},
    }
    self.save()

  @property
  def left(self) -> float:
    """Seconds that the stage has left."""
    return self._until - self._clock()

  def recorded(self, stage: str, name: str) -> dict:
    """A result of any stage, recorded before; empty if there is none."""
    section = self.whole["stages"].get(stage, {})
    return section.get("results", {}).get(name, {})

  def attempt(
    self,
    name: str,
    work: Callable[[], dict | Iterator[dict]],
    *,
    kind: str,
    estimate: float = 0.0,
  ) -> dict | None:
    """Does a piece of work if its time suffices; what fails is written down.

    Args:
      name: of the result.
      work: its result, or, in an iterator, what is known of it so far.
      kind: of work; it is expected to take as long as the longest of its kind
        so far.
      estimate: seconds, while none of its kind has been done.

    Returns:
      The result as far as it was known; None: there is none.
    """
    section = self.section
    expected = max(self._taken[kind], default=estimate)
    if expected > self.left or self.left <= 0:
      section["left_out"][name] = (
        f"expected to take {expected:.0f} s, {max(self.left, 0):.0f} s left"
      )
      logging.info("%s: left out", name)
      self.save()
      return None
    begin = self._clock()
    section["running"] = name
    self.save()
    try:
      found = work()
      for part in [found] if isinstance(found, Mapping) else found:
        section["results"][name] = part
        self.save()
    except Exception as error:  # whatever it is, the next attempt may succeed
      section["failed"][name] = reason(error)
      logging.warning("%s failed: %s", name, reason(error))
      logging.debug("where it happened: %s", traceback.format_exc())
    taken = self._clock() - begin
    self._taken[kind].append(taken)
    section["running"] = None
    section["seconds"][name] = round(taken, 2)
    self.save()
    logging.info("%s: %.1f s", name, taken)
    return section["results"].get(name)

  def finish(self, status: str = "finished") -> None:
    """Ends the section."""
    self.section["status"] = status
    self.section["ended"] = now()
    self.save()

  def save(self) -> None:
    """Writes the file."""
    write(self.folder, self.whole)


def together(works: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
  """Results of all works, run in threads, since XLA compiles on one core each.

  Returns:
    By the same keys; in place of what failed, its exception.
  """

  def run(work):
    try:
      return work()
    except Exception as error:
      return error.with_traceback(None)  # which would keep arrays alive

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    return dict(zip(works, pool.map(run, works.values()), strict=True))


def reason(error: BaseException) -> str:
  """An error's type and the first lines of its message."""
  text = " ".join(str(error).split())
  return f"{type(error).__name__}: {text[:600]}"


def read(folder: pathlib.Path) -> dict:
  """The results so far; without any, their beginning.

  Raises:
    ValueError: the file holds something else.
  """
  path = folder / FILE
  with contextlib.suppress(FileNotFoundError):
    try:
      whole = json.loads(path.read_text(encoding="utf-8"))
      kinds = {key: type(whole[key]) for key in _EMPTY}
      if kinds != {key: type(value) for key, value in _EMPTY.items()}:
        raise TypeError(kinds)
      if not all("status" in section for section in whole["stages"].values()):
        raise TypeError("a stage without a status")
      return {key: whole[key] for key in _EMPTY}
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"{path} is not what this program wrote: remove it, or name another "
        "--output"
      ) from error
  return copy.deepcopy(_EMPTY)


def begin_call(folder: pathlib.Path, call: dict) -> None:
  """Adds a call; a stage still 'running' was killed with an earlier call."""
  whole = read(folder)
  for section in whole["stages"].values():
    close(section, "killed")
  whole["calls"].append(call)
  write(folder, whole)


def leave_out(folder: pathlib.Path, name: str, why: str) -> None:
  """Notes that the call did not come to a stage, whose results stay."""
  whole = read(folder)
  whole["calls"][-1].setdefault("left_out", []).append(name)
  whole["stages"].setdefault(name, {"status": f"left out: {why}"})
  write(folder, whole)


def close(section: dict, status: str) -> None:
  """Says in a section how its stage ended, where it did not do so itself."""
  if section["status"] == "running":
    section["status"] = status
    if running := section.get("running"):
      section["failed"][running] = status
      section["running"] = None


def of_last_call(whole: dict) -> dict[str, dict]:
  """Sections of the stages that the last call began."""
  number, stages = len(whole["calls"]), whole["stages"]
  return {n: s for n, s in stages.items() if s.get("call") == number}


def ended_badly(stages: Mapping[str, dict]) -> list[str]:
  """'name: how it ended' of the stages that did not finish."""
  ends = {name: section["status"] for name, section in stages.items()}
  return [f"{name}: {how}" for name, how in ends.items() if how != "finished"]


def write(folder: pathlib.Path, whole: dict) -> None:
  """Writes the results, all or nothing."""
  study.write_json(folder / FILE, whole)


def now() -> str:
  """The time, for the results."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def device() -> dict:
  """The accelerator: its kind, number and memory."""
  first = jax.devices()[0]
  stats = first.memory_stats() or {}
  return {
    "platform": first.platform,
    "kind": first.device_kind,
    "devices": jax.device_count(),
    "bytes_limit": stats.get("bytes_limit"),
  }
