"""Packing a corpus once: nothing lost, nothing half-written, damage found."""

import concurrent.futures
import dataclasses
import errno
import json
import os
import pathlib
import pickle
import resource
import shutil
import tracemalloc
import warnings
import zlib

import forked
import jax
import numpy as np
import pytest

from mtp_jax import config, tokenizer, tokenizer_training
from mtp_jax.data import blocks, corpora, pipeline, splits


@pytest.fixture
def data(tmp_path):
  """A corpus of 211 lines, one empty, one twice, and an empty cache."""
  rows = [f"document {i}\n" * (i % 13) for i in range(1, 212)]
  rows[7] = rows[5]
  path = tmp_path / "corpus.jsonl"
  path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
  return config.Data(
    source="jsonl",
    path=str(path),
    cache=str(tmp_path / "c"),
    held_out=0.1,
    batch=2,
    seq_len=101,
  )


def entries(data):
  """Folders of the cache: the finished ones, and all."""
  names = {p.name for p in pathlib.Path(data.cache).iterdir() if p.is_dir()}
  return {n for n in names if "partial" not in n}, names


def test_packing_keeps_every_document_whole(data):
  codec, skipped = tokenizer.Bytes(), corpora.Skipped()
  documents = list(splits.deduplicated(corpora.read(data, skipped), skipped))
  assert skipped["duplicate"] and skipped["empty"]
  both = pipeline.pack(data, codec)
  for packed, held_out in zip(both, (False, True), strict=True):
    wanted = [
      d.text
      for d in documents
      if splits.is_held_out(d.text, data.held_out) == held_out
    ]
    parts = np.split(np.asarray(packed.tokens), packed.starts[1:])
    assert all(p[0] == codec.bos and p[-1] == codec.eos for p in parts)
    assert [codec.decode_bytes(p) for p in parts] == wanted
    assert packed.documents == len(wanted) > 0
    assert packed.skipped == skipped
    assert packed.files == len(corpora.files(data)) > 0
    # An end is predicted too, a beginning never.
    size = sum(map(len, wanted))
    assert packed.bytes_per_token == size / (size + len(wanted))
    assert packed.tokens.dtype == np.uint16
  assert both[0].fingerprint != both[1].fingerprint


class Counting(tokenizer.Bytes):
  """Knows how many documents it was given."""

  calls = 0

  def encode(self, text):
    self.calls += 1
    return super().encode(text)


def test_a_corpus_is_tokenised_once(data):
  codec = Counting()
  first = pipeline.pack(data, codec)
  calls = codec.calls
  again = pipeline.pack(data, codec)
  assert codec.calls == calls > 0
  for a, b in zip(first, again, strict=True):
    assert isinstance(b.tokens, blocks.Array)
    assert a.fingerprint == b.fingerprint
    np.testing.assert_array_equal(a.tokens, b.tokens)


def test_whatever_changes_the_tokens_packs_anew(data, tmp_path):
  model = tokenizer_training.train(["document 1\n"], tmp_path / "m", 300)
  prints = {pipeline.pack(data, tokenizer.Bytes())[0].fingerprint}
  prints.add(pipeline.pack(data, model)[0].fingerprint)
  data = dataclasses.replace(data, held_out=0.2)
  prints.add(pipeline.pack(data, tokenizer.Bytes())[0].fingerprint)
  data = dataclasses.replace(data, max_bytes=3001)
  prints.add(pipeline.pack(data, tokenizer.Bytes())[0].fingerprint)
  with open(data.path, "r+", encoding="utf-8") as file:
    text = file.read().replace("document 3", "Document 3")
    file.seek(0)
    file.write(text)
  data = dataclasses.replace(data, max_bytes=0)
  prints.add(pipeline.pack(data, tokenizer.Bytes())[0].fingerprint)
  assert len(prints) == len(entries(data)[0]) == 5


def test_fingerprint_is_of_the_contents_and_not_of_the_place(data, tmp_path):
  first = pipeline.pack(data, tokenizer.Bytes())
  data = dataclasses.replace(
    data,
    path=str(shutil.copy(data.path, tmp_path / "copy.jsonl")),
    cache=str(tmp_path / "other"),
  )
  again = pipeline.pack(data, tokenizer.Bytes())
  assert [p.fingerprint for p in first] == [p.fingerprint for p in again]


HARMS = {
  "flipped": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
  "truncated": lambda raw: raw[: len(raw) // 2],
  "emptied": lambda raw: b"",
  "longer": lambda raw: raw + b"\0",
  "gone": None,
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_cache_is_packed_anew_with_a_warning(data, tmp_path, harm):
  codec = tokenizer.Bytes()
  intact = [np.asarray(p.tokens) for p in pipeline.pack(data, codec)]
  ((name,), _) = entries(data)
  files = sorted((tmp_path / "c" / name).iterdir())
  assert len(files) == 5
  for path in files:
    change = HARMS[harm]
    raw = path.read_bytes()
    path.unlink()
    if change:
      path.write_bytes(change(raw))
    with pytest.warns(UserWarning, match=f"packing anew: .*{name} "):
      packed = pipeline.pack(data, codec)
    for a, b in zip(intact, packed, strict=True):
      np.testing.assert_array_equal(a, b.tokens)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    pipeline.pack(data, codec)


def stored(path, values):
  writer = blocks.Writer(path)
  for part in np.array_split(values, 7):
    writer.write(part.tobytes())
  writer.close()
  checksums = blocks.checksums(path)
  assert writer.checksum() == zlib.crc32(checksums.tobytes())
  return blocks.Array(path, values.dtype, checksums, len(values))


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 5003])
def test_an_array_on_disk_is_the_array(tmp_path, size):
  rng = np.random.default_rng(size)
  values = np.sort(rng.integers(0, 2 * size, size))
  found = stored(tmp_path / "a", values)
  assert len(found) == size and found.dtype == values.dtype
  np.testing.assert_array_equal(found, values)
  for low, high in rng.integers(-size, 2 * size, (29, 2)).tolist():
    np.testing.assert_array_equal(found[low:high], values[low:high])
  for value in [-1, 2 * size, *rng.integers(0, 2 * size, 29).tolist()]:
    for side in ("left", "right"):
      want = values.searchsorted(value, side)
      assert found.searchsorted(value, side) == want


def overwritten(path):
  with open(path, "r+b") as file:
    file.seek(path.stat().st_size // 2)
    file.write(bytes(path.stat().st_size // 2))


def cut_short(path):
  os.truncate(path, 4000)


@pytest.mark.parametrize(
  "harm, kind, workers",
  [
    (overwritten, "tokens", 0),
    (overwritten, "starts", 0),
    (cut_short, "starts", 0),
    (cut_short, "tokens", 1),
  ],
)
def test_a_cache_damaged_in_use_is_an_error_before_its_tokens_are_read(
  tmp_path, kind, harm, workers
):
  (tmp_path / "a.jsonl").write_text(
    "".join(f'{{"text": "{i * 7919 % 10007}"}}\n' for i in range(4001))
  )
  data = config.Data(
    source="jsonl", path=str(tmp_path), cache=str(tmp_path / "c"), batch=1
  )
  packed, _ = pipeline.pack(data, tokenizer.Bytes())
  wanted = [pipeline.batch_at(packed, i, BATCHING) for i in range(100)]
  stream = pipeline.batches(packed, BATCHING, workers=workers)
  equal(next(stream), wanted[0])
  (folder,) = (tmp_path / "c").glob("*/")
  harm(folder / f"train.{kind}")
  with pytest.raises(blocks.CacheDamaged) as error:
    for i in range(1, 100):
      equal(next(stream), wanted[i])
  assert f"train.{kind} was damaged while it was in use" in str(error.value)
  assert "packed anew" in str(error.value)
  assert "set data.cache to" in str(error.value)
  with pytest.warns(UserWarning, match=f"anew: .* a damaged train.{kind}"):
    packed, _ = pipeline.pack(data, tokenizer.Bytes())
  equal(pipeline.batch_at(packed, 99, BATCHING), wanted[99])


@pytest.mark.parametrize("kind", ["checksums", "meta.json"])
def test_a_passing_fault_of_the_disk_costs_no_cache(data, monkeypatch, kind):
  codec = Counting()
  before, _ = pipeline.pack(data, codec)
  calls, ((name,), _) = codec.calls, entries(data)
  for fault in (errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOSPC, None):

    def fail(*_, fault=fault, **__):
      raise OSError(fault, os.strerror(fault)) if fault else MemoryError

    with monkeypatch.context() as patch:
      if kind == "checksums":
        patch.setattr(blocks, "checksums", fail)
      else:
        patch.setattr(pathlib.Path, "read_text", fail)
      with pytest.raises(OSError if fault else MemoryError) as error:
        pipeline.pack(data, codec)
    if fault:
      words = [f"/{name} cannot be read", os.strerror(fault), "start again"]
      assert all(w in str(error.value) for w in words), error.value
    again, _ = pipeline.pack(data, codec)
    assert again.fingerprint == before.fingerprint and codec.calls == calls


def test_a_batch_that_cannot_be_read_names_its_file(data, monkeypatch):
  packed, _ = pipeline.pack(data, tokenizer.Bytes())

  def fail(*_):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(os, "pread", fail)
  with pytest.raises(OSError, match=r"output error: '.*/train.tokens'"):
    pipeline.batch_at(packed, 0, BATCHING)


def test_a_fault_of_the_corpus_is_not_said_of_the_cache(data, monkeypatch):
  listed, walked = corpora.files, corpora.read
  with monkeypatch.context() as patch:
    gone = pathlib.Path(data.path).with_name("gone.jsonl")
    patch.setattr(corpora, "files", lambda d: [*listed(d), ("gone", gone)])
    with pytest.raises(ValueError, match="gone.jsonl'.*is complete") as error:
      pipeline.pack(data, tokenizer.Bytes())
    assert "data.cache" not in str(error.value)

  def read(*arguments):
    yield next(walked(*arguments))
    raise OSError(errno.EIO, "the corpus's disk")

  monkeypatch.setattr(corpora, "read", read)
  with pytest.raises(OSError) as error:
    pipeline.pack(data, tokenizer.Bytes())
  assert str(error.value) == "[Errno 5] the corpus's disk"
  assert entries(data) == (set(), set())


def test_a_flipped_number_in_the_meta_file_is_found(data, tmp_path):
  pipeline.pack(data, tokenizer.Bytes())
  ((name,), _) = entries(data)
  path = tmp_path / "c" / name / "meta.json"
  path.write_text(path.read_text().replace('"bytes": ', '"bytes": 1', 1))
  with pytest.warns(UserWarning, match="damaged meta.json"):
    pipeline.pack(data, tokenizer.Bytes())


KILLED = """
import os, signal, sys
from mtp_jax import config, tokenizer
from mtp_jax.data import pack

class Killed(tokenizer.Bytes):
  left = 101
  def encode(self, text):
    self.left -= 1
    if not self.left:
      os.kill(os.getpid(), signal.SIGKILL)
    return super().encode(text)

pack.pack(config.Data(source="jsonl", path=sys.argv[1], cache=sys.argv[2],
                      held_out=0.1), Killed())
"""


def test_a_killed_packing_leaves_no_cache(data):
  process = forked.Process(["-c", KILLED, data.path, data.cache])
  assert process.wait(60) == -9
  whole, every = entries(data)
  assert not whole and len(every) == 1  # only the partial folder
  codec = Counting()
  train, _ = pipeline.pack(data, codec)
  assert codec.calls > 101
  whole, every = entries(data)
  assert whole == every and len(whole) == 1
  assert train.tokens[-1:] == [codec.eos]


def test_an_error_while_packing_leaves_no_cache(data):
  with open(data.path, "a", encoding="utf-8") as file:
    file.write("\nno JSON")
  with pytest.raises(ValueError, match="corpus.jsonl:212: not JSON"):
    pipeline.pack(data, tokenizer.Bytes())
  assert entries(data) == (set(), set())
  data = dataclasses.replace(data, on_error="skip")
  train, held_out = pipeline.pack(data, tokenizer.Bytes())
  assert train.skipped == held_out.skipped
  assert train.skipped["not JSON"] == 1


def test_concurrent_packings_do_the_work_once(data):
  codec = Counting()
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    done = list(pool.map(lambda _: pipeline.pack(data, codec), range(4)))
  train, held_out = done[0]
  assert codec.calls == train.documents + held_out.documents
  assert len({packed.fingerprint for packed, _ in done}) == 1


def test_memory_does_not_grow_with_the_corpus(tmp_path):
  for i in range(8):
    text = "".join(f"{i} {j * 7919}\n" for j in range(200_003))
    (tmp_path / f"{i}.txt").write_text(text)
  data = config.Data(
    source="text", path=str(tmp_path), cache=str(tmp_path / ".cache")
  )
  tracemalloc.start()
  train, held_out = pipeline.pack(data, tokenizer.Bytes())
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  # One piece of 64 KiB is 0.5 MB as int64 ids; all of them would be 150 MB.
  assert len(train.tokens) + len(held_out.tokens) > 19_000_000
  assert peak < 6_000_000


def test_one_text_file_is_trained_on_and_held_out(tmp_path):
  path = tmp_path / "book.txt"
  path.write_text("".join(f"line {i}\n" for i in range(9000)))
  data = config.Data(source="text", path=str(path), cache=str(tmp_path / "c"))
  with pytest.warns(UserWarning) as said:
    train, held_out = pipeline.pack(data, tokenizer.Bytes())
  assert train.cut == held_out.cut
  cut, small = (str(w.message) for w in said)
  assert "data.held_out 0.02 would leave" in cut and train.cut in cut
  assert all(w.filename == __file__ for w in said)
  assert f"held_out has {len(held_out.tokens)} tokens, fewer than the 4096" in (
    small
  )
  raw = [tokenizer.Bytes().decode_bytes(p.tokens[:]) for p in (train, held_out)]
  whole = path.read_bytes()
  assert len(raw[1]) == pytest.approx(0.02 * len(whole), abs=10)
  assert sorted(b"".join(raw).splitlines()) == sorted(whole.splitlines())
  with pytest.warns(UserWarning) as said:  # from the cache
    again = pipeline.pack(data, tokenizer.Bytes())
  assert again[0].cut == train.cut
  assert again[1].fingerprint == held_out.fingerprint
  assert [str(w.message) for w in said] == [small]


def test_too_small_a_corpus_is_refused(tmp_path):
  (tmp_path / "one.txt").write_text("a single document")
  data = config.Data(
    source="text", path=str(tmp_path / "one.txt"), cache=str(tmp_path / "c")
  )
  with pytest.raises(ValueError, match="0.02 .* document of 17 bytes, .* 128"):
    pipeline.pack(data, tokenizer.Bytes())
  assert entries(data) == (set(), set())


def test_what_was_left_out_is_said_when_packed(data):
  with open(data.path, "a", encoding="utf-8") as file:
    file.write("\nno JSON\n{}")
  data = dataclasses.replace(data, on_error="skip")
  left_out = "1 duplicate, 16 empty, 1 missing field, 1 not JSON; .*"
  with pytest.warns(UserWarning, match=left_out + "l:212, .*l:213$"):
    pipeline.pack(data, tokenizer.Bytes())
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    train, _ = pipeline.pack(data, tokenizer.Bytes())
  assert train.skipped["not JSON"] == 1


def test_a_corpus_that_changes_while_it_is_packed_is_refused(data):
  class Appends(Counting):
    def encode(self, text):
      with open(data.path, "a", encoding="utf-8") as file:
        file.write("\n")
      return super().encode(text)

  with pytest.raises(ValueError, match="corpus.jsonl' changed while"):
    pipeline.pack(data, Appends())
  assert entries(data) == (set(), set())


def test_a_full_disk_leaves_nothing_but_what_was_there(data, tmp_path):
  """A limit on the size of files stands for the full disk."""
  before = pipeline.pack(data, tokenizer.Bytes())
  kept = entries(data)
  other = tmp_path / "other.jsonl"
  text = '{"text": "another and a longer document, %d"}\n'
  other.write_text("".join(text % i for i in range(9000)))
  data = dataclasses.replace(data, path=str(other))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
  try:
    with pytest.raises(OSError) as error:
      pipeline.pack(data, tokenizer.Bytes())
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  for words in (data.cache, "too large", "Free space", "or set data.cache to"):
    assert words in str(error.value)
  assert entries(data) == kept and len(kept[1]) == 1
  data = dataclasses.replace(data, path=str(tmp_path / "corpus.jsonl"))
  again = pipeline.pack(data, tokenizer.Bytes())
  assert again[0].fingerprint == before[0].fingerprint


def test_a_cache_is_its_owners_and_follows_no_link(data, tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  pipeline.pack(data, tokenizer.Bytes())
  cache = pathlib.Path(data.cache)
  for path in [cache, *cache.iterdir()]:
    assert path.stat().st_mode & 0o077 == 0, path
  (lock,) = cache.glob("*.lock")
  lock.unlink()
  lock.symlink_to(victim)
  with pytest.raises(ValueError, match="lock is a link.*set data.cache to"):
    pipeline.pack(data, tokenizer.Bytes())
  assert victim.read_text() == "precious"


def test_pickling_sends_the_place_and_not_the_tokens(data):
  packed, _ = pipeline.pack(data, tokenizer.Bytes())
  raw = pickle.dumps(packed)
  assert len(raw) < 1500 < 2 * len(packed.tokens)
  copy = pickle.loads(raw)
  np.testing.assert_array_equal(copy.tokens, packed.tokens)
  np.testing.assert_array_equal(copy.starts, packed.starts)
  assert copy.fingerprint == packed.fingerprint


BATCHING = pipeline.Batching(batch=12, seq_len=7, reach=3, seed=5)


def equal(a, b):
  assert a.tokens.dtype == a.segments.dtype == np.int32
  assert a.weight.dtype == np.float32
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)
