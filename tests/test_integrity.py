"""Checksums see every change, and no damage goes unnoticed."""

import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.checkpoint import integrity
from tests import states

pytestmark = states.pytestmark
folder, two_steps = states.folder, states.two_steps
warnings = states.warnings


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


def is_read(folder, victim):
  """Whether step 2 can not do without the file: orbax leaves some over."""
  away = victim.rename(victim.with_name("away"))
  fell_back = states.restored(folder) == 1
  away.rename(victim)
  return fell_back


@pytest.mark.slow
def test_flipped_bits(folder, warnings):
  """200 flips in array data, 60 elsewhere: never a wrong value."""
  files = [f for f in states.files_of(folder, 2) if f.stat().st_size]
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
    found.append(states.restored(folder) == 1)
    victim.write_bytes(good)
  sums = sum("has checksum" in line for line in warnings)
  print(
    f"flips found: {sum(found[:200])} of 200 in data ({sums} by checksum), "
    f"{sum(found[200:])} of 60 elsewhere; wrong values: 0"
  )
  assert states.restored(folder) == 2
  # The values, 48 KiB, do not compress; the rest of the files is a few KiB of
  # which parts are not read. So nine flips in ten at least hit a value.
  assert sum(found[:200]) >= 180
  assert sums > 0


@pytest.mark.parametrize("kind", ["delete", "empty", "half", "zeros"])
def test_lost_files(folder, kind, warnings):
  fell_back = []
  for victim in states.files_of(folder, 2):
    good = victim.read_bytes()
    if kind == "delete":
      victim.unlink()
    else:
      half = good[: len(good) // 2]
      victim.write_bytes(
        {"empty": b"", "half": half, "zeros": bytes(len(good))}[kind]
      )
    if states.restored(folder) == 1:
      fell_back.append(victim.name)
    victim.write_bytes(good)
  print(kind, len(fell_back), "of", len(states.files_of(folder, 2)), fell_back)
  assert fell_back


def test_lost_folders(folder, warnings):
  folders = [p for p in (folder / "2").rglob("*") if p.is_dir()]
  for victim in [folder / "2", *folders]:
    shutil.move(victim, folder.parent / "away")
    if victim == folder / "2":
      victim.mkdir()
    assert states.restored(folder) in (1, 2)
    if victim == folder / "2":
      victim.rmdir()
    shutil.move(folder.parent / "away", victim)
  assert states.restored(folder) == 2
