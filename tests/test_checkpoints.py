"""Checkpoints: bit-equal round trips, what is kept, what is refused."""

import logging
import os
import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mtp_jax.checkpoint import checkpoints, integrity, reader
from mtp_jax.train import resume
from tests import states

pytestmark = states.pytestmark
folder, two_steps = states.folder, states.two_steps
warnings = states.warnings


def test_round_trip_keeps_bits_and_types(tmp_path):
  state = states.make_state(3)
  odd = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32)
  state["odd"] = odd
  with checkpoints.Checkpoints(tmp_path / "c") as saved:
    assert saved.restore(state) is None
    assert saved.steps() == []
    saved.save(7, state, states.META, wait=True)
    got, metadata, step = saved.restore(
      state, refusals=lambda m: resume.differences(m, states.META)
    )
  assert (metadata, step) == (states.META, 7)
  assert jax.tree.structure(got) == jax.tree.structure(state)
  assert type(got["opt"][0]) is optax.ScaleByAdamState
  assert got["model"].w.get_metadata("axes") == ("embed", "mlp")
  assert states.raw(got) == states.raw(state)


def test_a_part_is_restored_without_reading_the_rest(folder, monkeypatch):
  state, names = states.make_state(2), []
  part, arrays = {"model": state["model"]}, reader.Reader.arrays

  def seen(self, step, record, targets):
    names.extend(targets)
    return arrays(self, step, record, targets)

  monkeypatch.setattr(reader.Reader, "arrays", seen)
  with checkpoints.Checkpoints(folder) as saved:
    got, metadata, step = saved.restore(part, partial=True)
    assert (metadata, step) == (states.META, 2)
    assert states.raw(got) == states.raw(part)
    assert names and all(name.startswith("model/") for name in names)
    with pytest.raises(checkpoints.CheckpointError, match="does not fit: flag"):
      saved.restore(part)  # not asked for by `partial`
    less = {"model": {"w": state["model"].w[...]}}
    with pytest.raises(checkpoints.CheckpointError, match="b/value: bfloat16"):
      saved.restore(less, partial=True)
    monkeypatch.setattr(integrity, "checksums", lambda a: ["0"] * len(a))
    with pytest.raises(checkpoints.CheckpointError, match="damaged.*model/"):
      saved.restore(part, partial=True)


def test_keeps_the_newest(tmp_path):
  with checkpoints.Checkpoints(tmp_path, keep=2) as saved:
    for step in (1, 5, 9, 13):
      saved.save(step, states.make_state(step), {"at": step})
    assert saved.steps() == [9, 13]
    assert saved.metadata() == {"at": 13}
    assert saved.metadata(9) == {"at": 9}
    assert saved.restore(states.make_state(0), step=9)[2] == 9
    with pytest.raises(checkpoints.CheckpointError, match=r"5.*\[9, 13\]"):
      saved.restore(states.make_state(0), step=5)
  with pytest.raises(ValueError, match="keep is 0"):
    checkpoints.Checkpoints(tmp_path, keep=0)
  with pytest.raises(ValueError, match="path is empty"):
    checkpoints.Checkpoints("")


def test_a_step_is_written_once(folder):
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(2, states.make_state(2), states.META)  # the same: nothing to do
    for step, seed in ((2, 3), (1, 1)):
      with pytest.raises(checkpoints.CheckpointError, match="step 2 is there"):
        saved.save(step, states.make_state(seed), states.META)
    saved.save(3, states.make_state(3), states.META)
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
      saved.save(1, state, states.META, wait=True)
      assert "format" not in saved._reader.record(1)
    assert saved.restore(state)[1:] == (states.META, 1)
    with monkeypatch.context() as patch:
      patch.setattr(checkpoints.config, "FORMAT", 2)
      saved.save(2, state, states.META, wait=True)
      assert saved.restore(state)[1:] == (states.META, 2)
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


def test_the_newest_whole_metadata_are_compared(folder):
  other = {"tokenizer": "bytes-2"}
  with checkpoints.Checkpoints(folder) as saved:
    for step in (2, 1):
      with pytest.raises(
        checkpoints.CheckpointError, match=f"checkpoint {step} .*bytes-1"
      ):
        saved.check(lambda m: resume.differences(m, other))
      (folder / f"{step}" / "metadata" / "metadata").write_text("{")
    saved.check(lambda m: resume.differences(m, other))


def test_mismatches_are_named(folder):
  """A checkpoint of another run is no damage: nothing falls back."""
  other = {
    "config": {"model": {"width": 96, "head": "causal"}},
    "tokenizer": "bytes-2",
  }
  with checkpoints.Checkpoints(folder) as saved:
    like = states.make_state(0)
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


def test_falls_back_and_goes_on(folder, warnings):
  states.flip_weights(folder, 2)
  with checkpoints.Checkpoints(folder, keep=2) as saved:
    with pytest.raises(checkpoints.CheckpointError, match="2 is damaged"):
      saved.restore(states.make_state(0), step=2)
    assert saved.restore(states.make_state(0))[2] == 1
    line = warnings[-1]
    assert "checkpoint 2 is damaged: " in line
    assert re.search(r"array (model|opt/0/.u)/w/value has checksum", line), line
    assert saved.steps() == [1, 2]  # reading removes nothing
    saved.save(2, states.make_state(2), states.META, wait=True)
    assert states.restored(folder) == 2
    assert (folder / "damaged-2").is_dir()
    for step in (1, 2):
      states.flip_weights(folder, step)
    with pytest.raises(checkpoints.CheckpointError) as error:
      saved.restore(states.make_state(0))
    for text in ("checkpoint 2 is damaged", "checkpoint 1 is damaged"):
      assert text in str(error.value)


def test_disk_full(folder, orbax_lines):
  """A limit on the size of files stands for the full disk: the same call
  fails at the same place (EFBIG for ENOSPC)."""
  big = {"w": jax.random.normal(jax.random.key(0), (499, 503))}
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoints.Checkpoints(folder) as saved:
    # The first save waits, later ones do not.
    saved.save(3, states.make_state(3), states.META)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
      saved.save(4, big, states.META)
      with pytest.raises(checkpoints.CheckpointError) as error:
        saved.save(5, big, states.META)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    for text in ("checkpoint 4 was not saved in", str(folder), "too large"):
      assert text in str(error.value)
    assert saved.steps() == [1, 2, 3]
    assert saved.restore(states.make_state(0))[2] == 3
    saved.save(5, big, states.META, wait=True)
    assert states.raw(saved.restore(big)[0]) == states.raw(big)
  assert not orbax_lines  # each thread would tell of it, with a traceback
  assert sorted(os.listdir(folder)) == ["2", "3", "5"]


def test_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("in the way")
  with checkpoints.Checkpoints(tmp_path / "file" / "steps") as saved:
    with pytest.raises(
      checkpoints.CheckpointError, match="checkpoint 5 .*file"
    ):
      saved.save(5, states.make_state(0), states.META)


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


def test_one_damaged_step_is_kept_aside(folder, warnings):
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(3, states.make_state(3), states.META)
  for victims, want, removed in (
    ((2, 3), "damaged-3", "2\n"),
    ((4,), "damaged-4", "damaged-3\n"),
  ):
    for step in victims:
      states.flip_weights(folder, step)
    with checkpoints.Checkpoints(folder) as saved:
      assert saved.restore(states.make_state(0))[2] == 1
      saved.save(4, states.make_state(4), states.META)
    assert sorted(os.listdir(folder)) == ["1", "4", want]
    assert (
      f"damaged checkpoint {victims[-1]} is set aside as {want}; older damaged "
      f"ones are removed: {removed}" in f"{warnings[-1]}\n"
    )
  (folder / "4").rename(folder / "away")
  (folder / "damaged-4").rename(folder / "4")
  states.flip_weights(folder, 4)  # the same bit: it is whole again
  assert states.restored(folder) == 4


def test_reading_leaves_a_running_save_alone(folder):
  unfinished = folder / "3.orbax-checkpoint-tmp"
  unfinished.mkdir()
  assert states.restored(folder) == 2
  assert unfinished.exists()
  with checkpoints.Checkpoints(folder) as saved:
    saved.save(4, states.make_state(4), states.META)
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
