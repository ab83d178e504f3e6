"""Checkpoints: orbax writes them, a checksum per array guards them.

A state is stored flat, one array per key path ("model/trunk/wq/value"), so a
file can be read without the classes that made it. Beside the arrays lies one
JSON record: the caller's metadata and, for every array, its dtype, shape and
checksum. orbax alone restores a flipped bit, and casts a dtype, in silence.
"""

import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from mtp_jax import record as record_lib


class CheckpointError(Exception):
  """A checkpoint cannot be written, read or used; says which and why."""


class _Unreadable(Exception):
  """One step is damaged; the step before it may still be good."""


class Checkpoints:
  """The checkpoints of one folder, newest last.

  Saves run in the background and appear under their step's name only when
  they are complete, so a killed process leaves the earlier steps as they were.
  Reading never changes the folder: what a killed save left behind, and steps
  that `restore` found damaged, are removed by the first `save`.

  Args:
    folder: local path or gs:// address; made by the first save.
    keep: newest steps that stay.
  """

  def __init__(self, folder: str | pathlib.Path, *, keep: int = 3):
    if keep < 1:
      raise ValueError(f"keep is {keep}; it must be at least 1")
    self._folder = epath.Path(folder).expanduser().absolute()
    self._keep = keep
    self._damaged = set()  # steps that `restore` had to pass over
    self._pending = None  # step being written in the background
    self._abandoned = False
    self._reader = self._open(read_only=True)
    self._writer = None  # opened by the first save

  def save(
    self, step: int, state, metadata: dict, *, wait: bool = False
  ) -> None:
    """Writes `state`; its buffers may be donated as soon as this returns.

    A step that is there already with equal arrays is left as it is.

    Args:
      step: number of the step; later than every step in the folder.
      state: pytree of arrays; typed random keys too.
      metadata: JSON values that `restore` gives back and compares.
      wait: return only when the step is complete on disk.

    Raises:
      CheckpointError: this save could not be started, or, with `wait`,
        finished; or the one before it failed in the background, and then
        nothing was started now. Earlier steps stay; save may be called again,
        but not among several processes, which may not all have failed.
    """
    self.wait()
    arrays, leaves = record_lib.flatten(state)
    sums = record_lib.checksums(list(arrays.values()))
    record = record_lib.seal(
      {
        "step": step,
        "metadata": metadata,
        "arrays": {
          name: record_lib.describe(array, leaves[name], checksum)
          for (name, array), checksum in zip(arrays.items(), sums, strict=True)
        },
      }
    )
    try:
      self._begin_writing()
      if self._is_there(step, record):
        return
      self._pending = step
      self._writer.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(arrays),
          metadata=ocp.args.JsonSave(record),
        ),
        force=True,
      )
    except (OSError, ValueError, RuntimeError) as error:
      self._fail(step, error)
    if wait:
      self.wait()

  def restore(
    self, like, *, expect: dict | None = None, step: int | None = None
  ):
    """Reads the newest step that is whole, onto the shardings of `like`.

    Args:
      like: pytree of arrays or jax.ShapeDtypeStruct; any mesh. Leaves with
        no sharding of their own are replicated over the mesh of the others.
      expect: compared with the stored metadata on the keys that it holds.
      step: this step and no other.

    Returns:
      (state, metadata, step), or None where the folder holds no step.

    Raises:
      CheckpointError: names every leaf or field that does not fit, with both
        values; or, where no step is whole, all steps with what is wrong.
    """
    self.wait()
    if step is None and not self._candidates():
      return None
    arrays, leaves = record_lib.flatten(like)
    targets = record_lib.targets(arrays)

    def read(number):
      record = self._record(number)
      where = f"checkpoint {number} in {self._folder}"
      lines = record_lib.differing_metadata(record["metadata"], expect or {})
      if lines:
        raise CheckpointError(
          f"{where} (the first) does not fit this run (the second): "
          + "; ".join(lines)
          + ". Take a new folder, or the first's settings"
        )
      lines = record_lib.differing_leaves(record["arrays"], targets, leaves)
      if lines:
        raise CheckpointError(f"{where} does not fit: {'; '.join(lines)}")
      loaded = self._arrays(number, record, targets)
      for name, entry in record["arrays"].items():
        if "key" in entry:
          loaded[name] = jax.random.wrap_key_data(
            loaded[name], impl=entry["key"]
          )
      state = jax.tree.unflatten(
        jax.tree.structure(like), [loaded[name] for name in leaves]
      )
      return state, record["metadata"], number

    return self._first_whole(step, read)

  def metadata(self, step: int | None = None) -> dict:
    """The metadata of the newest step (or of `step`), without its arrays."""
    self.wait()
    return self._first_whole(step, lambda n: self._record(n)["metadata"])

  def steps(self) -> list[int]:
    """Steps that are complete on disk, oldest first."""
    self.wait()
    if not self._folder.exists():
      return []
    self._reader.reload()
    return sorted(self._reader.all_steps())

  def wait(self) -> None:
    """Returns when nothing is being written; CheckpointError if it failed."""
    if self._pending is None:
      return
    try:
      self._writer.wait_until_finished()
    except Exception as error:  # what the background thread met, of any type
      self._fail(self._pending, error)
    self._pending = None

  def close(self) -> None:
    """Waits, then lets go of orbax's threads."""
    if self._abandoned:
      return
    try:
      self.wait()
    finally:
      if not self._abandoned:
        self._reader.close()
        if self._writer:
          self._writer.close()

  def abandon(self) -> None:
    """Makes `close` wait for nothing: a peer that it would need is gone."""
    self._abandoned, self._pending = True, None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _open(self, read_only: bool) -> ocp.CheckpointManager:
    several, here = jax.process_count() > 1, jax.process_index()
    # Each process reads alone, and compares with the others afterwards
    # (`_raise_together`): within orbax, one that finds damage would leave the
    # others waiting.
    alone = ocp.options.MultiprocessingOptions(
      primary_host=here,
      active_processes={here},
      barrier_sync_key_prefix=f"reader_{here}",
    )
    together = ocp.options.MultiprocessingOptions()
    return ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else self._keep,
        save_interval_steps=0 if read_only else 1,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
        async_options=ocp.AsyncOptions(
          barrier_sync_fn=_barrier if several and not read_only else None
        ),
        multiprocessing_options=alone if several and read_only else together,
      ),
    )

  def _begin_writing(self) -> None:
    """A manager that may write: a mere reader never cleans a folder up."""
    if not self._writer:
      self._writer = self._open(read_only=False)
    if self._damaged:
      multihost_utils.sync_global_devices("damaged checkpoints")
      for step in sorted(self._damaged):
        logging.warning("removing damaged checkpoint %d", step)
        if jax.process_index() == 0:
          (self._folder / str(step)).rmtree(missing_ok=True)
      multihost_utils.sync_global_devices("damaged checkpoints removed")
      self._damaged.clear()
      self._writer.reload()

  def _is_there(self, step: int, record: dict) -> bool:
    latest = max(self.steps(), default=-1)
    if latest < step:
      return False
    try:
      if latest == step and self._record(step)["arrays"] == record["arrays"]:
        return True
    except _Unreadable as error:
      raise ValueError(str(error)) from error
    raise ValueError(
      f"step {latest} is there already; a run that goes back to an earlier "
      "step needs a folder of its own"
    )

  def _fail(self, step: int, error: Exception) -> None:
    self._pending = None
    if jax.process_count() > 1:
      self.abandon()  # closing would wait for the others
    elif self._writer:
      self._writer.close()  # the next save opens anew and clears the remains
      self._writer = None
    raise CheckpointError(
      f"checkpoint {step} was not saved in {self._folder}: {_line(error)}"
    ) from error

  def _candidates(self) -> list[int]:
    """Steps by the names of their folders: also those orbax passes over."""
    if not self._folder.exists():
      return []
    return sorted(int(p.name) for p in self._folder.iterdir() if _is_step(p))

  def _first_whole(self, step: int | None, read):
    """`read` of the newest step that is whole, or of `step` alone."""
    steps = self._candidates()
    if step is not None:
      if step not in steps:
        raise CheckpointError(
          f"no checkpoint {step} in {self._folder}; it holds {steps}"
        )
      steps = [step]
    faults = {}
    for number in reversed(steps):
      try:
        found = read(number)
      except _Unreadable as error:
        faults[number] = f"checkpoint {number} is damaged: {error}"
        logging.warning("%s: %s", self._folder, faults[number])
      else:
        self._damaged |= faults.keys()
        return found
    listing = "; ".join(faults.values()) or "it is empty"
    raise CheckpointError(f"no checkpoint to read in {self._folder}: {listing}")

  def _record(self, step: int) -> dict:
    record, fault = None, ""
    try:
      if step not in self.steps():
        raise ValueError("its folder is not marked as complete")
      args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
      record = self._reader.restore(step, args=args)["metadata"]
      if (
        record_lib.seal(record)["seal"] != record["seal"]
        or record["step"] != step
      ):
        raise ValueError("metadata: checksum differs")
    except Exception as error:  # damage surfaces as any type
      fault = _line(error)
    _raise_together(fault)
    return record

  def _arrays(self, step: int, record: dict, targets: dict) -> dict:
    loaded, fault = None, ""
    try:
      args = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
      loaded = self._reader.restore(step, args=args)["state"]
    except Exception as error:  # damage surfaces as any type
      fault = _line(error)
    _raise_together(fault)
    found = record_lib.checksums([loaded[name] for name in targets])
    faults = [
      f"array {name} has checksum {checksum}, "
      f"stored is {record['arrays'][name]['checksum']}"
      for name, checksum in zip(targets, found, strict=True)
      if checksum != record["arrays"][name]["checksum"]
    ]
    _raise_together("; ".join(faults))
    return loaded


def _barrier(*, key: str, timeout_ms: int) -> None:
  """orbax's barrier for threads that save, which one that failed passes by.

  orbax lets it wait, `finally`, where no other process will come: theirs wait
  for it elsewhere, and the error would stay unseen for ten minutes.
  """
  if error := sys.exc_info()[1]:
    raise error
  multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _raise_together(fault: str) -> None:
  """Raises on every process where any has a fault, so that all go back to
  the same step."""
  if jax.process_count() > 1:
    faulty = multihost_utils.process_allgather(np.array(bool(fault)))
    if faulty.any() and not fault:
      fault = f"not readable on processes {np.flatnonzero(faulty).tolist()}"
  if fault:
    raise _Unreadable(fault)


def _is_step(path: epath.Path) -> bool:
  return path.name.isdigit() and path.is_dir()


def _line(error: BaseException) -> str:
  """An error in one line of readable length."""
  text = " ".join(f"{type(error).__name__}: {error}".split())
  return text if len(text) < 600 else f"{text[:400]} ... {text[-160:]}"
