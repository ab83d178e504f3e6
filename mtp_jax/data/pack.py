"""Documents to one flat array of tokens, once, in a cache on disk.

A cache entry is a folder that holds, for each split, `tokens` (the smallest
unsigned type that takes the vocabulary) and `starts` (int64, where documents
begin), and `meta.json` with sizes and checksums (of the checksums of the
files' blocks). It is built beside its place and renamed into it whole.
"""

import contextlib
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
from mtp_jax.data import packed as packed_lib

_VERSION = 3  # of the documents and of the layout; a new one builds anew
_SPLITS = ("train", "held_out")
# What reading raises if files are missing or their contents are wrong. Other
# OSErrors, such as EIO and ESTALE, may pass: the cache may be whole.
_DAMAGE = (
  FileNotFoundError,
  NotADirectoryError,
  IsADirectoryError,
  ValueError,
  KeyError,
  AttributeError,
  TypeError,
)
CacheDamaged, Packed = blocks.CacheDamaged, packed_lib.Packed


def pack(data: config.Data, tokenizer) -> tuple[Packed, Packed]:
  """Reads, deduplicates, splits and tokenises a corpus, once.

  Later calls open the cache, which is keyed by names, sizes and times of the
  corpus's files, by the fields of `data` that choose documents, and by the
  tokenizer. A killed or failed packing leaves nothing that a later call would
  take for a cache; concurrent ones wait for the first; a damaged cache is
  found by its checksums (0.5 to 2 GB a second) and built again with a warning.
  Memory holds two documents at a time, 16 bytes of every one read, the file
  names, and a checksum of 4 bytes for every 8 KiB. The cache holds the text of
  the corpus: what is made there can be read by its owner alone.

  Warnings tell what was left out as damaged, what was held out where no whole
  document could be, and a split smaller than a batch.

  Args:
    data: `source`, `path`, `field`, `max_bytes`, `held_out`, `on_error` and
      `cache` are used; `batch` and `seq_len` for a warning.
    tokenizer: `tokenizer.Bytes` or `tokenizer.SentencePiece`.

  Returns:
    The training split and the held-out split.

  Raises:
    ValueError: as `corpora.read` and `corpora.find_cut`; or the corpus changed
      while it was packed.
    OSError: the cache cannot be read or written; the message names the remedy.
  """
  cache = pathlib.Path(data.cache).expanduser()
  key = _key(data, tokenizer)
  with _writing(cache):
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
  with _locked(cache / f"{key}.lock"):
    splits = _cached(cache / key, data, tokenizer)
  _warn_of_size(splits, data)
  return splits


def _cached(folder, data, tokenizer) -> tuple[Packed, Packed]:
  """The cache entry, built first if it is missing or damaged."""
  if folder.exists():
    try:
      return _open(folder)
    except CacheDamaged as error:
      warnings.warn(f"packing anew: {error}", stacklevel=3)
      with _writing(folder.parent):
        shutil.rmtree(folder)
  partial = folder.with_suffix(f".{platform.node()}.partial")
  shutil.rmtree(partial, ignore_errors=True)  # of a killed packing
  with _writing(folder.parent):
    partial.mkdir(mode=0o700)
  try:
    _build(partial, data, tokenizer)
    if _key(data, tokenizer) != folder.name:
      raise ValueError(
        f"files of {data.source} corpus {data.path!r} changed while they were "
        "packed: start again when they are complete"
      )
    with _writing(folder.parent):
      partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return _open(folder)


def _build(folder: pathlib.Path, data: config.Data, tokenizer) -> None:
  cut = corpora.find_cut(
    corpora.deduplicated(corpora.read(data)), data.held_out
  )
  skipped = corpora.Skipped()
  documents = corpora.deduplicated(corpora.read(data, skipped), skipped)
  dtype = np.min_scalar_type(tokenizer.vocab - 1)
  with contextlib.ExitStack() as stack:
    splits = [
      stack.enter_context(_Writer(folder, name, dtype)) for name in _SPLITS
    ]
    for document, held_out in corpora.split(documents, data.held_out, cut):
      ids = tokenizer.encode(document.text)
      ids = np.concatenate(([tokenizer.bos], ids, [tokenizer.eos]))
      splits[held_out].add(ids, len(document.text))
    meta = {s.name: s.summary(tokenizer.fingerprint) for s in splits}
  meta["skipped"] = dict(sorted(skipped.items()))
  meta["cut"] = str(cut or "")
  meta["files"] = len(corpora.files(data))
  with _writing(folder.parent):
    (folder / "meta.json").write_text(_sealed(meta), encoding="utf-8")
  if skipped.places and data.source != "python":
    warnings.warn(f"left out of the corpus: {skipped}", stacklevel=4)
  if cut:
    warnings.warn(
      f"data.held_out {data.held_out} would leave one split without a "
      f"document: held out is {cut}",
      stacklevel=4,
    )


def _warn_of_size(splits: tuple[Packed, Packed], data: config.Data) -> None:
  wanted = data.batch * data.seq_len
  small = [
    f"{name} has {len(split.tokens)} tokens"
    for name, split in zip(_SPLITS, splits, strict=True)
    if len(split.tokens) < wanted
  ]
  if small:
    warnings.warn(
      f"{' and '.join(small)}, fewer than the {wanted} of one batch "
      f"(data.batch {data.batch} x data.seq_len {data.seq_len}): batches "
      "repeat them. Give more text, or a smaller batch",
      stacklevel=3,
    )


class _Writer:
  """One split being written, with running checksums."""

  def __init__(self, folder: pathlib.Path, name: str, dtype: np.dtype):
    self.name, self._dtype, self._cache = name, dtype, folder.parent
    with _writing(self._cache):
      self._files = {
        f"{name}.{kind}": blocks.Writer(folder / f"{name}.{kind}")
        for kind in ("tokens", "starts")
      }
    self._digest = hashlib.sha256(dtype.str.encode())
    self._tokens = self._documents = self._bytes = 0

  def __enter__(self):
    return self

  def __exit__(self, *error):
    with _writing(self._cache), contextlib.ExitStack() as stack:
      for file in self._files.values():
        stack.callback(file.close)

  def add(self, ids: np.ndarray, size: int) -> None:
    """Appends one document of `size` bytes, its special ids included."""
    start = np.array(self._tokens, np.int64)
    arrays = ids.astype(self._dtype), start
    for file, array in zip(self._files.values(), arrays, strict=True):
      raw = array.tobytes()
      with _writing(self._cache):
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
    OSError: it cannot be read now; nothing says that it is damaged.
  """
  try:
    text = (folder / "meta.json").read_text(encoding="utf-8")
    meta = json.loads(text)
    if _sealed(meta) != text:
      raise CacheDamaged(f"cache {folder} has a damaged meta.json")
    return tuple(_split(folder, name, meta) for name in _SPLITS)
  except CacheDamaged:
    raise
  except _DAMAGE as error:
    raise CacheDamaged(f"cache {folder} cannot be read: {error!r}") from error
  except OSError as error:
    raise OSError(
      f"the packed corpus {folder} cannot be read: {error}. It may be whole, "
      "and nothing was removed: start again. If it happens again, remove that "
      "folder, or set data.cache to one on another disk"
    ) from error


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
    cut=meta["cut"],
    files=meta["files"],
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
    try:
      stat = path.stat()
    except OSError as error:
      raise ValueError(
        f"a file of {data.source} corpus {data.path!r} cannot be read: "
        f"{error}: start again when the corpus is complete"
      ) from error
    line = [name, os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
    digest.update(json.dumps(line).encode())
  return digest.hexdigest()[:24]


@contextlib.contextmanager
def _writing(cache: pathlib.Path) -> Iterator[None]:
  """Tells what to do about a cache that cannot be written."""
  try:
    yield
  except OSError as error:
    raise OSError(
      f"the packed corpus cannot be kept in data.cache {cache}: {error}. Free "
      "space there, or set data.cache to another folder"
    ) from error


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Holds a file's lock; the system frees it when the process dies.

  In a cache that several users share, a link planted in its place would have
  another file opened: links are not followed, and nothing is emptied.
  """
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
  if path.is_symlink():
    raise ValueError(
      f"{path} is a link, which this library never makes: remove it, or set "
      "data.cache to a folder of your own"
    )
  with _writing(path.parent):
    file = os.open(path, flags, 0o600)
  try:
    with _writing(path.parent):
      fcntl.flock(file, fcntl.LOCK_EX)
    yield
  finally:
    os.close(file)
