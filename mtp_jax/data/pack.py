"""Packs a corpus into arrays of tokens, once, in a cache on disk.

An entry of the cache (`cache_entry.py`) is built in a folder beside its final
place and renamed when it is complete.
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
from collections.abc import Iterator

import numpy as np

from mtp_jax import config
from mtp_jax.data import blocks, cache_entry, corpora, splits
from mtp_jax.data import packed as packed_lib

_Splits = tuple[packed_lib.Packed, packed_lib.Packed]  # training, held out
_VERSION = 3  # of the documents and of the format; another one packs anew


def pack(data: config.Data, tokenizer) -> _Splits:
  """Reads, deduplicates, splits and tokenises a corpus, once.

  Later calls read the cache. Its key consists of the names, sizes and times of
  the corpus's files, the fields of `data` that choose documents, and the
  tokenizer. A call that is killed or fails leaves no entry. Of concurrent calls
  one packs, and the others wait for it. Every call verifies the checksums (0.5
  to 2 GB per second) and packs a damaged entry again, with a warning. Memory
  holds two documents, a hash of 16 bytes per document, the file names, and a
  checksum of 4 bytes per 8 KiB. Only the owner can read the cache: it contains
  the text of the corpus.

  Warnings are given for damaged records that are left out, for a document that
  is cut (`splits.find_cut`), and for a split smaller than a batch.

  Args:
    data: `source`, `path`, `field`, `prompt`, `loss_on`, `max_bytes`,
      `held_out`, `on_error` and `cache` are used; `batch` and `seq_len` only
      for a warning.
    tokenizer: any kind of `mtp_jax.tokenizer`.

  Returns:
    The training split and the held-out split.

  Raises:
    ValueError: from `corpora.read` or `splits.find_cut`, or because the corpus
      changed while it was packed.
    OSError: the cache cannot be read or written, or a file of the corpus
      cannot be read now.
  """
  cache = pathlib.Path(data.cache).expanduser()
  key = _key(data, tokenizer)
  with cache_entry.writing(cache):
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
  with _locked(cache / f"{key}.lock"):
    packed = _cached(cache / key, data, tokenizer)
  _warn_of_size(packed, data)
  return packed


def _cached(folder, data, tokenizer) -> _Splits:
  """Reads the entry `folder`; builds it first if it is missing or damaged."""
  if folder.exists():
    try:
      return cache_entry.read(folder)
    except blocks.CacheDamaged as error:
      warnings.warn(f"packing anew: {error}", stacklevel=3)
      with cache_entry.writing(folder.parent):
        shutil.rmtree(folder)
  partial = folder.with_suffix(f".{platform.node()}.partial")
  shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
  with cache_entry.writing(folder.parent):
    partial.mkdir(mode=0o700)
  try:
    _build(partial, data, tokenizer)
    if _key(data, tokenizer) != folder.name:
      raise ValueError(
        f"files of {data.source} corpus {data.path!r} changed while they were "
        "packed: start again when they are complete"
      )
    with cache_entry.writing(folder.parent):
      partial.rename(folder)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
  return cache_entry.read(folder)


def _build(folder: pathlib.Path, data: config.Data, tokenizer) -> None:
  """Writes an entry for the corpus into the empty `folder`."""
  cut = splits.find_cut(splits.deduplicated(corpora.read(data)), data.held_out)
  skipped = corpora.Skipped()
  documents = splits.deduplicated(corpora.read(data, skipped), skipped)
  dtype = np.min_scalar_type(tokenizer.vocab - 1)
  with contextlib.ExitStack() as stack:
    writers = [
      stack.enter_context(
        cache_entry.Writer(folder, name, dtype, data.loss_on == "answer")
      )
      for name in cache_entry.SPLITS
    ]
    for document, held_out in splits.split(documents, data.held_out, cut):
      writers[held_out].add(*_tokens(document, data.loss_on, tokenizer))
    meta = {w.name: w.summary(tokenizer.fingerprint) for w in writers}
  meta["skipped"] = dict(sorted(skipped.items()))
  meta["cut"] = str(cut or "")
  meta["files"] = len(corpora.files(data))
  cache_entry.write_meta(folder, meta)
  if skipped.places and data.source != "python":
    warnings.warn(f"left out of the corpus: {skipped}", stacklevel=4)
  if cut:
    warnings.warn(
      f"data.held_out {data.held_out} would leave one split without a "
      f"document: held out is {cut}",
      stacklevel=4,
    )


def _tokens(
  document: corpora.Document, loss_on: str, tokenizer
) -> tuple[np.ndarray, int, int]:
  """Arguments of `cache_entry.Writer.add`.

  The ids of a prompt are those that a decoder is given, so no piece spans the
  prompt and its answer.
  """
  prompt, text = document.text[: document.answer], document.text
  if not prompt:
    parts = [tokenizer.encode(text)]
  else:
    text = text[document.answer :]
    parts = [tokenizer.encode(prompt), tokenizer.encode_after(text, prompt)]
  ids = np.concatenate(([tokenizer.bos], *parts, [tokenizer.eos]))
  if loss_on == "answer":
    return ids, len(text), len(ids) - len(parts[-1]) - 1
  return ids, len(document.text), 1


def _warn_of_size(packed: _Splits, data: config.Data) -> None:
  """Warns of splits with fewer tokens than a batch."""
  needed = data.batch * data.seq_len
  small = [
    f"{name} has {len(split.tokens)} tokens"
    for name, split in zip(cache_entry.SPLITS, packed, strict=True)
    if len(split.tokens) < needed
  ]
  if small:
    warnings.warn(
      f"{' and '.join(small)}, fewer than the {needed} of one batch "
      f"(data.batch {data.batch} x data.seq_len {data.seq_len}): batches "
      "repeat them. Give more text, or a smaller batch",
      stacklevel=3,
    )


def _key(data: config.Data, tokenizer) -> str:
  """The name of the corpus's entry: a hash of all that its content depends on.

  Raises:
    ValueError: a file of the corpus cannot be read.
  """
  settings = [_VERSION, data.source, data.max_bytes, data.held_out]
  settings += [data.on_error, tokenizer.fingerprint]
  if data.source == "jsonl":
    settings.append(data.field)
  if data.prompt:
    settings += [data.prompt, data.loss_on]
  digest = hashlib.sha256(json.dumps(settings).encode())
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
def _locked(path: pathlib.Path) -> Iterator[None]:
  """Holds a lock on a file; the system releases it if the process dies.

  In a cache that several users share, another user could place a link there to
  have this process open a file of its own. Links are therefore refused, and
  the file is never truncated.
  """
  flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
  if path.is_symlink():
    raise ValueError(
      f"{path} is a link, which this library never makes: remove it, or set "
      "data.cache to a folder of your own"
    )
  with cache_entry.writing(path.parent):
    file = os.open(path, flags, 0o600)
  try:
    with cache_entry.writing(path.parent):
      fcntl.flock(file, fcntl.LOCK_EX)
    yield
  finally:
    os.close(file)
