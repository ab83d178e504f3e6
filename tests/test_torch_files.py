"""Files of torch.save: read without torch, written; hostile ones refused."""

import builtins
import errno
import os
import pickle
import pickletools
import re
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mtp_jax.interchange import pickles, streaming, torch_files
from tests import meta_reference, transformers_reference

needs_torch = pytest.mark.skipif(
  not transformers_reference.has_transformers(), reason="needs torch"
)
DTYPES = ["float32", "float16", "bfloat16"]


def test_torchs_own_bytes_are_read():
  """Views of one storage, with strides and offsets, and three 16-bit dtypes."""
  found = torch_files.read(meta_reference.RECORD)
  want = meta_reference.saved()
  assert found.keys() == want.keys()
  for name, x in want.items():
    got = found[name].read((...,))
    assert got.dtype == x.dtype and np.array_equal(got, x), name
  assert np.array_equal(
    found["transposed"].read((slice(1, 4), slice(0, 2))),
    want["transposed"][1:4, :2],
  )


@needs_torch
def test_the_record_is_what_torch_writes(tmp_path, monkeypatch):
  path = tmp_path / "torch_saved.pth"
  monkeypatch.setattr(meta_reference, "RECORD", path)
  meta_reference.main()
  test_torchs_own_bytes_are_read()


@pytest.fixture
def ours(tmp_path):
  """A file of ours, and what it holds."""
  rng = np.random.default_rng(0)
  want = {
    f"{dtype} {i}": rng.standard_normal(shape).astype(kind)
    for dtype, kind in zip(
      DTYPES, ["f4", "f2", ml_dtypes.bfloat16], strict=True
    )
    for i, shape in enumerate([(7,), (3, 5), (2, 3, 4)])
  }
  entries = {
    name: streaming.Entry(x.shape, str(x.dtype), lambda x=x: x)
    for name, x in want.items()
  }
  torch_files.write(tmp_path / "a.pth", entries)
  return tmp_path / "a.pth", want


def test_what_is_written_is_read_again(ours):
  file, want = ours
  found = torch_files.read(file)
  assert list(found) == list(want)
  for name, x in want.items():
    got = found[name].read((...,))
    assert got.dtype == x.dtype and got.tobytes() == x.tobytes(), name
    assert found[name].begin % 64 == 0


@needs_torch
@pytest.mark.parametrize("mmap", [True, False])
def test_torch_reads_what_is_written(ours, mmap):
  import torch

  file, want = ours
  found = torch.load(file, weights_only=True, mmap=mmap)
  assert list(found) == list(want)
  for name, x in want.items():
    assert str(found[name].dtype) == f"torch.{x.dtype}"
    assert np.array_equal(found[name].float().numpy(), x.astype("f4")), name


def archive(file, program, storages=None, **members):
  """A zip as torch writes it, around a pickle."""
  with zipfile.ZipFile(file, "w") as opened:
    opened.writestr("a/data.pkl", program)
    for key, content in (storages or {"0": bytes(16)}).items():
      opened.writestr(f"a/data/{key}", content)
    for name, content in members.items():
      opened.writestr(name, content)
  return file


class Call:
  """Pickled, it calls a function."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


class State:
  """Pickled, it has its state set by a method."""

  def __setstate__(self, state):
    raise AssertionError("code was run")


def stateful():
  found = State()
  found.x = 1
  return found


HOSTILE = {
  "os.system": Call(os.system, "touch ran"),
  "eval": Call(builtins.eval, "open('ran', 'w')"),
  "exec": Call(builtins.exec, "open('ran', 'w')"),
  "getattr": Call(builtins.getattr, "", "upper"),
  "nested": {"w": [({"x": Call(Call, Call(os.system, "touch ran"))},)]},
  "state": stateful(),
  "bytearray": bytearray(3),
  "numpy": np.arange(3),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_pickle_would_run_is_refused(
  tmp_path, monkeypatch, kind, protocol
):
  monkeypatch.chdir(tmp_path)
  program = pickle.dumps(HOSTILE[kind], protocol)
  with pytest.raises(ValueError, match="a.pth: .*nothing of it was run"):
    torch_files.read(archive(tmp_path / "a.pth", program))
  assert os.listdir() == ["a.pth"]


def test_every_other_opcode_is_refused_by_name():
  allowed = {
    *("PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1".split()),
    *("BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINPUT".split()),
    *("LONG_BINPUT MEMOIZE BINGET LONG_BINGET EMPTY_DICT EMPTY_LIST".split()),
    *("EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS SETITEM".split()),
    *("SETITEMS BUILD GLOBAL STACK_GLOBAL BINPERSID REDUCE".split()),
  }
  # Arguments that any opcode's reader takes: lines and lengths of zero.
  texts = [b"0\n0\n", b"''\n", bytes(8)]
  refused = set()
  for opcode in pickletools.opcodes:
    for text in texts if opcode.name not in allowed else ():
      try:
        pickles.load(b"N" * 3 + opcode.code.encode("latin1") + text + b".", {})
      except ValueError as error:
        if f"opcode {opcode.name}," in str(error):
          refused.add(opcode.name)
  every = {opcode.name for opcode in pickletools.opcodes}
  assert refused == every - allowed and len(refused) > 20


def tensor(
  storage="FloatStorage",
  key="0",
  size=4,
  offset=0,
  shape=(2, 2),
  strides=(2, 1),
):
  """A pickle of one tensor, and what is wrong with it."""
  return (
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(("
    + pickles._text("storage")
    + f"ctorch\n{storage}\n".encode()
    + (pickles._text(key) + pickles._text("cpu") + number(size) + b"tQ")
    + number(offset)
    + b"("
    + b"".join(map(number, shape))
    + b"t"
    + b"("
    + b"".join(map(number, strides))
    + b"t"
    + b"\x89ccollections\nOrderedDict\n)RtR."
  )


def number(n):
  raw = n.to_bytes(9, "little", signed=True)
  return b"\x8a\x09" + raw


def test_the_tensor_of_these_tests_is_sound():
  assert pickles.load(tensor(), {"0": 16}).shape == (2, 2)


@pytest.mark.parametrize(
  "wrong, text",
  [
    ({"key": "1"}, "storage '1' is missing"),
    ({"key": "../0"}, "storage '../0' is missing"),
    ({"size": 5}, "storage '0' has 16 bytes, but 5 numbers of 4"),
    ({"size": -4}, "storage '0' has 16 bytes, but -4 numbers"),
    ({"storage": "DoubleStorage"}, "has 16 bytes, but 4 numbers of 8"),
    ({"storage": "QInt8Storage"}, "names 'torch.QInt8Storage'"),
    ({"offset": 1}, "shape [2, 2] needs 5 numbers of a storage of 4"),
    ({"offset": -1}, "a tensor has an invalid offset"),
    ({"offset": 2**62}, "numbers of a storage of 4"),
    ({"shape": (3, 2)}, "shape [3, 2] needs 6 numbers of a storage of 4"),
    ({"shape": (2**40, 2**40)}, "numbers of a storage of 4"),
    ({"shape": (-1, 2)}, "a tensor has an invalid offset"),
    ({"shape": (2,)}, "a tensor has an invalid offset"),
    ({"shape": (1,) * 40, "strides": (1,) * 40}, "an invalid offset, shape"),
    ({"strides": (2, 2)}, "shape [2, 2] needs 5 numbers of a storage of 4"),
    ({"strides": (-2, 1)}, "a tensor has an invalid offset"),
  ],
)
def test_a_tensor_beyond_its_storage_is_refused(wrong, text):
  with pytest.raises(ValueError, match=re.escape(text)):
    pickles.load(tensor(**wrong), {"0": 16})


def long_memo():
  return b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b"."


def laughs(end):
  """A tuple of 2**60 values, by reference, and what uses it."""
  return b"\x80\x04)" + b"q\x00h\x00\x86" * 60 + end + b"."


BOMBS = {
  "a place in the memo": long_memo(),
  "a text of 4 GB": b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"ab.",
  "a bytearray of 2**60": b"\x80\x05\x96" + struct.pack("<Q", 2**60) + b".",
  "a frame of 2**60": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
  "a persistent id": laughs(b"Q"),
  "a name": laughs(b"\x8c\x01a\x93"),
  "a call": laughs(b")R"),
  "arguments": b"ccollections\nOrderedDict\n" + laughs(b"R"),
  "a key": b"}" + laughs(b"Ns"),
  "deep values": b"\x80\x02)" + b"\x85" * 20_000 + b"Q.",
  "a dimension": tensor(shape=(2**62, 2), strides=(0, 0)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_declared_sizes_take_no_memory(tmp_path, kind):
  file = archive(tmp_path / "a.pth", BOMBS[kind])
  tracemalloc.start()
  try:
    torch_files.read(file)
  except ValueError:
    pass
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 60e6


@pytest.mark.parametrize(
  "program",
  [
    b"",
    b".",
    b"\x80\x02",
    b"\x80\x02R.",
    b"\x80\x02u.",
    b"\x80\x02h\x07.",
    b"]u.",
    b"garbage",
    b"\x80\x02N",
    b"\x80\x02}(Nu.",
    b"\x80\x02}NNs.",
  ],
)
def test_a_damaged_pickle_is_one_line(tmp_path, program):
  with pytest.raises(ValueError, match="a.pth: ") as caught:
    torch_files.read(archive(tmp_path / "a.pth", program))
  assert "\n" not in str(caught.value)


def test_a_pickle_of_other_things_is_refused(tmp_path):
  file = archive(tmp_path / "a.pth", pickle.dumps([1], 2))
  with pytest.raises(ValueError, match="does not hold tensors by name"):
    torch_files.read(file)


@pytest.mark.parametrize(
  "name", ["/etc/passwd", "../a/data/0", "a/../../b", "b/data.pkl", "b/x"]
)
def test_a_zip_with_other_members_is_refused(tmp_path, name):
  file = archive(tmp_path / "a.pth", tensor(), **{name: b"x"})
  with pytest.raises(
    ValueError, match="not of torch.save|torch.save did not write"
  ):
    torch_files.read(file)


def test_compressed_encrypted_and_doubled_members_are_refused(tmp_path):
  file = tmp_path / "a.pth"
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
    opened.writestr("a/data.pkl", bytes(10**6))
  with pytest.raises(ValueError, match="compressed or encrypted"):
    torch_files.read(file)
  with pytest.warns(UserWarning, match="Duplicate"):
    archive(file, tensor(), **{"a/data/0": bytes(16)})
  with pytest.raises(ValueError, match="two members have one name"):
    torch_files.read(file)
  archive(file, tensor(), **{"a/byteorder": b"big"})
  with pytest.raises(ValueError, match="byte order b'big' is not supported"):
    torch_files.read(file)


def test_a_large_pickle_is_refused_unread(tmp_path, monkeypatch):
  monkeypatch.setattr(torch_files, "_MOST", 100)
  file = archive(tmp_path / "a.pth", bytes(101))
  with pytest.raises(ValueError, match="data.pkl has 101 bytes, more than"):
    torch_files.read(file)


def test_a_pickle_without_end_is_refused_in_seconds(monkeypatch):
  monkeypatch.setattr(pickles, "_MOST_STEPS", 100)
  with pytest.raises(ValueError, match="more than 100 opcodes"):
    pickles.load(b"\x80\x02" + b"}" * 99 + b".", {})
  assert pickles.load(b"\x80\x02" + b"}" * 98 + b".", {}) == {}


def test_every_truncation_is_seen(ours, tmp_path):
  content, cut = ours[0].read_bytes(), tmp_path / "cut.pth"
  for size in [0, 1, *range(50, len(content), 97), len(content) - 1]:
    cut.write_bytes(content[:size])
    with pytest.raises(ValueError, match="cut.pth is no whole file"):
      torch_files.read(cut)


def test_a_failed_read_is_not_damage(ours, monkeypatch):
  def fail(*_):
    raise OSError(errno.EIO, "Input/output error")

  monkeypatch.setattr(zipfile.ZipFile, "read", fail)
  with pytest.raises(ValueError, match="cannot read .*: Input/output error$"):
    torch_files.read(ours[0])


def test_changed_bytes_are_read_or_refused(tmp_path):
  """In no case another error: 300 copies with some bytes replaced."""
  whole, file = meta_reference.RECORD.read_bytes(), tmp_path / "a.pth"
  rng, refused = np.random.default_rng(0), 0
  for _ in range(300):
    content = np.frombuffer(whole, np.uint8).copy()
    content[rng.integers(0, content.size, 3)] = rng.integers(0, 256, 3)
    file.write_bytes(content)
    try:
      for tensor in torch_files.read(file).values():
        tensor.read((...,))
    except ValueError:
      refused += 1
  assert 90 < refused < 300


def test_a_member_that_ends_beyond_the_file_is_refused(ours):
  file, _ = ours
  content = bytearray(file.read_bytes())
  # The size that the directory at the end has for the last storage.
  at = content.rindex(b"a/data/8") - 46
  content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)
  file.write_bytes(content)
  with pytest.raises(ValueError, match="'a/data/8' is cut off"):
    torch_files.read(file)


def test_a_storage_is_read_from_the_disk_in_parts(tmp_path):
  """Reading a row of a large tensor costs a row of memory."""
  rows = np.arange(2000, dtype=np.float32)[:, None] * np.ones(1000, "f4")
  entry = streaming.Entry(rows.shape, "float32", lambda: rows)
  torch_files.write(tmp_path / "a.pth", {"w": entry})
  tracemalloc.start()
  row = torch_files.read(tmp_path / "a.pth")["w"].read((slice(7, 8),))
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert np.array_equal(row, rows[7:8]) and peak < 1e6


def test_old_files_of_torch_are_refused(tmp_path):
  file = tmp_path / "a.pth"
  file.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + bytes(99))
  with pytest.raises(ValueError, match="no whole file of torch.save, a zip"):
    torch_files.read(file)
