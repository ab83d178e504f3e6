"""Special ids, from the files that lie beside a tokenizer's own.

These are, as Hugging Face writes them: tokenizer_config.json and
special_tokens_map.json, which name tokens; generation_config.json and
config.json, which have their ids; added_tokens.json, which has both, of tokens
that a SentencePiece model lacks. Any of them may be missing.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping

from mtp_jax.tokenizer import json_file

_NAMED = "tokenizer_config.json", "special_tokens_map.json"
_NUMBERED = "generation_config.json", "config.json"
_TOKENS = "bos_token", "eos_token", "pad_token", "unk_token"
_ADDED = "added_tokens.json"
_TEMPLATE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class SpecialIds:
  """Special ids of a model, their names, and its chat template.

  Attributes:
    others: name of a file -> its other fields, such as a temperature; `files`
      writes them again.
  """

  bos: int
  eos: int
  pad: int
  ends: tuple[int, ...]  # `eos` first
  adds_bos: bool | None  # before a prompt; None: the post-processor decides
  names: dict[str, str]  # for chat templates, such as {"bos_token": "<s>"}
  template: str | None  # of a chat
  others: dict[str, dict] = dataclasses.field(default_factory=dict)

  def files(self) -> dict[str, bytes]:
    """Content of two files from which `read` makes the same."""
    named = dict(self.names)
    if self.adds_bos is not None:
      named["add_bos_token"] = self.adds_bos
    if self.template is not None:
      named["chat_template"] = self.template
    numbered = {
      "bos_token_id": self.bos,
      "eos_token_id": list(self.ends),
      "pad_token_id": self.pad,
    }
    contents = {
      name: self.others.get(name, {}) | own
      for name, own in ((_NAMED[0], named), (_NUMBERED[0], numbered))
    }
    return {
      name: f"{json.dumps(content, indent=2)}\n".encode()
      for name, content in contents.items()
    }


def read(
  path: pathlib.Path,
  id_of: Callable[[str], int | None],
  vocab: int,
  names: Mapping[str, str] | None = None,
) -> SpecialIds:
  """Reads the special ids of a tokenizer.

  A model's own end tokens (`generation_config.json`, else `config.json`) are
  added to the tokenizer's. A missing bos or pad id is replaced by eos.

  Args:
    path: the tokenizer's file; beside it may be those that this module names.
    id_of: the id of a token's name, None if there is no such token.
    vocab: number of the tokenizer's ids.
    names: of special tokens that the files beside it do not name, such as
      {"bos_token": "<s>"}.

  Raises:
    ValueError: a file is not JSON, the chat template is no text, an id is
      outside the vocabulary, or no id ends a document.
  """
  folder = path.parent
  named = [_fields(folder / name) for name in _NAMED]
  names = dict(names or {})
  for key in _TOKENS:
    values = (_name(fields.get(key)) for fields in named)
    if name := next(filter(None, values), None):
      names[key] = name

  def numbers(key):
    for name in _NUMBERED:
      if ids := _ids(folder / name, key, vocab):
        return ids
    return []

  def named_id(key):
    return [] if (i := id_of(names.get(key, ""))) is None else [i]

  ends = [*named_id("eos_token"), *numbers("eos_token_id")]
  if not ends:
    raise ValueError(
      f"{path} has no id that ends a document: name an "
      "`eos_token` in tokenizer_config.json beside it"
    )
  bos, pad = (
    (named_id(f"{kind}_token") or numbers(f"{kind}_token_id") or ends)[0]
    for kind in ("bos", "pad")
  )
  adds_bos = named[0].get("add_bos_token")
  return SpecialIds(
    bos,
    ends[0],
    pad,
    tuple(dict.fromkeys(ends)),
    None if adds_bos is None else bool(adds_bos),
    names,
    _template(folder, named[0].get("chat_template")),
    _others(folder),
  )


def read_added(folder: pathlib.Path, pieces: list[str]) -> dict[str, int]:
  """Ids of the special tokens that are added to a SentencePiece model.

  Args:
    folder: of the model.
    pieces: [vocab] of the model; some of the tokens may be among them.

  Raises:
    ValueError: a file is not JSON, an id belongs to another piece, or a token
      beyond the model's pieces is not special.
  """
  path = folder / _NAMED[0]
  listed = _fields(path).get("added_tokens_decoder")
  found = {
    name: (path, i, fields.get("special"))
    for i, fields in (listed if isinstance(listed, dict) else {}).items()
    if isinstance(fields, dict) and (name := _name(fields))
  }
  for name in _NAMED:
    for key in ("additional_special_tokens", "extra_special_tokens"):
      values = _fields(folder / name).get(key)
      for value in values if isinstance(values, list) else ():
        if (token := _name(value)) in pieces:
          found[token] = folder / name, pieces.index(token), True
  path = folder / _ADDED
  found = {n: (path, i, True) for n, i in _fields(path).items()} | found
  added = {}
  for name, (path, i, special) in found.items():
    try:
      i = int(i)
    except (TypeError, ValueError):
      i = -1
    if i < 0 or i < len(pieces) and pieces[i] != name:
      raise ValueError(f"{path}: {name!r:.60} has no id of its own")
    if not special and i >= len(pieces):
      raise ValueError(
        f"{path}: {name!r:.60} is no special token, and tokenizer.model has no "
        "such piece: save the tokenizer as tokenizer.json"
      )
    if special:
      added[name] = i
  return added


def _fields(path: pathlib.Path) -> dict:
  """The object in a JSON file; empty if there is no such file."""
  return json_file.read(path) if path.exists() else {}


def _name(value) -> str:
  """A token's name, which is written by itself or with its properties."""
  value = value.get("content") if isinstance(value, dict) else value
  return value if isinstance(value, str) else ""


def _ids(path: pathlib.Path, key: str, vocab: int) -> list[int]:
  value = _fields(path).get(key)
  ids = value if isinstance(value, list) else [value]
  ids = [i for i in ids if i not in (None, -1)]  # -1: none
  for i in ids:
    if type(i) is not int or not 0 <= i < vocab:
      raise ValueError(
        f"{path}: {key} {i!r} is not one of the tokenizer's {vocab} ids"
      )
  return ids


def _others(folder: pathlib.Path) -> dict[str, dict]:
  """The fields that `SpecialIds.files` does not write by itself."""
  own = {
    _NAMED[0]: {"add_bos_token", "chat_template", *_TOKENS},
    _NUMBERED[0]: {"bos_token_id", "eos_token_id", "pad_token_id"},
  }
  found = {
    name: {k: v for k, v in _fields(folder / name).items() if k not in fields}
    for name, fields in own.items()
  }
  return {name: rest for name, rest in found.items() if rest}


def _template(folder: pathlib.Path, inline) -> str | None:
  """The chat template: a file of its own, or in tokenizer_config.json."""
  path = folder / _TEMPLATE
  try:
    return path.read_text(encoding="utf-8")
  except FileNotFoundError:
    pass
  except (OSError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}") from error
  match inline:
    case None | str():
      return inline
    case [*several] if all(map(_is_named_template, several)):
      return {t["name"]: t["template"] for t in several}.get("default")
  raise ValueError(
    f"{folder / _NAMED[0]}: chat_template is neither a text nor a list of "
    "texts by name: correct it, or leave it out"
  )


def _is_named_template(value) -> bool:
  match value:
    case {"name": str(), "template": str()}:
      return True
  return False
