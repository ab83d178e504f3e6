"""Checkpoints: orbax writes them, a checksum per array guards them.

A state is stored flat, one array per key path ("model/trunk/wq/value"), so a
file can be read without the classes that made it. Beside the arrays lies one
JSON record: the caller's metadata and, for every array, its dtype, shape and
checksum. orbax alone restores a flipped bit, and casts a dtype, in silence.
"""

import hashlib
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from mtp_jax import config as config_lib


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
    self._writes = False
    self._manager = self._open(read_only=True)

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
        nothing was started now. Earlier steps stay; save may be called again.
    """
    self.wait()
    arrays, leaves = _flatten(state)
    sums = checksums(list(arrays.values()))
    record = _seal(
      {
        "step": step,
        "metadata": metadata,
        "arrays": {
          name: _describe(array, leaves[name], checksum)
          for (name, array), checksum in zip(arrays.items(), sums, strict=True)
        },
      }
    )
    try:
      self._begin_writing()
      if self._is_there(step, record):
        return
      self._pending = step
      self._manager.save(
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
    arrays, leaves = _flatten(like)
    targets = _targets(arrays)

    def read(number):
      record = self._record(number)
      where = f"checkpoint {number} in {self._folder}"
      if expect:
        _check_metadata(where, record["metadata"], expect)
      _check_leaves(where, record["arrays"], targets, leaves)
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
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def wait(self) -> None:
    """Returns when nothing is being written; CheckpointError if it failed."""
    if self._pending is None:
      return
    try:
      self._manager.wait_until_finished()
    except Exception as error:  # what the background thread met, of any type
      self._fail(self._pending, error)
    self._pending = None

  def close(self) -> None:
    """Waits, then lets go of orbax's threads."""
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _open(self, read_only: bool) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=None if read_only else self._keep,
        save_interval_steps=0 if read_only else 1,
        create=not read_only,
        read_only=read_only,
        cleanup_tmp_directories=not read_only,
      ),
    )

  def _begin_writing(self) -> None:
    """A manager that may write: a mere reader never cleans a folder up."""
    if not self._writes:
      manager = self._open(read_only=False)
      self._manager.close()
      self._manager, self._writes = manager, True
    if self._damaged:
      multihost_utils.sync_global_devices("damaged checkpoints")
      for step in sorted(self._damaged):
        logging.warning("removing damaged checkpoint %d", step)
        if jax.process_index() == 0:
          (self._folder / str(step)).rmtree(missing_ok=True)
      multihost_utils.sync_global_devices("damaged checkpoints removed")
      self._damaged.clear()
      self._manager.reload()

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
    self._manager.close()  # the next save opens anew and clears the remains
    self._manager, self._writes = self._open(read_only=True), False
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
      record = self._manager.restore(step, args=args)["metadata"]
      if _seal(record)["seal"] != record["seal"] or record["step"] != step:
        raise ValueError("metadata: checksum differs")
    except Exception as error:  # damage surfaces as any type
      fault = _line(error)
    _raise_together(fault)
    return record

  def _arrays(self, step: int, record: dict, targets: dict) -> dict:
    loaded, fault = None, ""
    try:
      args = ocp.args.Composite(state=ocp.args.StandardRestore(targets))
      loaded = self._manager.restore(step, args=args)["state"]
    except Exception as error:  # damage surfaces as any type
      fault = _line(error)
    _raise_together(fault)
    found = checksums([loaded[name] for name in targets])
    faults = [
      f"array {name} has checksum {checksum}, "
      f"stored is {record['arrays'][name]['checksum']}"
      for name, checksum in zip(targets, found, strict=True)
      if checksum != record["arrays"][name]["checksum"]
    ]
    _raise_together("; ".join(faults))
    return loaded


def checksums(arrays: list[jax.Array]) -> list[str]:
  """A checksum per array, the same for every sharding and process count.

  Each array becomes uint32 words w (8- and 16-bit values widened); its sums
  are Σ f(w[i], i) mod 2^32 for two functions f, each one to one in w: a change
  to a single word, so any flipped bit, always changes both. f mixes all bits
  of w with the flat position i, so that other damage passes about once in
  2^64, flipped signs and swapped words too; Σ w[i]·h(i) with odd h(i) has the
  first property but misses every second flip of a top bit. Computed where the
  shards lie, in one call; no array is gathered. Beyond 2^32 elements positions
  repeat: exchanging two words that share one is not seen.

  Args:
    arrays: arrays of any shape and plain dtype, on the devices of one mesh.

  Returns:
    Per array 16 hexadecimal digits.
  """
  sums = jax.device_get(jax.block_until_ready(_sums(arrays)))
  return [f"{int(a):08x}{int(b):08x}" for a, b in sums]


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
  def one(x):
    if x.dtype == jnp.bool_:
      x = x.astype(jnp.uint8)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      x = jnp.stack([x.real, x.imag], -1)
    bits = min(jax.dtypes.itemsize_bits(x.dtype), 32)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    words = words.astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
      stride = math.prod(words.shape[axis + 1 :]) % 2**32
      index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
      position += index * jnp.uint32(stride)
    place = _mix(position + jnp.uint32(1))
    first = _mix(words ^ place)
    second = _mix(words * jnp.uint32(0x9E3779B1) + (place ^ position))
    # One reduction for both: two would keep `place` as an array in memory.
    zero, axes = jnp.uint32(0), tuple(range(words.ndim))
    return jax.lax.reduce(
      (first, second),
      (zero, zero),
      lambda a, b: (a[0] + b[0], a[1] + b[1]),
      axes,
    )

  return [one(x) for x in arrays]


def _mix(x: jax.Array) -> jax.Array:
  """Scatters uint32 bits one to one (the finaliser of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _flatten(tree) -> tuple[dict, dict]:
  """Plain arrays by key path, and the leaves that they stand for."""
  arrays, leaves = {}, {}
  for path, leaf in jax.tree.leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name in leaves:
      raise ValueError(f"two leaves share the key path {name!r}")
    leaves[name] = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
    arrays[name] = _key_data(leaf) if _is_key(leaf) else leaves[name]
  return arrays, leaves


def _is_key(leaf) -> bool:
  dtype = getattr(leaf, "dtype", None)
  return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _key_data(key):
  """The numbers of a typed random key, or their abstract form."""
  if isinstance(key, jax.Array):
    return jax.random.key_data(key)
  data = jax.eval_shape(jax.random.key_data, key)
  return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)


def _describe(array, leaf, checksum: str) -> dict:
  """What the record says of one array."""
  entry = {"dtype": str(leaf.dtype), "shape": list(array.shape)}
  if _is_key(leaf):
    entry["key"] = str(jax.random.key_impl(leaf))
  return entry | {"checksum": checksum}


def _targets(arrays: dict) -> dict:
  """Shape, dtype and sharding to restore each array with."""
  homes = [getattr(x, "sharding", None) for x in arrays.values()]
  meshes = [h.mesh for h in homes if isinstance(h, jax.NamedSharding)]
  if meshes:
    default = jax.NamedSharding(meshes[0], jax.P())
  else:
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  targets = {}
  for (name, array), home in zip(arrays.items(), homes, strict=True):
    if home is None or not getattr(array, "committed", True):
      home = default
    targets[name] = jax.ShapeDtypeStruct(
      array.shape, array.dtype, sharding=home
    )
  return targets


def _check_leaves(where: str, stored: dict, targets: dict, leaves: dict):
  """Refuses another set of leaves, another dtype or another shape."""
  have = {n: f"{e['dtype']}{e['shape']}" for n, e in stored.items()}
  want = {n: f"{leaves[n].dtype}{list(x.shape)}" for n, x in targets.items()}
  lines = [
    f"{name}: {have.get(name, 'nothing')} is stored, "
    f"{want.get(name, 'nothing')} is wanted"
    for name in sorted(have.keys() | want.keys())
    if have.get(name) != want.get(name)
  ]
  if lines:
    raise CheckpointError(f"{where} does not fit: {'; '.join(lines)}")


def _check_metadata(where: str, stored: dict, expect: dict) -> None:
  """Refuses metadata that differs on the keys of `expect`."""
  first, second = {}, {}

  def collect(section, old, new):
    for name, value in new.items():
      kept = old.get(name) if isinstance(old, dict) else None
      if isinstance(value, dict):
        collect(name if section == "" else f"{section}.{name}", kept, value)
      else:
        first.setdefault(section or "metadata", {})[name] = kept
        second.setdefault(section or "metadata", {})[name] = value

  collect("", stored, json.loads(json.dumps(expect)))
  lines = config_lib.differences(first, second)
  if lines:
    raise CheckpointError(
      f"{where} (the first) does not fit this run (the second): "
      + "; ".join(lines)
    )


def _seal(record: dict) -> dict:
  """The record with a digest of itself."""
  record = {name: value for name, value in record.items() if name != "seal"}
  text = json.dumps(record, sort_keys=True)
  digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
  return json.loads(text) | {"seal": digest}


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
