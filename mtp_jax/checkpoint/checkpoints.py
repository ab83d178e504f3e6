"""Saves and restores checkpoints with orbax, and verifies every array.

A state is stored as a flat dict, one array per key path such as
"model/trunk/wq/value". It can be read without the classes that made it. A JSON
record beside the arrays holds the caller's metadata and the dtype, shape and
checksum of every array. orbax alone would restore damaged values and cast
dtypes without an error.
"""

import atexit
import contextlib
import pathlib
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from mtp_jax import config
from mtp_jax.checkpoint import fallback, integrity, reader, storage

CheckpointError = fallback.CheckpointError


class Checkpoints:
  """The checkpoints of a folder; a context manager.

  Saves run in the background. A step gets its name when it is complete, so a
  killed process leaves the earlier steps intact. Reading never changes the
  folder. The first `save` removes what killed saves left, and sets aside the
  steps that `restore` found damaged (`storage.set_aside`). If a read fails for
  another reason than damage, `restore` raises.

  Args:
    folder: local path or gs:// address; made by the first save.
    keep: number of steps to keep, the newest.

  Raises:
    ValueError: `keep` is below 1, or orbax cannot write to this path.
    CheckpointError: the folder exists, but cannot be listed.

  Example:
    >>> import jax.numpy as jnp
    >>> from mtp_jax.checkpoint import checkpoints
    >>> with checkpoints.Checkpoints("steps", keep=2) as saved:
    ...   saved.save(7, {"w": jnp.ones(3)}, {"run": "a"})
    ...   state, metadata, step = saved.restore({"w": jnp.zeros(3)})
    >>> state["w"].tolist(), metadata, step
    ([1.0, 1.0, 1.0], {'run': 'a'}, 7)
  """

  def __init__(self, folder: str | pathlib.Path, *, keep: int = 3):
    if keep < 1:
      raise ValueError(f"keep is {keep}; it must be at least 1")
    self._folder = storage.folder(folder)
    self._keep = keep
    self._pending = None  # step that is being written in the background
    # Record and target of one array of that step, to be read back.
    self._sample = None
    self._proven = False  # whether a step that was written could be read back
    self._abandoned = False
    self._writer = None  # made by the first save
    with contextlib.ExitStack() as resources:
      resources.enter_context(storage.quiet())
      self._fallback = fallback.Fallback(self._folder)
      self._reader = self._fallback.reader
      self._resources = resources.pop_all()

  def save(
    self, step: int, state, metadata: dict, *, wait: bool = False
  ) -> None:
    """Saves `state`. Its buffers may be donated as soon as this returns.

    If the step exists already with equal arrays, nothing is written.

    Args:
      step: number of the step, greater than all steps in the folder.
      state: pytree of arrays, which may be typed random keys.
      metadata: JSON values that `restore` returns.
      wait: return only when the step is complete on disk. The first save
        always waits. It also reads back its record and its smallest array.

    Raises:
      CheckpointError: this save could not be started, or one that waits could
        not be finished or read back. Or the previous save failed in the
        background; then this one was not started. Earlier steps are intact. A
        single process may call `save` again; of several processes perhaps only
        some have failed, so they must not.
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
      if self._is_saved(step, record):
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
    partial: bool = False,
  ):
    """Restores the newest step that is whole, with the shardings of `like`.

    Args:
      like: pytree of arrays or jax.ShapeDtypeStruct, on any mesh. Leaves
        without a sharding are replicated over the mesh of the others.
      refusals: stored metadata -> one line per value that does not fit.
      step: restore this step only.
      partial: `like` is a dict of some of the state's fields, such as "model".
        The others are neither read nor verified.

    Returns:
      (state, metadata, step), or None if the folder holds no step.

    Raises:
      CheckpointError: leaves or metadata do not fit; the message gives both
        values. Or no step is whole; the message gives each step's fault.
    """
    self.wait()
    if step is None and not self._fallback.candidates():
      return None
    return self._fallback.read(
      step, lambda number: self._read(number, like, refusals, partial)
    )

  def metadata(self, step: int | None = None) -> dict:
    """The metadata of `step`, or of the newest whole step."""
    self.wait()
    return self._fallback.read(
      step, lambda n: self._fallback.record(n)["metadata"]
    )

  def check(self, refusals: Callable[[dict], list[str]]) -> None:
    """Compares the newest metadata that are whole; reads no arrays.

    What else may be wrong with a step, `restore` says.

    Args:
      refusals: as in `restore`.

    Raises:
      CheckpointError: the metadata do not fit.
    """
    self.wait()
    for step in reversed(self._fallback.candidates()):
      try:
        self._check(step, refusals)
        return
      except (reader.Damaged, reader.ReadFailed):
        continue

  def newest(self) -> int:
    """The newest step whose metadata are whole."""
    self.wait()
    return self._fallback.read(None, lambda n: self._fallback.record(n)["step"])

  def steps(self) -> list[int]:
    """Steps that are complete on disk, oldest first."""
    self.wait()
    return self._fallback.steps()

  def wait(self) -> None:
    """Waits until no save is running.

    Raises:
      CheckpointError: the save failed. Or it was the first one, and its record
        or its smallest array could not be read back.
    """
    if self._pending is None:
      return
    step = self._pending
    try:
      self._writer.wait_until_finished()
    except Exception as error:  # of the background thread, so of any type
      self._fail(step, error)
    self._pending = None
    if self._sample:
      self._prove(step, *self._sample)

  def close(self) -> None:
    """Waits for a running save, then ends orbax's threads."""
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
    """Makes `close` skip waiting, because a process that it needs is gone."""
    self._abandoned, self._pending = True, None

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *_) -> None:
    if kind:  # an error: the other processes may not take part in reading back
      self._sample = None
    self.close()

  def _read(self, step, like, refusals, partial) -> tuple:
    """What `restore` returns, of one step.

    Raises:
      CheckpointError: leaves or metadata do not fit.
      reader.Damaged, reader.ReadFailed: of this step; others may be whole.
    """
    arrays, leaves = integrity.flatten(like)
    targets = integrity.targets(arrays)
    record = self._check(step, refusals)
    subject = f"checkpoint {step} in {self._folder}"
    stored = record["arrays"]
    if partial:
      stored = {n: e for n, e in stored.items() if n.split("/")[0] in like}
    if lines := integrity.differing_leaves(stored, targets, leaves):
      raise CheckpointError(f"{subject} does not fit: {'; '.join(lines)}")
    loaded = self._reader.arrays(step, record, targets)
    for name, entry in stored.items():
      if "key" in entry:
        loaded[name] = jax.random.wrap_key_data(loaded[name], impl=entry["key"])
    state = jax.tree.unflatten(
      jax.tree.structure(like), [loaded[name] for name in leaves]
    )
    return state, record["metadata"], step

  def _check(self, step, refusals) -> dict:
    """The record of one step; raises CheckpointError if it is refused."""
    record = self._fallback.record(step)
    if lines := refusals(record["metadata"]):
      raise CheckpointError(
        f"checkpoint {step} in {self._folder} (the first) does not fit this "
        f"run (the second): {'; '.join(lines)}. Take a new folder, or the "
        "first's settings"
      )
    return record

  def _begin_writing(self) -> None:
    """Opens the writer and sets damaged steps aside.

    Only a save does this, so that reading never changes the folder.
    """
    if not self._writer:
      self._writer = storage.open_writer(self._folder, self._keep)
    if self._fallback.damaged:
      multihost_utils.sync_global_devices("damaged checkpoints")
      if jax.process_index() == 0:
        storage.set_aside(self._folder, self._fallback.damaged)
      multihost_utils.sync_global_devices("damaged checkpoints set aside")
      self._fallback.damaged.clear()
      self._writer.reload()

  def _is_saved(self, step: int, record: dict) -> bool:
    """Whether `step` exists with the arrays of `record`.

    Raises:
      ValueError: it has other arrays, or there is a later step.
    """
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
    """Reads back the record and the array `targets` of a step just saved."""
    self._sample = None
    try:
      if self._reader.record(step)["arrays"] != record["arrays"]:
        raise reader.Damaged("its record is not the one that was written")
      self._reader.arrays(step, record, targets)
    except (reader.Damaged, reader.ReadFailed) as error:
      raise CheckpointError(
        f"checkpoint {step} was saved in {self._folder}, but cannot be read "
        f"back: {error}. Take a workdir on another path or file system"
      ) from error
    self._proven = True

  def _fail(self, step: int, error: Exception) -> None:
    """Closes the writer and raises CheckpointError for `error`."""
    self._pending = self._sample = None
    # Some writes end after `close`: silence their logs until the program ends.
    atexit.register(self._resources.pop_all().close)
    if jax.process_count() > 1:
      self.abandon()  # `close` would wait for the other processes
    elif self._writer:
      # The next save opens a new writer, which removes the incomplete step.
      self._writer.close()
      self._writer = None
    raise CheckpointError(
      f"checkpoint {step} was not saved in {self._folder}: "
      f"{storage.line(error)}"
    ) from error
