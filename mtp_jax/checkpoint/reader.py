"""Reads checkpoints of a folder, and tells damage from a failed read."""

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mtp_jax.checkpoint import integrity, storage


class Damaged(Exception):
  """A step is not what was saved; the step before it may be."""


class Unproven(Damaged):
  """A step cannot be read, for an unknown reason: nothing may remove it."""


class ReadFailed(Exception):
  """A step could not be looked at; whether it is whole is unknown."""


_KINDS = (
  None,
  Damaged,
  Unproven,
  ReadFailed,
)  # the worst of all processes counts


class Reader:
  """Reads single steps and changes nothing in the folder.

  Among several processes each reads alone. Then all compare, and where one
  raises, all raise: so all go back to the same step, or all stop.

  Args:
    folder: a `storage.folder`.
  """

  def __init__(self, folder: epath.Path):
    self._folder = folder
    # Within orbax, a process that finds damage would leave the others waiting.
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
    self._manager = _listed(
      lambda: ocp.CheckpointManager(folder, options=options)
    )

  def complete(self) -> list[int]:
    """Steps that are complete on disk, oldest first.

    Raises:
      OSError: the folder cannot be listed.
    """
    steps = storage.steps(self._folder)  # fails where orbax finds nothing
    _listed(self._manager.reload)
    return sorted({*steps} & {*self._manager.all_steps()})

  def record(self, step: int) -> dict:
    """The record of a step (`integrity.seal`).

    Raises:
      Damaged, ReadFailed: on this process or on another.
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
    """Arrays of a step, compared with the checksums in its record.

    Args:
      step: the step.
      record: of the step.
      targets: shape, dtype and sharding by name (`integrity.targets`), of all
        arrays or of some.

    Raises:
      Damaged, ReadFailed: on this process or on another.
    """
    args = ocp.args.PyTreeRestore(
      targets,
      restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
      partial_restore=len(targets) < len(record["arrays"]),
    )

    def read():
      loaded = self._restore(step, state=args)
      for name in targets:  # orbax leaves a target in place of what it misses
        if not isinstance(loaded[name], jax.Array):
          raise Damaged(f"array {name} is missing")
      return loaded

    loaded = _together(read)
    found = integrity.checksums([loaded[name] for name in targets])
    faults = [
      f"array {name} has checksum {checksum}, "
      f"stored is {record['arrays'][name]['checksum']}"
      for name, checksum in zip(targets, found, strict=True)
      if checksum != record["arrays"][name]["checksum"]
    ]

    def compare():
      if faults:
        raise Damaged("; ".join(faults))

    _together(compare)
    return loaded

  def close(self) -> None:
    """Releases orbax's manager and its threads."""
    self._manager.close()

  def _restore(self, step, **items):
    (name,) = items
    args = ocp.args.Composite(**items)
    return self._manager.restore(step, args=args)[name]


def _listed(listing):
  """`listing()` of orbax, again where a run removes a step meanwhile.

  orbax lists the names first, and looks at each step afterwards.
  """
  for _ in range(10):
    try:
      return listing()
    except FileNotFoundError as error:
      gone = error
  raise gone


def _together(read):
  """`read()`; where it fails on one process, it raises on all of them."""
  found, error, kind = None, None, 0
  try:
    found = read()
  except Exception as caught:  # damage surfaces as any type
    error = caught
    if not storage.is_damage(error):
      kind = _KINDS.index(ReadFailed)
    elif isinstance(error, Damaged) or storage.is_proven(error):
      kind = _KINDS.index(Damaged)
    else:
      kind = _KINDS.index(Unproven)
  kinds = np.array([kind])
  if jax.process_count() > 1:
    kinds = multihost_utils.process_allgather(kinds).reshape(-1)
  worst = kinds.max()
  if worst:
    text = f"not readable on processes {np.flatnonzero(kinds == worst)}"
    if kind == worst:
      is_ours = isinstance(error, Damaged)
      text = str(error) if is_ours else storage.line(error)
    raise _KINDS[worst](text) from error
  return found
