"""Checkpoints: orbax writes them, a checksum per array guards them.

A state is stored flat, one array per key path ("model/trunk/wq/value"), so a
file can be read without the classes that made it. Beside the arrays lies one
JSON record: the caller's metadata and, for every array, its dtype, shape and
checksum. orbax alone restores a flipped bit, and casts a dtype, in silence.
"""

import atexit
import contextlib
import pathlib
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from mtp_jax import config
from mtp_jax.checkpoint import integrity, reader, storage

_LISTINGS = 10  # tries to read the newest step while a run replaces it


class CheckpointError(Exception):
  """A checkpoint cannot be written, read or used; says which and why."""


class Checkpoints:
  """The checkpoints of one folder, newest last.

  Saves run in the background and appear under their step's name only when
  they are complete, so a killed process leaves the earlier steps as they were.
  Reading never changes the folder: the first `save` removes what a killed save
  left behind, and sets aside the steps that `restore` found damaged
  (`storage.set_aside`).
  Where a read fails for another reason than damage, `restore` stops.

  Args:
    folder: local path or gs:// address; made by the first save.
    keep: newest steps that stay.

  Raises:
    ValueError: `keep` is below 1, or orbax cannot write to such a path.
    CheckpointError: the folder is there, but cannot be listed.
  """

  def __init__(self, folder: str | pathlib.Path, *, keep: int = 3):
    if keep < 1:
      raise ValueError(f"keep is {keep}; it must be at least 1")
    self._folder = storage.folder(folder)
    self._keep = keep
    # Steps that `restore` had to pass over, and whether damage is proven.
    self._damaged = {}
    self._pending = None  # step being written in the background
    self._sample = None  # of a save: its record, and an array to read back
    self._proven = False  # that what this object writes can be read
    self._abandoned = False
    self._writer = None  # opened by the first save
    with contextlib.ExitStack() as resources:
      resources.enter_context(storage.quiet())
      self._reader = self._listing(lambda: reader.Reader(self._folder))
      self._resources = resources.pop_all()

  def save(
    self, step: int, state, metadata: dict, *, wait: bool = False
  ) -> None:
    """Writes `state`; its buffers may be donated as soon as this returns.

    A step that is there already with equal arrays is left as it is.

    Args:
      step: number of the step; later than every step in the folder.
      state: pytree of arrays; typed random keys too.
      metadata: JSON values that `restore` gives back.
      wait: return only when the step is complete on disk. The first save
        always does, and reads back its record and its smallest array.

    Raises:
      CheckpointError: this save could not be started, or, if it waits,
        finished or read back; or the one before it failed in the background,
        and then nothing was started now.
        Earlier steps stay; save may be called again, but not among several
        processes, which may not all have failed.
    """
    self.wait()
    arrays, leaves = integrity.flatten(state)
    sums = integrity.checksums(list(arrays.values()))
    record = integrity.seal(
      {
        "format": config.FORMAT,
        "step": step,
        "metadata": metadata,
        "arrays": {
          name: integrity.describe(array, leaves[name], checksum)
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
    if not self._proven:
      name = min(arrays, key=lambda name: arrays[name].nbytes)
      self._sample = record, integrity.targets({name: arrays[name]})
    if wait or self._sample:
      self.wait()

  def restore(
    self,
    like,
    *,
    refusals: Callable[[dict], list[str]] = lambda metadata: [],
    step: int | None = None,
  ):
    """Reads the newest step that is whole, onto the shardings of `like`.

    Args:
      like: pytree of arrays or jax.ShapeDtypeStruct; any mesh. Leaves with
        no sharding of their own are replicated over the mesh of the others.
      refusals: what of the stored metadata does not fit, a line each.
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
    arrays, leaves = integrity.flatten(like)
    targets = integrity.targets(arrays)

    def read(number):
      record = self._record(number)
      where = f"checkpoint {number} in {self._folder}"
      if lines := refusals(record["metadata"]):
        raise CheckpointError(
          f"{where} (the first) does not fit this run (the second): "
          + "; ".join(lines)
          + ". Take a new folder, or the first's settings"
        )
      lines = integrity.differing_leaves(record["arrays"], targets, leaves)
      if lines:
        raise CheckpointError(f"{where} does not fit: {'; '.join(lines)}")
      loaded = self._reader.arrays(number, record, targets)
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
    return self._listing(self._reader.complete)

  def wait(self) -> None:
    """Returns when nothing is being written.

    Raises:
      CheckpointError: the save failed, or, after the first save of all, what
        was written cannot be read: of its arrays the smallest is tried.
    """
    if self._pending is None:
      return
    step = self._pending
    try:
      self._writer.wait_until_finished()
    except Exception as error:  # what the background thread met, of any type
      self._fail(step, error)
    self._pending = None
    if self._sample:
      self._prove(step, *self._sample)

  def close(self) -> None:
    """Waits, then lets go of orbax's threads."""
    try:
      if not self._abandoned:
        self.wait()
    finally:
      if not self._abandoned:
        self._reader.close()
        if self._writer:
          self._writer.close()
      self._resources.close()

  def abandon(self) -> None:
    """Makes `close` wait for nothing: a peer that it would need is gone."""
    self._abandoned, self._pending = True, None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind:  # the others may not come to read back with this process
      self._sample = None
    self.close()

  def _begin_writing(self) -> None:
    """A manager that may write: a mere reader never cleans a folder up."""
    if not self._writer:
      self._writer = storage.open_writer(self._folder, self._keep)
    if self._damaged:
      multihost_utils.sync_global_devices("damaged checkpoints")
      if jax.process_index() == 0:
        storage.set_aside(self._folder, self._damaged)
      multihost_utils.sync_global_devices("damaged checkpoints set aside")
      self._damaged.clear()
      self._writer.reload()

  def _is_there(self, step: int, record: dict) -> bool:
    latest = max(self._reader.complete(), default=-1)
    if latest < step:
      return False
    try:
      if (
        latest == step
        and self._reader.record(step)["arrays"] == record["arrays"]
      ):
        return True
    except (reader.Damaged, reader.ReadFailed) as error:
      raise ValueError(str(error)) from error
    raise ValueError(
      f"step {latest} is there already; a run that goes back to an earlier "
      "step needs a folder of its own"
    )

  def _prove(self, step: int, record: dict, targets: dict) -> None:
    """Reads the record and some arrays of the step that was just written."""
    self._sample = None
    try:
      if self._reader.record(step)["arrays"] != record["arrays"]:
        raise reader.Damaged("another record than was written")
      self._reader.arrays(step, record, targets)
    except (reader.Damaged, reader.ReadFailed) as error:
      raise CheckpointError(
        f"checkpoint {step} was saved in {self._folder}, but cannot be read "
        f"back: {error}. Take a workdir on another path or file system"
      ) from error
    self._proven = True

  def _fail(self, step: int, error: Exception) -> None:
    self._pending = self._sample = None
    # Stay quiet to the end of the program: some writes end after `close`.
    atexit.register(self._resources.pop_all().close)
    if jax.process_count() > 1:
      self.abandon()  # closing would wait for the others
    elif self._writer:
      self._writer.close()  # the next save opens anew and clears the remains
      self._writer = None
    raise CheckpointError(
      f"checkpoint {step} was not saved in {self._folder}: "
      f"{storage.line(error)}"
    ) from error

  def _record(self, step: int) -> dict:
    """The record of a step; one of an unknown format is no damage."""
    record = self._reader.record(step)
    where = f"checkpoint {step} in {self._folder}"
    try:
      config.check_format(where, record.get("format", 1))
    except ValueError as error:
      raise CheckpointError(str(error)) from error
    return record

  def _candidates(self) -> list[int]:
    """Steps by the names of their folders: also those orbax passes over."""
    return self._listing(lambda: storage.steps(self._folder))

  def _listing(self, fun):
    """`fun()`, which lists the folder."""
    try:
      return fun()
    except OSError as error:
      raise CheckpointError(
        f"cannot list {self._folder}: {storage.line(error)}"
      ) from error

  def _first_whole(self, step: int | None, read):
    """`read` of the newest step that is whole, or of `step` alone."""
    for _ in range(_LISTINGS):
      steps = self._candidates()
      if step is not None:
        if step not in steps:
          raise CheckpointError(
            f"no checkpoint {step} in {self._folder}; it holds {steps}"
          )
        steps = [step]
      faults, damaged = {}, {}
      for number in reversed(steps):
        try:
          found = read(number)
        except (reader.Damaged, reader.ReadFailed) as error:
          if step is not None and step not in self._candidates():
            break  # removed meanwhile, as the next turn says
          if step is None and self._is_replaced(steps[-1]):
            break
          if isinstance(error, reader.ReadFailed):
            raise CheckpointError(
              f"checkpoint {number} in {self._folder} could not be read: "
              f"{error}. It may be whole, and nothing was removed: start again "
              "when the cause is mended"
            ) from error
          faults[number] = f"checkpoint {number} is damaged: {error}"
          damaged[number] = not isinstance(error, reader.Unproven)
          logging.warning("%s: %s", self._folder, faults[number])
        else:
          self._damaged |= damaged
          return found
      else:
        if not steps:
          exists = self._folder.exists()
          faults[0] = "it is empty" if exists else "there is no such folder"
        raise CheckpointError(
          f"no checkpoint to read in {self._folder}: "
          f"{'; '.join(faults.values())}"
        )
    raise CheckpointError(
      f"{_LISTINGS} times a checkpoint in {self._folder} was replaced while it "
      "was read; keep more of them (train.keep), or save less often"
    )

  def _is_replaced(self, newest: int) -> bool:
    """Whether a run has saved a newer step, and may have removed this one.

    Among several processes nobody asks: they read only what they write.
    """
    return (
      jax.process_count() == 1 and max(self._candidates(), default=0) > newest
    )
