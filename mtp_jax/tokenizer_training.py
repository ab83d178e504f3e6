"""Trains a SentencePiece model on documents."""

import io
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from mtp_jax import tokenizer

_SENTENCE = 4000  # bytes; the trainer drops sentences of more than 4192


def train(
  documents: Iterable[str | bytes], path: str | os.PathLike, vocab: int
) -> tokenizer.SentencePiece:
  """Trains a lossless byte-pair model and writes it to a file.

  The model suits source code. It has byte fallback and no normalisation, adds
  no dummy prefix, keeps whitespace, and may join a run of spaces in one piece.

  Args:
    documents: texts; bytes must be UTF-8. Each is read once.
    path: the `.model` file to write. Missing folders are made. Whether the
      file can be written is checked before training. It appears only when it
      is complete.
    vocab: number of ids, which include 256 bytes and 4 special ids. A small
      corpus may give fewer: see `vocab` of the returned tokenizer.

  Raises:
    ValueError: there is no text, its characters need a larger vocabulary, or
      the path is a folder.
    OSError: the file cannot be written.
    Exception: whatever iterating over `documents` raises.
  """
  path = pathlib.Path(path).expanduser()
  if path.is_dir():
    raise ValueError(
      f"{path} is a folder: name the file to write, such as {path}/code.model"
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  model, errors = io.BytesIO(), []

  def sentences():
    try:
      yield from _sentences(documents)
    except Exception as error:  # the trainer raises an error of its own
      errors.append(error)
      raise

  try:
    with partial.open("wb") as file:
      sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_writer=model,
        vocab_size=vocab,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        minloglevel=2,
      )
      file.write(model.getvalue())
    os.replace(partial, path)
  except RuntimeError as error:
    if errors:
      raise errors[0] from None
    raise ValueError(
      f"SentencePiece cannot learn {vocab} ids from this text: "
      f"{_explanation(str(error))}"
    ) from error
  finally:
    partial.unlink(missing_ok=True)
  return tokenizer.SentencePiece(path)


def _explanation(error: str) -> str:
  """Explains a message of the trainer; returns unknown ones as they are."""
  if "sentences_.empty()" in error:
    return "there is no text"
  if numbers := re.search(r"required_chars\. \d+ vs (\d+)", error):
    return (
      f"its characters, the 256 bytes and the 4 specials need {numbers[1]}: "
      "ask for more"
    )
  return error


def _sentences(documents: Iterable[str | bytes]) -> Iterator[str]:
  """Cuts documents into sentences that the trainer accepts.

  The trainer silently drops a sentence of more than 4192 bytes, and one that
  holds U+0000 or U+2585. Documents are therefore cut after a line end, else
  before a space, else between two characters. U+0000 and U+2585 are left out;
  the tokenizer writes them with byte pieces.
  """
  for text in documents:
    raw = tokenizer.utf8(text)
    for part in re.split(b"\0|\xe2\x96\x85", raw):
      start = 0
      while start < len(part):
        end = min(start + _SENTENCE, len(part))
        if end < len(part):
          end = (
            part.rfind(b"\n", start, end) + 1
            or max(part.rfind(b" ", start + 1, end), 0)
            or tokenizer.character(part, end)
          )
        yield part[start:end].decode("utf-8")
        start = end
