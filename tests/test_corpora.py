"""Documents: what is read, in which order, and what is refused."""

import collections
import gzip
import json
import sysconfig

import pytest
import zstandard
from array_record.python import array_record_module

from mtp_jax import config
from mtp_jax.data import corpora


def read(source, path, skipped=None, **fields):
  data = config.Data(source=source, path=str(path), **fields)
  return list(corpora.read(data, skipped))


def texts(*arguments, **fields):
  return {d.name: d.text for d in read(*arguments, **fields)}


def compressed(path, raw):
  if path.suffix == ".gz":
    raw = gzip.compress(raw)
  elif path.suffix == ".zst":
    raw = zstandard.compress(raw)
  path.write_bytes(raw)
  return path


ENDINGS = ["", ".gz", ".zst"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_text_folder_is_read_in_full_but_for_hidden_files(tmp_path, ending):
  (tmp_path / "inner" / ".git").mkdir(parents=True)
  wanted = {"a.txt": "héllo\r\n".encode(), "inner/b": b"\x00tail"}
  for name, raw in wanted.items():
    compressed(tmp_path / (name + ending), raw)
  (tmp_path / ".hidden").write_bytes(b"\xff")
  (tmp_path / "inner" / ".git" / "c").write_bytes(b"\xff")
  assert texts("text", tmp_path) == {
    f"{name}{ending}:1": raw for name, raw in wanted.items()
  }
  only = tmp_path / f"a.txt{ending}"
  assert texts("text", only) == {f"a.txt{ending}:1": wanted["a.txt"]}


def test_long_text_is_cut_at_line_ends_and_loses_nothing(tmp_path):
  lines = [f"{i} " + "é" * (i % 89) + "\n" for i in range(5003)]
  lines[2003] = "日" * corpora.PIECE + "\n"  # a line longer than a piece
  raw = "".join(lines).encode()
  documents = read("text", compressed(tmp_path / "long.gz", raw))
  assert b"".join(d.text for d in documents) == raw
  assert len(documents) > 5
  assert max(len(d.text) for d in documents) <= corpora.PIECE
  done = b""
  for document in documents:
    assert document.name == f"long.gz:{done.count(10) + 1}"
    document.text.decode()
    done += document.text


@pytest.mark.parametrize("ending", ENDINGS)
def test_jsonl_reads_one_field(tmp_path, ending):
  rows = [{"code": "a\n\u2028b", "x": 1}, {"code": "日本"}]
  raw = "\ufeff" + "\n\n".join(map(json.dumps, rows))
  path = compressed(tmp_path / f"d.jsonl{ending}", raw.encode())
  wanted = {
    f"d.jsonl{ending}:1": "a\n\u2028b".encode(),
    f"d.jsonl{ending}:3": "日本".encode(),
  }
  assert texts("jsonl", path, field="code") == wanted
  (tmp_path / "other.txt").write_text("not a record")
  assert texts("jsonl", tmp_path, field="code") == wanted


def array_record(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()


def test_array_record_reads_every_record(tmp_path):
  array_record(tmp_path / "a.array_record", [b"one", b"two"])
  array_record(tmp_path / "b.array_record-00000-of-00001", [b"three"])
  assert texts("array_record", tmp_path) == {
    "a.array_record:0": b"one",
    "a.array_record:1": b"two",
    "b.array_record-00000-of-00001:0": b"three",
  }


BAD_LINES = {
  b'{"text": "\xff"}': "not UTF-8",
  b'{"text": "\\ud800"}': "not UTF-8",
  b'{"text": "cut': "not JSON",
  b"[" * 100_000: "not JSON",
  b'{"txt": "a"}': "missing field",
  b'["text"]': "missing field",
  b'{"text": 3}': "missing field",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=range(len(BAD_LINES)))
def test_bad_json_line_is_named_or_counted(tmp_path, bad):
  good = b'{"text": "good"}'
  path = tmp_path / "d.jsonl"
  path.write_bytes(b"\n".join([good, b"", bad, good]))
  with pytest.raises(ValueError, match=rf"{path}:3: {BAD_LINES[bad]}: "):
    read("jsonl", path)
  skipped = collections.Counter()
  kept = texts("jsonl", path, skipped, on_error="skip")
  assert list(kept) == ["d.jsonl:1", "d.jsonl:4"]
  assert skipped == {BAD_LINES[bad]: 1}


def test_text_that_is_not_utf8_is_named_by_line_or_counted(tmp_path):
  (tmp_path / "bad.txt").write_bytes(b"one\ntwo\nth\xffree\n")
  (tmp_path / "good.txt").write_bytes(b"good")
  with pytest.raises(ValueError, match=r"bad\.txt:3: not UTF-8: "):
    read("text", tmp_path)
  skipped = collections.Counter()
  kept = texts("text", tmp_path, skipped, on_error="skip")
  assert kept == {"good.txt:1": b"good"} and skipped == {"not UTF-8": 1}


class Bounded(collections.Counter):
  """Ends a reader that would count for ever."""

  def __setitem__(self, reason, count):
    assert count < 100
    super().__setitem__(reason, count)


@pytest.mark.parametrize("size", [1, corpora.PIECE + 1, 3 * corpora.PIECE])
def test_reading_ends_where_no_character_starts(tmp_path, size):
  # Silent 8-bit audio: every byte continues a character that never began.
  (tmp_path / "silence").write_bytes(b"\x80" * size)
  with pytest.raises(ValueError, match="silence:1: not UTF-8: "):
    read("text", tmp_path, Bounded())
  (tmp_path / "good").write_bytes(b"good")
  kept = texts("text", tmp_path, skipped := Bounded(), on_error="skip")
  assert kept == {"good:1": b"good"}
  assert skipped == {"not UTF-8": -(-size // corpora.PIECE)}


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("source", ["text", "jsonl"])
@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_damaged_compression_is_named_or_counted(
  tmp_path, ending, source, harm
):
  lines = [json.dumps({"text": f"{i * 7919 % 10007}"}) for i in range(20_011)]
  path = tmp_path / f"d.jsonl{ending}"
  compressed(path, "\n".join(lines).encode())
  raw = bytearray(path.read_bytes())
  if harm == "truncated":
    raw = raw[:-9] if ending == ".gz" else raw[: len(raw) // 2]
  else:
    raw[:4] = b"\0\0\0\0"
  path.write_bytes(raw)
  with pytest.raises(ValueError, match=rf"{path}:\d+: damaged: "):
    read(source, path)
  (tmp_path / "e.jsonl").write_text(lines[0])
  skipped = collections.Counter()
  kept = texts(source, tmp_path, skipped, on_error="skip")
  assert "e.jsonl:1" in kept and skipped["damaged"] == 1


def test_zstandard_frames_follow_each_other(tmp_path):
  frames = [zstandard.compress(b"one\n"), zstandard.compress(b"two\n" * 9999)]
  (tmp_path / "a.zst").write_bytes(b"".join(frames))
  (document,) = read("text", tmp_path)
  assert document.text == b"one\n" + b"two\n" * 9999


@pytest.mark.parametrize("harm", ["truncated", "flipped", "emptied"])
def test_damaged_array_record_is_named_or_counted(tmp_path, harm):
  path = tmp_path / "a.array_record"
  array_record(path, [b"%d" % i * 97 for i in range(2003)])
  raw = bytearray(path.read_bytes())
  if harm == "flipped":
    raw[len(raw) // 3] ^= 0xFF
  path.write_bytes(
    {"truncated": raw[: len(raw) // 2], "emptied": b""}.get(harm, raw)
  )
  with pytest.raises(ValueError, match=rf"{path}:\d+: damaged: "):
    read("array_record", path)
  array_record(tmp_path / "b.array_record", [b"good", b"\xff"])
  skipped = collections.Counter()
  kept = texts("array_record", tmp_path, skipped, on_error="skip")
  assert kept["b.array_record:0"] == b"good"
  assert skipped == {"damaged": 1, "not UTF-8": 1}


def test_nothing_to_read_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="does not exist"):
    read("text", tmp_path / "absent")
  with pytest.raises(ValueError, match="no jsonl files in"):
    read("jsonl", tmp_path)
  (tmp_path / "empty.txt").touch()
  with pytest.raises(ValueError, match="no documents .*'empty': 1"):
    read("text", tmp_path)


@pytest.fixture
def python(tmp_path, monkeypatch):
  """A small interpreter: its three roots, in a place of one's choice."""

  def install(place):
    library = tmp_path / place / "lib"
    packages = library / "site-packages"
    packages.mkdir(parents=True)
    roots = {"stdlib": library, "purelib": packages, "platlib": packages}
    monkeypatch.setattr(sysconfig, "get_path", lambda label: str(roots[label]))
    for i in range(101):
      (library / f"m{i:03}.py").write_text(f"x = {i}\n" * 97)
    (library / "latin.py").write_bytes(b"# \xe9\n")
    (library / "data.txt").write_text("no Python")
    (packages / "m000.py").write_text("import numpy\n")

  return install


def test_python_source_is_named_alike_wherever_it_is_installed(python):
  skipped = collections.Counter()
  python("here")
  here = read("python", "", skipped)
  assert skipped == {"not UTF-8": 1}  # although on_error is 'raise'
  assert len(here) == 102
  by_name = {d.name: d.text for d in here}
  assert by_name["packages/m000.py"] == b"import numpy\n"
  assert by_name["stdlib/m000.py"] == b"x = 0\n" * 97
  python("elsewhere/on/disk")
  assert read("python", "") == here


def test_a_cut_corpus_is_a_sample_and_a_prefix(python):
  python("here")
  whole = read("python", "")
  some = read("python", "", max_bytes=20_011)
  assert sum(len(d.text) for d in some) == 20_011
  assert [d.name for d in some] == [d.name for d in whole[: len(some)]]
  assert some[:-1] == whole[: len(some) - 1]
  numbers = [int(d.name[8:-3]) for d in some if d.name.startswith("stdlib")]
  assert min(numbers) < 20 and max(numbers) > 80 and numbers != sorted(numbers)


def test_a_cut_never_falls_inside_a_character(tmp_path):
  (tmp_path / "a").write_text("日本")
  for size, wanted in (
    (3, "日"),
    (4, "日"),
    (5, "日"),
    (6, "日本"),
    (7, "日本"),
  ):
    (document,) = read("text", tmp_path, max_bytes=size)
    assert document.text.decode() == wanted
  with pytest.raises(ValueError, match="no documents"):
    read("text", tmp_path, max_bytes=2)


def test_this_interpreter_has_a_corpus():
  documents = read("python", "", max_bytes=1_000_003)
  assert 900_000 < sum(len(d.text) for d in documents) <= 1_000_003
  assert any(d.name.startswith("packages/") for d in documents)


def document(text):
  return corpora.Document("", text)


def test_exact_duplicates_are_dropped_and_counted():
  skipped = collections.Counter()
  kept = corpora.deduplicated(map(document, [b"a", b"b", b"a", b"a "]), skipped)
  assert [d.text for d in kept] == [b"a", b"b", b"a "]
  assert skipped == {"duplicate": 1}


def test_split_depends_on_the_bytes_alone_and_grows_with_the_share():
  documents = [document(b"%d" % i) for i in range(10_007)]
  held = {d.text for d, out in corpora.split(documents, 0.1) if out}
  # Binomial: mean 1001, standard deviation 30; the hash is fixed.
  assert 900 < len(held) < 1100
  backwards = corpora.split(documents[::-1], 0.1)
  assert {d.text for d, out in backwards if out} == held
  assert all(corpora.is_held_out(text, 0.2) for text in held)
  # Pinned: a changed rule would move training text into every held-out set.
  pinned = [i for i in range(60) if corpora.is_held_out(b"%d" % i, 0.1)]
  assert pinned == [4, 10, 29, 35, 44, 54]
