"""What a sweep finds in its folder, on which all processes agree."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.measure import tidy
from mtp_jax.train import processes


def ended(asked: Mapping[tidy.Key, Any], folder: pathlib.Path) -> set[tidy.Key]:
  """The keys of finished runs; raises what is wrong with a sweep.

  No file is changed. Every process raises what any of them finds.

  Args:
    asked: each `sweep.Run` by its key.
    folder: of the sweep.

  Raises:
    ValueError: see `sweep.run`.
  """

  def look():
    return sorted(_finished(asked, folder)) if jax.process_index() == 0 else []

  def check():
    for one in asked.values():
      if one.key not in done:
        one.check()
    return [[*one.key, one.overrides] for one in asked.values()]

  done = {tuple(key) for key in together(look)[0]}
  first, *others = together(check)
  for i, other in enumerate(others, 1):
    if other != first:
      raise ValueError(
        f"process {i} was asked for other runs than process 0: start all with "
        "the same flags"
      )
  return done


def together(find: Callable[[], Any]) -> list[Any]:
  """What `find` returns in each process, JSON values.

  Raises:
    ValueError: it raised in another process, with that error's text.
  """
  value, error, text = None, None, ""
  try:
    value = find()
  except Exception as raised:  # the other processes wait for an answer
    error, text = raised, f"{type(raised).__name__}: {raised}"
  with processes.watched():
    told = [json.loads(t) for t in processes.gather(json.dumps([value, text]))]
  if error:
    raise error
  for i, (_, text) in enumerate(told):
    if text:
      raise ValueError(f"process {i}: {text}")
  return [value for value, _ in told]


def _finished(asked, folder) -> set[tidy.Key]:
  """The keys of the runs in a folder's file that are finished.

  Raises:
    ValueError: the file is damaged, or has other runs than those in `asked`.
  """
  rows = tidy.read(folder)
  claims = {key[0] for key in asked}
  for row in rows:
    if row.claim not in claims:
      raise ValueError(
        f"{folder} has runs of {row.claim}, whose folders may have the same "
        "names: name another --output"
      )
    if one := asked.get(row.key):
      wanted = json.loads(tidy.settings(one.overrides))
      if row.overrides != wanted:
        differs = [
          f"{name} {row.overrides.get(name)!r}, not {wanted.get(name)!r}"
          for name in sorted({*row.overrides, *wanted})
          if row.overrides.get(name) != wanted.get(name)
        ]
        raise ValueError(
          f"{folder} has {one} with {'; '.join(differs)}: name another --output"
        )
  return tidy.ended(rows)


def remove_later_rows(one: Any, folder: pathlib.Path) -> None:
  """Removes the rows after the step from which an unfinished run resumes.

  Args:
    one: a `sweep.Run`.
    folder: of the sweep.

  Raises:
    ValueError: there is no row of that step, so earlier ones are missing, too.
  """
  rows = tidy.read(folder)
  step = one.resume_step(folder / one.folder)
  own = [row for row in rows if row.key == one.key]
  if step >= 0 and all(row.step != step for row in own):
    raise ValueError(
      f"it would resume from step {step}, but {folder / tidy.FILE} has no "
      f"figure of that step: remove {folder / one.folder}, and it begins again"
    )
  kept = [row for row in rows if row.key != one.key or row.step <= step]
  tidy.write(folder / tidy.FILE, kept)
