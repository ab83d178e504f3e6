"""Documents: what is read, in which order, and what is refused."""

import errno
import gzip
import io
import json
import os
import pathlib
import sysconfig
import time

import pytest
import zstandard
from array_record.python import array_record_module

from mtp_jax import config
from mtp_jax.data import corpora, formats, splits


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
  lines[2003] = "日" * formats.PIECE + "\n"  # a line longer than a piece
  raw = "".join(lines).encode()
  documents = read("text", compressed(tmp_path / "long.gz", raw))
  assert b"".join(d.text for d in documents) == raw
  assert len(documents) > 5
  assert max(len(d.text) for d in documents) <= formats.PIECE
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
  skipped = corpora.Skipped()
  kept = texts("jsonl", path, skipped, on_error="skip")
  assert list(kept) == ["d.jsonl:1", "d.jsonl:4"]
  assert skipped == {BAD_LINES[bad]: 1}


def test_text_that_is_not_utf8_is_named_by_line_or_counted(tmp_path):
  (tmp_path / "bad.txt").write_bytes(b"one\ntwo\nth\xffree\n")
  (tmp_path / "good.txt").write_bytes(b"good")
  with pytest.raises(ValueError, match=r"bad\.txt:3: not UTF-8: "):
    read("text", tmp_path)
  skipped = corpora.Skipped()
  kept = texts("text", tmp_path, skipped, on_error="skip")
  assert kept == {"good.txt:1": b"good"} and skipped == {"not UTF-8": 1}


class Bounded(corpora.Skipped):
  """Ends a reader that would count for ever."""

  def __setitem__(self, reason, count):
    assert count < 100
    super().__setitem__(reason, count)


@pytest.mark.parametrize("size", [1, formats.PIECE + 1, 3 * formats.PIECE])
def test_reading_ends_where_no_character_starts(tmp_path, size):
  # Silent 8-bit audio: every byte continues a character that never began.
  (tmp_path / "silence").write_bytes(b"\x80" * size)
  with pytest.raises(ValueError, match="silence:1: not UTF-8: "):
    read("text", tmp_path, Bounded())
  (tmp_path / "good").write_bytes(b"good")
  kept = texts("text", tmp_path, skipped := Bounded(), on_error="skip")
  assert kept == {"good:1": b"good"}
  assert skipped == {"not UTF-8": -(-size // formats.PIECE)}


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
  skipped = corpora.Skipped()
  kept = texts(source, tmp_path, skipped, on_error="skip")
  assert "e.jsonl:1" in kept and skipped["damaged"] == 1


def test_every_refusal_of_a_record_names_the_remedy(tmp_path):
  (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff"}')
  with pytest.raises(
    ValueError, match="a.jsonl:1.* with data.on_error='skip'$"
  ):
    read("jsonl", tmp_path)
  skipped = corpora.Skipped()
  for i in range(5):
    (tmp_path / f"b{i}.jsonl").write_text('{"text": "good"}\nno JSON')
  read("jsonl", tmp_path, skipped, on_error="skip")
  assert skipped == {"not JSON": 5, "not UTF-8": 1}
  assert len(skipped.places) == 3 and all(":" in p for p in skipped.places)


def test_a_line_too_long_for_memory_is_passed_over(tmp_path, monkeypatch):
  monkeypatch.setattr(formats, "LINE", 100)
  lines = ['{"text": "%s"}' % ("x" * n) for n in (7, 1000, 87, 89)]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  with pytest.raises(ValueError, match="a.jsonl:2: too long: .* 100 bytes"):
    read("jsonl", tmp_path)
  kept = texts("jsonl", tmp_path, skipped := corpora.Skipped(), on_error="skip")
  assert list(kept) == ["a.jsonl:1", "a.jsonl:3"] and skipped["too long"] == 2


def test_other_line_ends_and_encodings(tmp_path):
  line = "x" * 99 + "\r"
  (tmp_path / "mac.txt").write_text(line * 1000, newline="")
  for document in read("text", tmp_path):
    assert document.text.endswith(b"\r") and len(document.text) % 100 == 0
  (tmp_path / "mac.jsonl").write_bytes(b'{"text": "a"}\r{"text": "b"}\r')
  with pytest.raises(ValueError, match="not JSON: .* carriage returns alone"):
    read("jsonl", tmp_path)
  (tmp_path / "mac.txt").write_text("text", encoding="utf-16")
  with pytest.raises(ValueError, match="mac.txt:1: not UTF-8: .* UTF-16"):
    read("text", tmp_path)


def test_linked_folders_are_read_once_and_circles_end(tmp_path):
  corpus, other = tmp_path / "corpus", tmp_path / "other" / "[1]"
  for folder in (corpus / "inner", other / "deep"):
    folder.mkdir(parents=True)
    (folder / "a").write_text(str(folder))
  (corpus / "z").symlink_to(other)
  (corpus / "b").symlink_to(other)  # the same one again
  (corpus / "inner" / "up").symlink_to(corpus)
  (corpus / "all").symlink_to(tmp_path)  # far more than the corpus
  (other / "back").symlink_to(corpus / "inner")
  (other / "deep" / "circle").symlink_to(other)
  (corpus / "gone").symlink_to(tmp_path / "absent")
  os.mkfifo(corpus / "pipe")
  kept = texts("text", corpus, skipped := corpora.Skipped())
  assert sorted(kept) == ["b/deep/a:1", "inner/a:1"]
  assert skipped == {"not a regular file": 2, "link to a parent folder": 2}
  for name in ("gone", "pipe", "all"):
    assert any(place.endswith(f"/{name}") for place in skipped.places), name


def test_what_is_no_file_and_no_folder_is_refused(tmp_path):
  with pytest.raises(ValueError, match="'text' needs data.path"):
    read("text", "")  # which would be the current folder
  with pytest.raises(ValueError, match="data.source is 'txt'; choose one of"):
    read("txt", tmp_path)
  os.mkfifo(tmp_path / "pipe")
  for path in (tmp_path / "pipe", "/dev/zero"):
    with pytest.raises(ValueError, match="neither a file nor a folder"):
      read("text", path)


def test_a_folder_that_cannot_be_listed_is_named_or_counted(
  tmp_path, monkeypatch
):
  (tmp_path / "locked").mkdir()
  (tmp_path / "good").write_text("good")
  scandir = os.scandir

  def refuse(path):
    if "locked" in str(path):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)  # root may read everything
  with pytest.raises(ValueError, match="locked: unreadable: .*on_error='skip'"):
    read("text", tmp_path)
  kept = texts("text", tmp_path, skipped := corpora.Skipped(), on_error="skip")
  assert list(kept) == ["good:1"] and skipped == {"unreadable": 1}


def test_what_has_no_status_is_named_or_counted(tmp_path, monkeypatch):
  """A folder and a file that the disk refuses behind their names."""
  (tmp_path / "stale").mkdir()
  (tmp_path / "good").write_text("good")
  stat = os.stat

  def refuse(path, **options):
    if pathlib.Path(path).name in names:
      raise OSError(error, os.strerror(error), str(path))
    return stat(path, **options)

  monkeypatch.setattr(os, "stat", refuse)
  for names in (["stale"], ["other"]):
    (tmp_path / "other").write_text("other")
    error = errno.ESTALE  # it may pass
    for on_error in ("raise", "skip"):
      with pytest.raises(OSError, match=f"{names[0]} cannot be read now .Stal"):
        read("text", tmp_path, on_error=on_error)
    error = errno.EACCES
    with pytest.raises(ValueError, match=f"{names[0]}: unreadable: .*skip"):
      read("text", tmp_path)
    kept = texts(
      "text", tmp_path, skipped := corpora.Skipped(), on_error="skip"
    )
    assert "good:1" in kept and skipped == {"unreadable": 1}


@pytest.mark.parametrize(
  "source, ending",
  [
    ("text", ".txt"),
    ("python", ".py"),
    ("jsonl", ".jsonl"),
    ("array_record", ".array_record"),
  ],
)
def test_a_read_that_fails_for_once_leaves_nothing_out(
  source, ending, tmp_path, monkeypatch
):
  """Not as damaged, whatever `on_error` says: the text may be whole."""
  monkeypatch.setattr(corpora, "_ROOTS", [("stdlib", "lib", ())])
  monkeypatch.setattr(sysconfig, "get_path", lambda label: str(tmp_path))
  for name in "ab":
    (tmp_path / f"{name}{ending}").write_text('{"text": "x = 1"}\n')

  class File(io.FileIO):
    """Of which every read of one fails."""

    def read(self, *size):
      if pathlib.Path(self.name).stem == "b":
        raise OSError(errno.EIO, "Input/output error")
      return super().read(*size)

    def readline(self, *size):
      return self.read()

  def record_reader(path):
    raise RuntimeError("pread() failed")

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "open", lambda path, *_: File(str(path)))
    patch.setattr(pathlib.Path, "read_bytes", lambda path: path.open().read())
    patch.setattr(array_record_module, "ArrayRecordReader", record_reader)
    (tmp_path / f"a{ending}").unlink()
    for on_error in ("raise", "skip"):
      with pytest.raises(OSError, match=f"b{ending} cannot be read now .Input"):
        read(source, tmp_path, on_error=on_error)
  if source != "array_record":
    assert len(read(source, tmp_path, on_error="skip")) == 1


def test_zstandard_frames_follow_each_other(tmp_path):
  frames = [zstandard.compress(b"one\n"), zstandard.compress(b"two\n" * 9999)]
  (tmp_path / "a.zst").write_bytes(b"".join(frames))
  (document,) = read("text", tmp_path)
  assert document.text == b"one\n" + b"two\n" * 9999


def test_a_small_file_of_much_text_is_read_soon(tmp_path):
  """40 MB in 4 kB: every read copied all that was left of them."""
  (tmp_path / "a.zst").write_bytes(zstandard.compress(b"x\n" * 20_000_003))
  begin = time.process_time()
  size = sum(len(d.text) for d in read("text", tmp_path))
  assert size == 40_000_006
  assert time.process_time() - begin < 5  # 0.1 s here


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
  skipped = corpora.Skipped()
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
  skipped = corpora.Skipped()
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
  with pytest.raises(ValueError, match="max_bytes 2 has no room .* of a:1"):
    read("text", tmp_path, max_bytes=2)


def test_this_interpreter_has_a_corpus():
  documents = read("python", "", max_bytes=1_000_003)
  assert 900_000 < sum(len(d.text) for d in documents) <= 1_000_003
  assert any(d.name.startswith("packages/") for d in documents)


def document(text):
  return corpora.Document("", text)


def test_exact_duplicates_are_dropped_and_counted():
  skipped = corpora.Skipped()
  kept = splits.deduplicated(map(document, [b"a", b"b", b"a", b"a "]), skipped)
  assert [d.text for d in kept] == [b"a", b"b", b"a "]
  assert skipped == {"duplicate": 1}


def test_split_depends_on_the_bytes_alone_and_grows_with_the_share():
  documents = [document(b"%d" % i) for i in range(10_007)]
  held = {d.text for d, out in splits.split(documents, 0.1) if out}
  # Binomial: mean 1001, standard deviation 30; the hash is fixed.
  assert 900 < len(held) < 1100
  backwards = splits.split(documents[::-1], 0.1)
  assert {d.text for d, out in backwards if out} == held
  assert all(splits.is_held_out(text, 0.2) for text in held)
  # Pinned: a changed rule would move training text into every held-out set.
  pinned = [i for i in range(60) if splits.is_held_out(b"%d" % i, 0.1)]
  assert pinned == [4, 10, 29, 35, 44, 54]


@pytest.mark.parametrize("lines", [1, 3, 700, 25_000])
@pytest.mark.parametrize("ending", ["\n", " ", ""])
def test_one_text_file_gives_both_splits(tmp_path, lines, ending):
  path = tmp_path / "book.txt"
  word = "\u65e5" * 20
  path.write_text("".join(f"{i} {word}{ending}" for i in range(lines)) + word)
  documents = read("text", path)
  whole = b"".join(d.text for d in documents)
  # No position below it: no whole document is held out.
  share = min(0.02, min(splits.position(d.text) for d in documents) / 2)
  if len(whole) < 128:
    with pytest.raises(ValueError, match="one document of 12. bytes, .* text"):
      splits.find_cut(documents, share)
    return
  cut = splits.find_cut(iter(documents), share)
  assert cut == splits.find_cut(read("text", path), share)
  parts = list(splits.split(documents, share, cut))
  assert b"".join(d.text for d, _ in parts) == whole
  ((tail,), rest) = ([d.text for d, out in parts if out == o] for o in (1, 0))
  assert len(rest) == len(documents) and all(rest)
  assert 64 <= len(tail) <= max(2 * share * len(whole), 130)
  tail.decode()
  if ending == "\n" and lines > 3:
    assert rest[documents.index(cut.document)].endswith(b"\n")
  size = len(cut.document.text)
  assert str(cut).startswith(f"the last {len(tail)} of {size} bytes of book")


def test_whole_documents_are_held_out_where_there_are_any():
  some = [document(b"%d" % i) for i in range(11)]
  assert splits.find_cut(some, 0.1) is None  # see `pinned`
  # Too short to be cut: one of them is held out, the first of the longest.
  cut = splits.find_cut(some[1:4], 0.99)
  sides = [(d.text, out) for d, out in splits.split(some[1:4], 0.99, cut)]
  assert sides == [(b"1", True), (b"2", False), (b"3", False)]
  with pytest.raises(ValueError, match="0.99 .* document of 1 bytes, .* 128"):
    splits.find_cut(some[:1], 0.99)
  long = [*some[:3], document(b"a line\n" * 99)]
  assert splits.find_cut(long, 1e-9).at == 7 * 89


@pytest.mark.parametrize("field", ["path", "tokenizer", "cache"])
def test_a_home_that_is_no_ones_is_named(field):
  data = config.Data(**{field: "~no-such-user/x"})
  with pytest.raises(ValueError, match=f"data.{field} is '~no-such-user/x'"):
    data.check()


def test_no_name_of_a_folder_is_a_pattern(tmp_path):
  folder = tmp_path / "a[0:1]*?" / "x.jsonl"
  folder.mkdir(parents=True)
  array_record(folder / "[0:9].array_record", [b"one", b"two"])
  (folder / "[b].jsonl").write_text('{"text": "three"}')
  assert list(texts("array_record", folder).values()) == [b"one", b"two"]
  assert list(texts("jsonl", tmp_path).values()) == [b"three"]
