"""Reads single steps of a folder and tells damage from a failed read."""

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mtp_jax.checkpoint import integrity, storage


class Damaged(Exception):
  """A step is not what was saved. An earlier step may be whole."""


class Unproven(Damaged):
  """A step cannot be read, but damage is not proven: never remove it."""


class ReadFailed(Exception):
  """A read failed, such as for lack of permission; the step may be whole."""


# Outcomes of a read, from best to worst. The worst of all processes counts.
_OUTCOMES = (None, Damaged, Unproven, ReadFailed)


class Reader:
  """Reads single steps; never changes the folder.

  Each of several processes reads on its own. Then they exchange outcomes, and
  if one has failed, all raise. So all fall back to the same step, or all stop.

  Args:
    folder: a `storage.folder`.
  """

  def __init__(self, folder: epath.Path):
    self._folder = folder
    # If processes read together in orbax, one that raises leaves the others
    # waiting. So each is told that it is the only one.
    alone, here = ocp.options.MultiprocessingOptions(), jax.process_index()
    if jax.process_count() > 1:
      alone = ocp.options.MultiprocessingOptions(
        primary_host=here,
        active_processes={here},
        barrier_sync_key_prefix=f"reader_{here}",
      )
    options = ocp.CheckpointManagerOptions(
      save_interval_steps=0,
      create=False,
      read_only=True,
      multiprocessing_options=alone,
    )
    self._manager = _retried(
      lambda: ocp.CheckpointManager(folder, options=options)
    )

  def complete(self) -> list[int]:
    """Steps that are complete on disk, oldest first.

    Raises:
      OSError: the folder cannot be listed.
    """
    steps = storage.steps(self._folder)  # raises where orbax finds no steps
    _retried(self._manager.reload)
    return sorted({*steps} & {*self._manager.all_steps()})

  def record(self, step: int) -> dict:
    """The record of a step (`integrity.seal`).

    Raises:
      Damaged, ReadFailed: this process or another cannot read it.
    """

    def read():
      if step not in self.complete():
        raise Damaged("its folder is not marked as complete")
      record = self._restore(step, metadata=ocp.args.JsonRestore())
      if (
        integrity.seal(record)["seal"] != record["seal"]
        or record["step"] != step
      ):
        raise Damaged("metadata: checksum differs")
      return record

    return _together(read)

  def arrays(self, step: int, record: dict, targets: dict) -> dict:
    """Restores arrays of a step and verifies their checksums.

    Args:
      step: number of the step.
      record: its record.
      targets: name -> shape, dtype and sharding (`integrity.targets`), of all
        arrays or of some.

    Raises:
      Damaged, ReadFailed: this process or another cannot read them.
    """
    args = ocp.args.PyTreeRestore(
      targets,
      restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
      partial_restore=len(targets) < len(record["arrays"]),
    )

    def read():
      loaded = self._restore(step, state=args)
      for name in targets:  # orbax returns the target of a missing array
        if not isinstance(loaded[name], jax.Array):
          raise Damaged(f"array {name} is missing")
      return loaded

    loaded = _together(read)
    sums = integrity.checksums([loaded[name] for name in targets])
    faults = [
      f"array {name} has checksum {checksum}, "
      f"stored is {record['arrays'][name]['checksum']}"
      for name, checksum in zip(targets, sums, strict=True)
      if checksum != record["arrays"][name]["checksum"]
    ]

    def verify():
      if faults:
        raise Damaged("; ".join(faults))

    _together(verify)
    return loaded

  def close(self) -> None:
    """Releases orbax's manager and its threads."""
    self._manager.close()

  def _restore(self, step, **items):
    (name,) = items
    args = ocp.args.Composite(**items)
    return self._manager.restore(step, args=args)[name]


def _retried(listing):
  """`listing()` of orbax, repeated if a run removes a step meanwhile.

  orbax lists the names first and opens each step later.
  """
  for _ in range(10):
    try:
      return listing()
    except FileNotFoundError as error:
      last_error = error
  raise last_error


def _together(read):
  """`read()` on each process; raises on all of them if one fails."""
  result, error, outcome = None, None, 0
  try:
    result = read()
  except Exception as caught:  # orbax raises errors of many types
    error = caught
    if not storage.is_damage(error):
      outcome = _OUTCOMES.index(ReadFailed)
    elif isinstance(error, Damaged) or storage.is_proven(error):
      outcome = _OUTCOMES.index(Damaged)
    else:
      outcome = _OUTCOMES.index(Unproven)
  outcomes = np.array([outcome])
  if jax.process_count() > 1:
    outcomes = multihost_utils.process_allgather(outcomes).reshape(-1)
  worst = outcomes.max()
  if worst:
    text = f"not readable on processes {np.flatnonzero(outcomes == worst)}"
    if outcome == worst:
      is_ours = isinstance(error, Damaged)
      text = str(error) if is_ours else storage.line(error)
    raise _OUTCOMES[worst](text) from error
  return result
