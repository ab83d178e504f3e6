"""Which kind of tokenizer a file or a folder holds."""

import pathlib

from mtp_jax.tokenizer import byte_ids, hugging_face, interface, sentence_piece

_NAMES = "tokenizer.json", "tokenizer.model"  # the first of them is taken


def load(name: str) -> interface.Tokenizer:
  """Returns the tokenizer that `config.Data.tokenizer` names.

  Args:
    name: 'bytes', or the path of a SentencePiece model, of a tokenizer.json, or
      of a folder that holds tokenizer.json or tokenizer.model.

  Raises:
    ValueError: `name` is none of these; or the file is damaged, or of a kind
      that is not supported.
  """
  if name == "bytes":
    return byte_ids.Bytes()
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    folder, path = path, find(path)
    if path is None:
      raise ValueError(f"folder {folder} holds no {' or '.join(_NAMES)}")
  if not path.is_file():
    raise ValueError(
      f"tokenizer {name!r} is neither 'bytes' nor the file of a model"
    )
  if path.suffix == ".json":
    return hugging_face.HuggingFace(path)
  return sentence_piece.SentencePiece(path)


def find(folder: pathlib.Path) -> pathlib.Path | None:
  """The file of the tokenizer in a folder; None if there is none."""
  paths = (folder / name for name in _NAMES)
  return next((path for path in paths if path.is_file()), None)
