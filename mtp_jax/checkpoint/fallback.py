"""Reads the newest checkpoint that is whole, and passes over damaged ones."""

from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from mtp_jax import config
from mtp_jax.checkpoint import reader, storage

_ATTEMPTS = 10  # at a read, while a run replaces the newest step


class CheckpointError(Exception):
  """A checkpoint cannot be written, read or used; the message says why."""


class Fallback:
  """Reads from the steps of a folder, the newest first.

  Args:
    folder: a `storage.folder`.

  Attributes:
    reader: reads single steps.
    damaged: steps that were passed over -> whether their damage is proven
      (`storage.is_proven`).

  Raises:
    CheckpointError: the folder exists, but cannot be listed.
  """

  def __init__(self, folder: epath.Path):
    self._folder = folder
    self.damaged: dict[int, bool] = {}
    self.reader = self._listing(lambda: reader.Reader(folder))

  def steps(self) -> list[int]:
    """Steps that are complete on disk, oldest first."""
    return self._listing(self.reader.complete)

  def candidates(self) -> list[int]:
    """Steps that have a folder, oldest first, complete or not."""
    return self._listing(lambda: storage.steps(self._folder))

  def record(self, step: int) -> dict:
    """The record of a step. An unknown format is an error, not damage."""
    record = self.reader.record(step)
    subject = f"checkpoint {step} in {self._folder}"
    try:
      config.check_format(subject, record.get("format", 1))
    except ValueError as error:
      raise CheckpointError(str(error)) from error
    return record

  def read(self, step: int | None, read: Callable):
    """`read(number)` of the newest whole step, or of `step` alone.

    Args:
      step: the number of a step, or None.
      read: raises `reader.Damaged` or `reader.ReadFailed` if it fails.

    Raises:
      CheckpointError: `step` does not exist, no step is whole, or a read
        failed for another reason than damage.
    """
    for _ in range(_ATTEMPTS):
      steps = self.candidates()
      if step is not None:
        if step not in steps:
          raise CheckpointError(
            f"no checkpoint {step} in {self._folder}; it holds {steps}"
          )
        steps = [step]
      faults, damaged = {}, {}
      for number in reversed(steps):
        try:
          result = read(number)
        except (reader.Damaged, reader.ReadFailed) as error:
          if step is not None and step not in self.candidates():
            break  # a run removed it; the next attempt says so
          if step is None and self._is_replaced(steps[-1]):
            break
          if isinstance(error, reader.ReadFailed):
            raise CheckpointError(
              f"checkpoint {number} in {self._folder} could not be read: "
              f"{error}. It may be whole, and nothing was removed: start again "
              "when the cause is removed"
            ) from error
          faults[number] = f"checkpoint {number} is damaged: {error}"
          damaged[number] = not isinstance(error, reader.Unproven)
          logging.warning("%s: %s", self._folder, faults[number])
        else:
          self.damaged |= damaged
          return result
      else:
        if not steps:
          exists = self._folder.exists()
          faults[0] = "it is empty" if exists else "there is no such folder"
        raise CheckpointError(
          f"no checkpoint to read in {self._folder}: "
          f"{'; '.join(faults.values())}"
        )
    raise CheckpointError(
      f"{_ATTEMPTS} times a checkpoint in {self._folder} was replaced while it "
      "was read; keep more of them (train.keep), or save less often"
    )

  def _is_replaced(self, newest: int) -> bool:
    """Whether a run has saved a newer step, and may have removed this one.

    With several processes this is False: they read only their own run.
    """
    return (
      jax.process_count() == 1 and max(self.candidates(), default=0) > newest
    )

  def _listing(self, fun: Callable):
    """`fun()`; an OSError becomes a CheckpointError that names the folder."""
    try:
      return fun()
    except OSError as error:
      raise CheckpointError(
        f"cannot list {self._folder}: {storage.line(error)}"
      ) from error
