"""Checkpoints: bit-equal round trips, and no damage that goes unnoticed."""

import errno
import logging
import os
import random
import re
import resource
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mtp_jax.checkpoint import checkpoints, fallback, integrity, reader, storage
from mtp_jax.train import resume

# Reads that orbax abandons when a file is damaged complain when collected.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::RuntimeWarning"
)

META = {
  "config": {"model": {"width": 64, "head": "causal"}, "train": {"steps": 9}},
  "tokenizer": "bytes-1",
  "data": "3f",
}


class Net(nnx.Module):
  def __init__(self, key):
    self.w = nnx.Param(jax.random.normal(key, (61, 67)), axes=("embed", "mlp"))
    self.b = nnx.Param(jax.random.normal(key, (7,), jnp.bfloat16), axes=(None,))


def make_state(seed):
  net, tx = Net(jax.random.key(seed)), optax.adamw(1e-3)
  gradient = Net(jax.random.key(seed + 100))
  return {
    "model": net,
    "opt": tx.update(gradient, tx.init(net), net)[1],
    "key": jax.random.key(seed + 1),
    "flags": jax.random.bernoulli(jax.random.key(seed), 0.5, (11,)),
    "step": jnp.int32(seed),
  }


def raw(tree):
  """Every leaf as (dtype, bytes), so that NaN and -0 count too."""
  leaves = [
    jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    else x
    for x in jax.tree.leaves(tree)
  ]
  return [(str(x.dtype), x.shape, np.asarray(x).tobytes()) for x in leaves]


@pytest.fixture
def warnings(monkeypatch):
  """What the module itself warns of; orbax writes to the same logger."""
  lines = []

  def warning(text, *values):
    line = text % values if values else text
    if "damaged" in line:
      lines.append(line)

  monkeypatch.setattr(fallback.logging, "warning", warning)
  return lines


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two") / "steps"
  with checkpoints.Checkpoints(folder) as saved:
    for step in (1, 2):
      saved.save(step, make_state(step), META)
  return folder


@pytest.fixture
def folder(two_steps, tmp_path):
  return shutil.copytree(two_steps, tmp_path / "steps")


def restored(folder):
  """The step that a new process would go on from; its values are right."""
  with checkpoints.Checkpoints(folder) as saved:
    state, _, step = saved.restore(jax.eval_shape(make_state, 0))
  assert raw(state) == raw(make_state(step))
  return step


def test_round_trip_keeps_bits_and_types(tmp_path):
  state = make_state(3)
  odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32)
  state["odd"] = odd
  with checkpoints.Checkpoints(tmp_path / "c") as saved:
    assert saved.restore(state) is None
    assert saved.steps() == []
    saved.save(7, state, META, wait=True)
    got, metadata, step = saved.restore(
      state, refusals=lambda m: resume.differences(m, META)
    )
  assert (metadata, step) == (META, 7)
  assert jax.tree.structure(got) == jax.tree.structure(state)
  assert type(got["opt"][0]) is optax.ScaleByAdamState
  assert got["model"].w.get_metadata("axes") == ("embed", "mlp")
  assert raw(got) == raw(state)


def test_keeps_the_newest(tmp_path):
  with checkpoints.Checkpoints(tmp_path, keep=2) as saved:
    for step in (1, 5, 9, 13):
      saved.save(step, make_state(step), {"at": step})
    assert saved.steps() == [9, 13]
    assert saved.metadata() == {"at": 13}
    assert saved.metadata(9) == {"at": 9}
    assert saved.restore(make_state(0), step=9)[2] == 9
    with pytest.raises(checkpoints.CheckpointError, match=r"5.*\[9, 13\]"):
      saved.restore(make_state(0), step=5)
  with pytest.raises(ValueError, match="keep is 0"):
    checkpoints.Checkpoints(tmp_path, keep=0)
  with pytest.raises(ValueError, match="path is empty"):
    checkpoints.Checkpoints("")


def test_a_step_is_written_once(folder):
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(2, make_state(2), META)  # the same: nothing to do
    for step, seed in ((2, 3), (1, 1)):
      with pytest.raises(checkpoints.CheckpointError, match="step 2 is there"):
        saved.save(step, make_state(seed), META)
    saved.save(3, make_state(3), META)
    assert saved.steps() == [1, 2, 3]


def test_donation_after_save(tmp_path):
  """Accelerators copy to the host inside `save`; on CPU, where orbax holds a
  view, the runtime turns the donation into a copy while the view lives."""
  state = {"w": jax.random.normal(jax.random.key(0), (1009, 1013))}
  want = np.array(state["w"])
  erase = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  with checkpoints.Checkpoints(tmp_path) as saved:
    for step in range(3):
      saved.save(step, state, {})
      erased = erase(state)
      assert not np.asarray(erased["w"]).any()
      got, _, _ = saved.restore({"w": want})
      np.testing.assert_array_equal(got["w"], want)
      state = {"w": jnp.array(want)}


def test_a_newer_format_is_refused_and_no_older_step_stands_in(
  tmp_path, monkeypatch
):
  """A record without a number, as at first, has format 1."""
  state, seal = {"w": jnp.ones(3)}, integrity.seal

  def unnumbered(entries):
    return seal({k: v for k, v in entries.items() if k != "format"})

  with checkpoints.Checkpoints(tmp_path) as saved:
    with monkeypatch.context() as patch:
      patch.setattr(integrity, "seal", unnumbered)
      saved.save(1, state, META, wait=True)
      assert "format" not in saved._reader.record(1)
    assert saved.restore(state)[1:] == (META, 1)
    with monkeypatch.context() as patch:
      patch.setattr(checkpoints.config, "FORMAT", 2)
      saved.save(2, state, META, wait=True)
      assert saved.restore(state)[1:] == (META, 2)
    before = sorted(tmp_path.rglob("*"))
    line = (
      f"checkpoint 2 in {tmp_path} has format 2, and this version of mtp_jax "
      "reads formats up to 1: install the version that wrote it"
    )
    for read in (lambda: saved.restore(state), saved.metadata):
      with pytest.raises(checkpoints.CheckpointError) as error:
        read()
      assert str(error.value) == line
  assert sorted(tmp_path.rglob("*")) == before


def test_mismatches_are_named(folder):
  """A checkpoint of another run is no damage: nothing falls back."""
  other = {
    "config": {"model": {"width": 96, "head": "causal"}},
    "tokenizer": "bytes-2",
  }
  with checkpoints.Checkpoints(folder) as saved:
    like = make_state(0)
    with pytest.raises(checkpoints.CheckpointError) as error:
      saved.restore(like, refusals=lambda m: resume.differences(m, other))
    for text in ("checkpoint 2", "model.width: 64", "96", "bytes-1", "bytes-2"):
      assert text in str(error.value)
    assert "head" not in str(error.value)
    like["step"] = jnp.float32(0)
    like["flags"] = jnp.zeros((12,), bool)
    like["more"] = like.pop("key")
    with pytest.raises(checkpoints.CheckpointError) as error:
      saved.restore(like)
    for text in (
      "step: int32[] is stored, float32[] is wanted",
      "flags: bool[11] is stored, bool[12] is wanted",
      "more: nothing is stored",
      "key: key<fry>[2] is stored, nothing",
    ):
      assert text in str(error.value)


def test_checksum_sees_every_bit():
  """One word changed in any dtype changes both sums."""
  rng = random.Random(0)
  for dtype in ("float32", "bfloat16", "int8", "uint16", "int32", "bool"):
    x = np.asarray(jax.random.normal(jax.random.key(0), (5, 7, 11)) * 9)
    x = np.asarray(jnp.asarray(x).astype(dtype))
    bits = 1 if dtype == "bool" else 8 * x.dtype.itemsize
    variants = [x]
    for _ in range(12):
      y = x.copy()
      index, bit = rng.randrange(x.size), rng.randrange(bits)
      y.reshape(-1).view(np.uint8)[index * x.dtype.itemsize + bit // 8] ^= (
        1 << bit % 8
      )
      variants.append(y)
    sums = integrity.checksums(variants)
    assert all(s[:8] != sums[0][:8] for s in sums[1:])
    assert all(s[8:] != sums[0][8:] for s in sums[1:])
  x = jax.random.normal(jax.random.key(0), (5, 7, 11))
  two_signs = x.at[0, 0, :2].multiply(-1)
  for y in (x[:, ::-1], x.swapaxes(0, 1).reshape(x.shape), two_signs, -x):
    assert integrity.checksums([y]) != integrity.checksums([x])


def test_checksum_needs_no_memory():
  arrays = [
    jax.ShapeDtypeStruct((2048, 1031), dtype)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float32)
  ]
  used = integrity._sums.lower(arrays).compile().memory_analysis()
  assert used.temp_size_in_bytes < 2**16


def files_of(folder, step):
  return sorted(p for p in (folder / str(step)).rglob("*") if p.is_file())


def is_read(folder, victim):
  """Whether step 2 can not do without the file: orbax leaves some over."""
  away = victim.rename(victim.with_name("away"))
  fell_back = restored(folder) == 1
  away.rename(victim)
  return fell_back


def test_flipped_bits(folder, warnings):
  """200 flips in array data, 60 elsewhere: never a wrong value."""
  files = [f for f in files_of(folder, 2) if f.stat().st_size]
  data = [f for f in files if f.parent.name == "d" and is_read(folder, f)]
  rest = [f for f in files if f not in data]
  warnings.clear()
  rng = random.Random(0)
  sizes = [f.stat().st_size for f in data]
  found = []
  for victim in rng.choices(data, sizes, k=200) + rng.choices(rest, k=60):
    good = victim.read_bytes()
    bad = bytearray(good)
    bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    victim.write_bytes(bad)
    found.append(restored(folder) == 1)
    victim.write_bytes(good)
  sums = sum("has checksum" in line for line in warnings)
  print(
    f"flips found: {sum(found[:200])} of 200 in data ({sums} by checksum), "
    f"{sum(found[200:])} of 60 elsewhere; wrong values: 0"
  )
  assert restored(folder) == 2
  # The values, 48 KiB, do not compress; the rest of the files is a few KiB of
  # which parts are not read. So nine flips in ten at least hit a value.
  assert sum(found[:200]) >= 180
  assert sums > 0


@pytest.mark.parametrize("kind", ["delete", "empty", "half", "zeros"])
def test_lost_files(folder, kind, warnings):
  fell_back = []
  for victim in files_of(folder, 2):
    good = victim.read_bytes()
    if kind == "delete":
      victim.unlink()
    else:
      half = good[: len(good) // 2]
      victim.write_bytes(
        {"empty": b"", "half": half, "zeros": bytes(len(good))}[kind]
      )
    if restored(folder) == 1:
      fell_back.append(victim.name)
    victim.write_bytes(good)
  print(kind, len(fell_back), "of", len(files_of(folder, 2)), fell_back)
  assert fell_back


def test_lost_folders(folder, warnings):
  folders = [p for p in (folder / "2").rglob("*") if p.is_dir()]
  for victim in [folder / "2", *folders]:
    shutil.move(victim, folder.parent / "away")
    if victim == folder / "2":
      victim.mkdir()
    assert restored(folder) in (1, 2)
    if victim == folder / "2":
      victim.rmdir()
    shutil.move(folder.parent / "away", victim)
  assert restored(folder) == 2


def flip_weights(folder, step):
  """Flips a bit of the weights of one step and of nothing else."""
  largest = max(
    (f for f in files_of(folder, step) if f.parent.name == "d"),
    key=lambda f: f.stat().st_size,
  )
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 16
  largest.write_bytes(data)


def test_falls_back_and_goes_on(folder, warnings):
  flip_weights(folder, 2)
  with checkpoints.Checkpoints(folder, keep=2) as saved:
    with pytest.raises(checkpoints.CheckpointError, match="2 is damaged"):
      saved.restore(make_state(0), step=2)
    assert saved.restore(make_state(0))[2] == 1
    line = warnings[-1]
    assert "checkpoint 2 is damaged: " in line
    assert re.search(r"array (model|opt/0/.u)/w/value has checksum", line), line
    assert saved.steps() == [1, 2]  # reading removes nothing
    saved.save(2, make_state(2), META, wait=True)
    assert restored(folder) == 2
    assert (folder / "damaged-2").is_dir()
    for step in (1, 2):
      flip_weights(folder, step)
    with pytest.raises(checkpoints.CheckpointError) as error:
      saved.restore(make_state(0))
    for text in ("checkpoint 2 is damaged", "checkpoint 1 is damaged"):
      assert text in str(error.value)


def test_disk_full(folder, orbax_lines):
  """A limit on the size of files stands for the full disk: the same call
  fails at the same place (EFBIG for ENOSPC)."""
  big = {"w": jax.random.normal(jax.random.key(0), (499, 503))}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(3, make_state(3), META)  # the first save waits, later ones not
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
      saved.save(4, big, META)
      with pytest.raises(checkpoints.CheckpointError) as error:
        saved.save(5, big, META)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for text in ("checkpoint 4 was not saved in", str(folder), "too large"):
      assert text in str(error.value)
    assert saved.steps() == [1, 2, 3]
    assert saved.restore(make_state(0))[2] == 3
    saved.save(5, big, META, wait=True)
    assert raw(saved.restore(big)[0]) == raw(big)
  assert not orbax_lines  # each thread would tell of it, with a traceback
  assert sorted(os.listdir(folder)) == ["2", "3", "5"]


def test_only_the_caller_tells_of_a_failed_save(monkeypatch):
  """tensorstore's late writes and asyncio's lost tasks say nothing; other
  libraries are heard as ever."""
  heard = []

  def hook(failure):
    heard.append(str(failure.exc_value))

  def fail(text):
    failure = dict(exc_value=RuntimeError(text), exc_traceback=None)
    sys.unraisablehook(types.SimpleNamespace(**failure))

  monkeypatch.setattr(sys, "unraisablehook", hook)
  tasks = logging.getLogger("asyncio")
  handler = logging.Handler()
  handler.emit = lambda line: heard.append(line.getMessage())
  tasks.addHandler(handler)
  try:
    with storage.quiet():
      for text in ("Event loop is closed", "ours"):
        fail(text)
      for text in ("Task <site-packages/orbax/checkpoint/x.py>", "Task <y.py>"):
        tasks.error(text)
    assert heard == ["ours", "Task <y.py>"]
    fail("Event loop is closed")
    assert heard.pop() == "Event loop is closed"
  finally:
    tasks.removeHandler(handler)


def test_a_thread_that_failed_waits_for_no_one(monkeypatch):
  """orbax's barrier in a `finally`, as its threads come to it."""
  waited = []
  monkeypatch.setattr(
    storage.multihost,
    "get_barrier_sync_fn",
    lambda: lambda key, timeout_ms: waited.append((key, timeout_ms)),
  )
  storage.barrier(key="a", timeout_ms=3)
  assert waited == [("a", 3)]
  with pytest.raises(OSError, match="no space"):
    try:
      raise OSError("no space")
    finally:
      storage.barrier(key="b", timeout_ms=3)
  assert waited == [("a", 3)]


def test_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with checkpoints.Checkpoints(tmp_path / "file" / "steps") as saved:
    with pytest.raises(
      checkpoints.CheckpointError, match="checkpoint 5 .*file"
    ):
      saved.save(5, make_state(0), META)


@pytest.fixture
def orbax_lines():
  """What orbax logs from here on, and would print without any setting."""
  lines, handler = [], logging.Handler(logging.WARNING)

  def emit(line):
    if "/orbax/" in line.pathname:
      lines.append(line.getMessage())

  handler.emit = emit
  logger = logging.getLogger("absl")
  logger.addHandler(handler)
  yield lines
  logger.removeHandler(handler)


NAMES = (
  "lr[3e-4]", "a[b]", "run[0-9]", "[!x]", "[[]", "a[b", "a*b", "a?b", "{a}",
  " end ", "a%20b", "a#b", "a\nb", "a'b\"c", "$HOME", "a:b", "s3:/w",
  "x/../y", "ü日",
)  # fmt: skip


def test_any_path_can_be_read_back(tmp_path):
  state = {"w": jnp.arange(5.0)}
  for name in NAMES:
    with checkpoints.Checkpoints(tmp_path / name / "c") as saved:
      saved.save(1, state, {}, wait=True)
    with checkpoints.Checkpoints(tmp_path / name / "c") as saved:
      assert raw(saved.restore(state)[0]) == raw(state)


def test_paths_that_orbax_cannot_write_to(tmp_path):
  for name, why in (
    ("a\\b", "a backslash"),
    ("a\udcff", "not valid UTF-8"),
    ("gs:/w", "whose name ends in 'gs:'"),
    ("w/logs:", "whose name ends in 'gs:'"),
  ):
    with pytest.raises(ValueError, match=why):
      checkpoints.Checkpoints(tmp_path / name)


def test_a_path_through_a_link_is_the_systems(tmp_path):
  """link/.. is beside what the link leads to, not beside the link."""
  (tmp_path / "far" / "home").mkdir(parents=True)
  (tmp_path / "link").symlink_to(tmp_path / "far" / "home")
  with checkpoints.Checkpoints(tmp_path / "link" / ".." / "c") as saved:
    saved.save(1, {"w": jnp.arange(5.0)}, {})
  assert (tmp_path / "far" / "c" / "1").is_dir()


def test_what_cannot_be_read_back_stops_the_first_save(tmp_path, monkeypatch):
  """As orbax alone saves below a folder with brackets."""
  monkeypatch.delattr(storage._Path, "glob")
  state = {"w": jnp.arange(5.0)}
  line = "checkpoint 1 was saved in .*, but cannot be read back: .*NOT_FOUND"
  with checkpoints.Checkpoints(tmp_path / "[a]") as saved:
    with pytest.raises(checkpoints.CheckpointError, match=line):
      saved.save(1, state, {})


def chained(error, cause):
  error.__cause__ = cause
  return error


FAILED_READS = (
  OSError(errno.EIO, "Input/output error"),
  OSError(errno.ESTALE, "Stale file handle"),
  PermissionError(errno.EACCES, "Permission denied"),
  TimeoutError(),
  MemoryError(),
  ValueError("UNKNOWN: Error reading local file [os_error_code='5']"),
  ValueError("UNAVAILABLE: 503"),
  RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
  chained(Exception("reading"), ValueError("ABORTED: [os_error_code='116']")),
)


def test_a_failed_read_is_no_damage(folder, monkeypatch):
  """Not of the record, not of the arrays: the run stops, the step stays."""
  with checkpoints.Checkpoints(folder) as saved:
    restore = saved._reader._restore
    for error in FAILED_READS:
      for item in ("state", "metadata"):

        def fail(step, error=error, item=item, **items):
          if step == 2 and item in items:
            raise error
          return restore(step, **items)

        monkeypatch.setattr(saved._reader, "_restore", fail)
        with pytest.raises(checkpoints.CheckpointError) as found:
          saved.restore(make_state(0))
        cause = str(error.__cause__ or error)
        for text in ("checkpoint 2 in ", "could not be read", cause):
          assert text in str(found.value)
    monkeypatch.undo()
    saved.save(3, make_state(3), META)
    assert saved.steps() == [1, 2, 3]


def test_a_folder_that_cannot_be_looked_into(folder, monkeypatch):
  """It does not count as empty: the run would begin again."""
  find, listing = os.stat, os.listdir

  def fail(path, *args, **kwargs):
    if os.fspath(path) in (str(folder), str(folder / "2")):
      raise PermissionError(errno.EACCES, "Permission denied", path)
    return {"stat": find, "listdir": listing}[name](path, *args, **kwargs)

  for name in ("stat", "listdir"):
    with checkpoints.Checkpoints(folder) as saved:
      with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        for ask in (lambda: saved.restore(make_state(0)), saved.steps):
          with pytest.raises(checkpoints.CheckpointError, match="denied"):
            ask()


def test_one_damaged_step_is_kept_aside(folder, warnings):
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(3, make_state(3), META)
  for victims, want, removed in (
    ((2, 3), "damaged-3", "2\n"),
    ((4,), "damaged-4", "damaged-3\n"),
  ):
    for step in victims:
      flip_weights(folder, step)
    with checkpoints.Checkpoints(folder) as saved:
      assert saved.restore(make_state(0))[2] == 1
      saved.save(4, make_state(4), META)
    assert sorted(os.listdir(folder)) == ["1", "4", want]
    assert (
      f"damaged checkpoint {victims[-1]} is set aside as {want}; older damaged "
      f"ones are removed: {removed}" in f"{warnings[-1]}\n"
    )
  (folder / "4").rename(folder / "away")
  (folder / "damaged-4").rename(folder / "4")
  flip_weights(folder, 4)  # the same bit: it is whole again
  assert restored(folder) == 4


def test_what_is_not_proven_damaged_is_never_removed(folder, monkeypatch):
  """Steps that fail for an unknown reason stay under another name."""
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(3, make_state(3), META)
  (folder / "unreadable-3").mkdir()
  (folder / "damaged-9").mkdir()
  with checkpoints.Checkpoints(folder) as saved:
    restore = saved._reader._restore
    errors = {
      2: OSError(errno.EINVAL, "Invalid argument"),
      3: RuntimeError("of an unknown kind"),
    }

    def fail(step, **items):
      if step in errors:
        raise errors[step]
      return restore(step, **items)

    monkeypatch.setattr(saved._reader, "_restore", fail)
    assert saved.restore(make_state(0))[2] == 1
    monkeypatch.undo()
    saved.save(4, make_state(4), META)
  assert sorted(os.listdir(folder)) == [
    "1",
    "4",
    "damaged-9",
    "unreadable-2",
    "unreadable-3",
    "unreadable-3-",
  ]
  shutil.rmtree(folder / "4")
  (folder / "unreadable-3-").rename(folder / "3")
  assert restored(folder) == 3


def test_reading_beside_a_run_that_keeps_one(folder, warnings, monkeypatch):
  """Each step is replaced while it is read, a few times or without end."""
  with checkpoints.Checkpoints(folder) as saved:
    left = 3

    def record(step):
      nonlocal left
      left -= 1
      if left < 0:
        return {"metadata": step}
      (folder / str(step)).rename(folder / str(step + 1))
      raise reader.Damaged("its files are gone")

    monkeypatch.setattr(saved._reader, "record", record)
    assert saved.metadata() == 2 + 3
    left = 1000
    with pytest.raises(checkpoints.CheckpointError, match="times a checkpoint"):
      saved.metadata()
  assert not warnings  # it was no damage


def test_a_step_removed_while_it_is_read(folder, monkeypatch):
  """Of a run that goes on beside: the step that was asked for is no damage."""
  with checkpoints.Checkpoints(folder) as saved:

    def record(step):
      shutil.rmtree(folder / str(step))
      raise reader.Damaged("its files are gone")

    monkeypatch.setattr(saved._reader, "record", record)
    line = r"no checkpoint 1 in .*; it holds \[2\]"
    with pytest.raises(checkpoints.CheckpointError, match=line):
      saved.metadata(1)


def test_a_step_removed_while_the_folder_is_listed(folder, monkeypatch):
  """orbax lists names first, and looks at each step afterwards."""
  fail = True
  reload = reader.ocp.CheckpointManager._load_checkpoint_infos

  def race(manager, *args, **kwargs):
    nonlocal fail
    fail = not fail
    if not fail:
      raise FileNotFoundError(errno.ENOENT, "No such file or directory")
    return reload(manager, *args, **kwargs)

  monkeypatch.setattr(
    reader.ocp.CheckpointManager, "_load_checkpoint_infos", race
  )
  assert restored(folder) == 2


def test_names_that_are_no_steps(folder):
  (folder / "7").write_text("a file")
  for name in ("notes", "²", "٣", "007"):
    (folder / name).mkdir()
  assert restored(folder) == 2
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(3, make_state(3), META)
    assert saved.steps() == [1, 2, 3]


def test_nothing_to_read_is_said_as_it_is(tmp_path):
  for folder, why in ((tmp_path, "it is empty"), (tmp_path / "a", "no such")):
    with checkpoints.Checkpoints(folder) as saved:
      with pytest.raises(checkpoints.CheckpointError, match=why):
        saved.metadata()


def test_reading_leaves_a_running_save_alone(folder):
  unfinished = folder / "3.orbax-checkpoint-tmp"
  unfinished.mkdir()
  assert restored(folder) == 2
  assert unfinished.exists()
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(4, make_state(4), META)
  assert not unfinished.exists()


MESHES = """
import jax, jax.numpy as jnp, numpy as np, sys
from mtp_jax.checkpoint import checkpoints, integrity
P, folder = jax.P, sys.argv[1]

def mesh(*shape):
  kinds = (jax.sharding.AxisType.Auto,) * 2
  devices = np.array(jax.devices()[: shape[0] * shape[1]])
  return jax.sharding.Mesh(
    devices.reshape(shape), ("data", "model"), axis_types=kinds
  )

def place(tree, m):
  specs = {"w": P("data", "model"), "v": P(None, ("data", "model")), "n": P()}
  return {k: jax.device_put(x, jax.NamedSharding(m, specs[k]))
          for k, x in tree.items()}

values = {
  "w": jax.random.normal(jax.random.key(0), (24, 40)),
  "v": jax.random.normal(jax.random.key(1), (3, 16), jnp.bfloat16),
  "n": jnp.int32(5),
}
first = place(values, mesh(4, 2))
sums = integrity.checksums(list(first.values()))
with checkpoints.Checkpoints(folder) as saved:
  saved.save(1, first, {})
  for shape in ((4, 2), (8, 1), (2, 4), (1, 1)):
    like = place(values, mesh(*shape))
    assert integrity.checksums(list(like.values())) == sums, shape
    got, _, _ = saved.restore(like)
    for name, x in got.items():
      assert x.sharding == like[name].sharding, (shape, name, x.sharding)
      assert x.dtype == values[name].dtype
      assert (np.asarray(x) == np.asarray(values[name])).all(), (shape, name)
  got, _, _ = saved.restore({**place(values, mesh(2, 4)), "n": jnp.int32(0)})
  assert got["n"].sharding.is_fully_replicated
  assert len(got["n"].devices()) == 8
  got, _, _ = saved.restore(jax.eval_shape(lambda: values))
  assert got["w"].devices() == {jax.devices()[0]}
print("equal")
"""


def test_meshes(run_with_devices, tmp_path):
  assert run_with_devices(8, MESHES, str(tmp_path / "c")) == "equal\n"
