"""Documents to one flat array of tokens, once, in a cache on disk.

A cache entry is a folder that holds, for each split, `tokens` (the smallest
unsigned type that takes the vocabulary) and `starts` (int64, where documents
begin), and `meta.json` with sizes and checksums (of the checksums of the
files' blocks). It is built beside its place and renamed into it whole.
"""

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import shutil
import warnings
import zlib
from collections.abc import Iterator

import numpy as np

from mtp_jax import config
from mtp_jax.data import blocks, corpora

_VERSION = 2  # of the documents and of the layout; a new one builds anew
_SPLITS = ("train", "held_out")
CacheDamaged = blocks.CacheDamaged


@dataclasses.dataclass(frozen=True)
class Packed:
  """A split as one sequence of tokens; every document is [bos, ids, eos].

  Whatever `pack` returns is checked whenever it is read, block by block: a
  cache that is damaged while it is in use raises `CacheDamaged` before a
  damaged token reaches anyone. So every batch that was ever given is sound,
  and with it every step before the error; nothing is left to verify.
  """

  tokens: np.ndarray | blocks.Array  # [tokens], unsigned
  starts: np.ndarray | blocks.Array  # [documents], int64, ascending from 0
  bytes_per_token: float  # UTF-8 bytes over predicted tokens: all but bos
  fingerprint: str  # of tokens, starts and tokenizer
  documents: int
  skipped: dict[str, int]  # records left out of the corpus, by reason

  def windows(self, seq_len: int) -> int:
    """Number of windows; the last one may be padded."""
    return -(-len(self.tokens) // seq_len)

  def window(
    self, index: int, seq_len: int, n_future: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [index T, index T + T + N) and the documents they belong to.

    Args:
      index: from 0 to `windows(seq_len)` - 1.
      seq_len: T.
      n_future: N; 0 leaves out the tokens after the window's end.

    Returns:
      tokens [T+N], int32, and segments [T+N], int32: index of the document
      plus 1, and 0 (with token 0) past the end of the data.

    Raises:
      IndexError: no such window.
      CacheDamaged: its tokens are not the ones that were packed.
    """
    if not 0 <= index < self.windows(seq_len):
      raise IndexError(
        f"window {index} of {self.windows(seq_len)} at seq_len {seq_len}"
      )
    low = index * seq_len
    found = self.tokens[low : low + seq_len + n_future]
    tokens = np.zeros(seq_len + n_future, np.int32)
    segments = np.zeros_like(tokens)
    tokens[: len(found)] = found
    places = np.arange(low, low + len(found))
    before = self.starts.searchsorted(low, "right")
    until = self.starts.searchsorted(low + len(found), "left")
    inside = self.starts[before:until]
    segments[: len(found)] = before + np.searchsorted(
      inside, places, side="right"
    )
    return tokens, segments

  def excerpts(
    self, count: int, length: int, size: int, per_document: int = 1
  ) -> list[np.ndarray]:
    """First `length` tokens of pieces of `size` tokens, each in one document.

    Args:
      count: how many, spread evenly over all such pieces.
      length: tokens of each, at most `size`.
      size: tokens of a piece; the first begins where its document does.
      per_document: most pieces of one document.

    Returns:
      `count` arrays [length].

    Raises:
      ValueError: there are fewer such pieces.
    """
    starts = np.asarray(self.starts)
    ends = np.append(starts[1:], len(self.tokens))
    pieces = np.minimum((ends - starts) // size, per_document)
    number = np.arange(pieces.sum()) - np.repeat(
      np.cumsum(pieces) - pieces, pieces
    )
    starts = np.repeat(starts, pieces) + number * size
    if len(starts) < count:
      raise ValueError(
        f"only {len(starts)} pieces of documents have {size} tokens, but "
        f"{count} were asked for: ask for fewer or shorter ones"
      )
    places = np.linspace(0, len(starts) - 1, count).astype(int)
    return [np.array(self.tokens[s : s + length]) for s in starts[places]]


def pack(data: config.Data, tokenizer) -> tuple[Packed, Packed]:
  """Reads, deduplicates, splits and tokenises a corpus, once.

  Later calls open the cache, which is keyed by names, sizes and times of the
  corpus's files, by the fields of `data` that choose documents, and by the
  tokenizer. A killed packing leaves nothing that a later call would take for
  a cache; concurrent ones wait for the first; a damaged cache is found by its
  checksums (about 2 GB a second) and built again with a warning. Memory holds
  one document at a time, 16 bytes of every one read, the file names, and a
  checksum of 4 bytes for every 8 KiB.

  Args:
    data: `source`, `path`, `field`, `max_bytes`, `held_out`, `on_error` and
      `cache` are used.
    tokenizer: `tokenizer.Bytes` or `tokenizer.SentencePiece`.

  Returns:
    The training split and the held-out split.

  Raises:
    ValueError: as `corpora.read`, or a split would be without a document.
  """
  cache = pathlib.Path(data.cache).expanduser()
  folder = cache / _key(data, tokenizer)
  cache.mkdir(parents=True, exist_ok=True)
  with _locked(folder.with_suffix(".lock")):
    if folder.exists():
      try:
        return _open(folder)
      except CacheDamaged as error:
        warnings.warn(f"packing anew: {error}", stacklevel=2)
        shutil.rmtree(folder)
    partial = folder.with_suffix(f".{platform.node()}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed packing
    partial.mkdir()
    try:
      _build(partial, data, tokenizer)
      partial.rename(folder)
    finally:
      shutil.rmtree(partial, ignore_errors=True)
    return _open(folder)


def _build(folder: pathlib.Path, data: config.Data, tokenizer) -> None:
  skipped = collections.Counter()
  documents = corpora.deduplicated(corpora.read(data, skipped), skipped)
  dtype = np.min_scalar_type(tokenizer.vocab - 1)
  with contextlib.ExitStack() as stack:
    splits = [
      stack.enter_context(_Writer(folder, name, dtype)) for name in _SPLITS
    ]
    for document, held_out in corpora.split(documents, data.held_out):
      ids = tokenizer.encode(document.text)
      ids = np.concatenate(([tokenizer.bos], ids, [tokenizer.eos]))
      splits[held_out].add(ids, len(document.text))
    meta = {s.name: s.summary(tokenizer.fingerprint) for s in splits}
  counts = [meta[name]["documents"] for name in _SPLITS]
  if not all(counts):
    raise ValueError(
      f"data.held_out {data.held_out} splits {sum(counts)} documents into "
      f"{counts[0]} for training and {counts[1]} held out; both need one"
    )
  meta["skipped"] = dict(sorted(skipped.items()))
  (folder / "meta.json").write_text(_sealed(meta))


class _Writer:
  """One split being written, with running checksums."""

  def __init__(self, folder: pathlib.Path, name: str, dtype: np.dtype):
    self.name, self._dtype = name, dtype
    self._files = {
      f"{name}.{kind}": blocks.Writer(folder / f"{name}.{kind}")
      for kind in ("tokens", "starts")
    }
    self._digest = hashlib.sha256(dtype.str.encode())
    self._tokens = self._documents = self._bytes = 0

  def __enter__(self):
    return self

  def __exit__(self, *error):
    with contextlib.ExitStack() as stack:
      for file in self._files.values():
        stack.callback(file.close)

  def add(self, ids: np.ndarray, size: int) -> None:
    """Appends one document of `size` bytes, its special ids included."""
    start = np.array(self._tokens, np.int64)
    arrays = ids.astype(self._dtype), start
    for file, array in zip(self._files.values(), arrays, strict=True):
      raw = array.tobytes()
      file.write(raw)
      self._digest.update(raw)
    self._tokens += len(ids)
    self._documents += 1
    self._bytes += size

  def summary(self, tokenizer: str) -> dict:
    self._digest.update(tokenizer.encode())
    return {
      "dtype": self._dtype.str,
      "tokens": self._tokens,
      "documents": self._documents,
      "bytes": self._bytes,
      "crc32": {n: file.checksum() for n, file in self._files.items()},
      "fingerprint": self._digest.hexdigest()[:16],
    }


def _open(folder: pathlib.Path) -> tuple[Packed, Packed]:
  """The splits of a cache entry, read once to see that nothing is damaged.

  Raises:
    CacheDamaged: something is.
  """
  try:
    text = (folder / "meta.json").read_text()
    meta = json.loads(text)
    if _sealed(meta) != text:
      raise CacheDamaged(f"cache {folder} has a damaged meta.json")
    return tuple(_split(folder, name, meta) for name in _SPLITS)
  except CacheDamaged:
    raise
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
    raise CacheDamaged(f"cache {folder} cannot be read: {error!r}") from error


def _split(folder: pathlib.Path, name: str, meta: dict) -> Packed:
  split = meta[name]
  arrays = {}
  for kind, dtype, size in (
    ("tokens", split["dtype"], split["tokens"]),
    ("starts", "<i8", split["documents"]),
  ):
    path = folder / f"{name}.{kind}"
    checksums = blocks.checksums(path)
    if zlib.crc32(checksums.tobytes()) != split["crc32"][path.name]:
      raise CacheDamaged(f"cache {folder} has a damaged {path.name}")
    arrays[kind] = blocks.Array(path, dtype, checksums, size)
  return Packed(
    **arrays,
    bytes_per_token=split["bytes"] / (split["tokens"] - split["documents"]),
    fingerprint=split["fingerprint"],
    documents=split["documents"],
    skipped=meta["skipped"],
  )


def _sealed(meta: dict) -> str:
  """JSON with a checksum of itself, which is left out of the checksum."""
  meta = {k: v for k, v in meta.items() if k != "crc32"}
  crc = zlib.crc32(json.dumps(meta).encode())
  return json.dumps(meta | {"crc32": crc}, indent=2) + "\n"


def _key(data: config.Data, tokenizer) -> str:
  chosen = [_VERSION, data.source, data.max_bytes, data.held_out]
  chosen += [data.on_error, tokenizer.fingerprint]
  if data.source == "jsonl":
    chosen.append(data.field)
  digest = hashlib.sha256(json.dumps(chosen).encode())
  for name, path in corpora.files(data):
    stat = path.stat()
    line = [name, os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
    digest.update(json.dumps(line).encode())
  return digest.hexdigest()[:24]


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Holds a file's lock; the system frees it when the process dies."""
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
