"""One entry of the cache of packed corpora: a folder, written once.

For each split it holds `tokens`, of the smallest unsigned type that fits the
vocabulary, and `starts`, int64, the positions where documents begin; where
prompts are not learnt also `weight`, uint8, of each token. meta.json
holds sizes and checksums. Each file has a checksum per block, and meta.json a
checksum of these checksums.
"""

import contextlib
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator

import numpy as np

from mtp_jax.data import blocks
from mtp_jax.data import packed as packed_lib

SPLITS = ("train", "held_out")
# Errors of a read that prove damage: a file is missing or has wrong contents.
# Other OSErrors, such as EIO and ESTALE, may be temporary.
_DAMAGE = (
  FileNotFoundError,
  NotADirectoryError,
  IsADirectoryError,
  ValueError,
  KeyError,
  AttributeError,
  TypeError,
)


class Writer:
  """Writes one split of a new entry, with checksums; a context manager.

  Args:
    folder: of the entry.
    name: of the split.
    dtype: of the tokens.
    weighted: whether tokens have weights.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    name: str,
    dtype: np.dtype,
    weighted: bool = False,
  ):
    self.name, self._dtype, self._cache = name, dtype, folder.parent
    kinds = ("tokens", "starts", "weight")[: 3 if weighted else 2]
    with writing(self._cache):
      self._files = {
        f"{name}.{kind}": blocks.Writer(folder / f"{name}.{kind}")
        for kind in kinds
      }
    self._digest = hashlib.sha256(dtype.str.encode())
    self._tokens = self._documents = self._bytes = self._predicted = 0

  def __enter__(self):
    return self

  def __exit__(self, *error):
    with writing(self._cache), contextlib.ExitStack() as stack:
      for file in self._files.values():
        stack.callback(file.close)

  def add(self, ids: np.ndarray, size: int, unlearnt: int = 1) -> None:
    """Appends a document.

    Args:
      ids: [length], with bos and eos.
      size: the UTF-8 bytes of the tokens that are learnt.
      unlearnt: how many of the first tokens are not learnt. Without weights
        it is 1: no head predicts bos.
    """
    start = np.array(self._tokens, np.int64)
    weight = np.arange(len(ids)) >= unlearnt
    arrays = ids.astype(self._dtype), start, weight.astype(np.uint8)
    for file, array in zip(self._files.values(), arrays, strict=False):
      raw = array.tobytes()
      with writing(self._cache):
        file.write(raw)
      self._digest.update(raw)
    self._tokens += len(ids)
    self._predicted += len(ids) - unlearnt
    self._documents += 1
    self._bytes += size

  def summary(self, tokenizer: str) -> dict:
    """What meta.json says of this split; `tokenizer` is a fingerprint."""
    self._digest.update(tokenizer.encode())
    return {
      "dtype": self._dtype.str,
      "tokens": self._tokens,
      "documents": self._documents,
      "bytes": self._bytes,
      "predicted": self._predicted,
      "crc32": {n: file.checksum() for n, file in self._files.items()},
      "fingerprint": self._digest.hexdigest()[:16],
    }


def write_meta(folder: pathlib.Path, meta: dict) -> None:
  """Writes meta.json: for each split a `Writer.summary`, and more."""
  with writing(folder.parent):
    (folder / "meta.json").write_text(_sealed(meta), encoding="utf-8")


def read(folder: pathlib.Path) -> tuple[packed_lib.Packed, packed_lib.Packed]:
  """The splits of an entry, after all its checksums were verified.

  Raises:
    CacheDamaged: a file is missing or is not what was written.
    OSError: the entry cannot be read now; it may be whole.
  """
  try:
    text = (folder / "meta.json").read_text(encoding="utf-8")
    meta = json.loads(text)
    if _sealed(meta) != text:
      raise blocks.CacheDamaged(f"cache {folder} has a damaged meta.json")
    return tuple(_split(folder, name, meta) for name in SPLITS)
  except blocks.CacheDamaged:
    raise
  except _DAMAGE as error:
    raise blocks.CacheDamaged(
      f"cache {folder} cannot be read: {error!r}"
    ) from error
  except OSError as error:
    raise OSError(
      f"the packed corpus {folder} cannot be read: {error}. It may be whole, "
      "and nothing was removed: start again. If it happens again, remove that "
      "folder, or set data.cache to one on another disk"
    ) from error


def _split(folder: pathlib.Path, name: str, meta: dict) -> packed_lib.Packed:
  """The split `name`; CacheDamaged if a checksum differs."""
  split = meta[name]
  arrays = {}
  for kind, dtype, size in (
    ("tokens", split["dtype"], split["tokens"]),
    ("starts", "<i8", split["documents"]),
    ("weight", "|u1", split["tokens"]),
  ):
    path = folder / f"{name}.{kind}"
    if kind == "weight" and path.name not in split["crc32"]:
      continue
    checksums = blocks.checksums(path)
    if zlib.crc32(checksums.tobytes()) != split["crc32"][path.name]:
      raise blocks.CacheDamaged(f"cache {folder} has a damaged {path.name}")
    arrays[kind] = blocks.Array(path, dtype, checksums, size)
  # Entries of earlier versions have no such number, and no weights.
  predicted = split.get("predicted", split["tokens"] - split["documents"])
  return packed_lib.Packed(
    **arrays,
    bytes_per_token=split["bytes"] / predicted,
    fingerprint=split["fingerprint"],
    documents=split["documents"],
    skipped=meta["skipped"],
    cut=meta["cut"],
    files=meta["files"],
  )


def _sealed(meta: dict) -> str:
  """`meta` as JSON, with a checksum of the rest of it."""
  meta = {k: v for k, v in meta.items() if k != "crc32"}
  crc = zlib.crc32(json.dumps(meta).encode())
  return json.dumps(meta | {"crc32": crc}, indent=2) + "\n"


@contextlib.contextmanager
def writing(cache: pathlib.Path) -> Iterator[None]:
  """Adds the remedy to the message of an OSError raised inside."""
  try:
    yield
  except OSError as error:
    raise OSError(
      f"the packed corpus cannot be kept in data.cache {cache}: {error}. Free "
      "space there, or set data.cache to another folder"
    ) from error
