"""Models out, as folders of Hugging Face or of Meta."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from mtp_jax import config
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.checkpoint import storage
from mtp_jax.interchange import (
  hugging_face,
  hugging_face_config,
  meta,
  model_card,
  names,
  tokenizer_files,
)
from mtp_jax.model import model
from mtp_jax.tokenizer import json_file

DTYPES = ("float32", "bfloat16", "float16")


def save(
  net: model.Model,
  path: str | pathlib.Path,
  *,
  like: str | pathlib.Path | model_card.Source | None = None,
  codec: tokenizer_lib.Tokenizer | None = None,
  notes: str | None = None,
  dtype: str | None = None,
) -> None:
  """Writes a model as a Hugging Face folder, which `load` reads again.

  Trunk and head 1 are a Llama, Mistral, Qwen2 or Qwen3 model, the first of them
  that has what the model has: transformers loads it. Heads 2..N are in a file
  beside it (`extra_heads` says how), which other programs pass over. Embedding
  and unembedding are written once if they are equal bit for bit. The folder is
  complete or not there: it is written under another name.

  Example, with the run that the example of `fit` trains:
    >>> import mtp_jax
    >>> net, cfg, codec = mtp_jax.load("runs/tiny")
    >>> mtp_jax.save(net, "tiny_model", like="runs/tiny", notes="A test.")
    >>> mtp_jax.load("tiny_model")[0](codec.encode("To be")[None]).shape
    (4, 1, 5, 259)

  Args:
    net: the model. Its heads are of kind 'parallel', 'causal' or 'unembedding'.
    path: the folder to write; it must not exist.
    like: a folder that `load` reads, which the model comes from, or
      `model_card.Source.of(folder, step)`. Its tokenizer, licence and model
      card are copied. The card says what is known of its training.
    codec: the tokenizer, if it is not that of `like`.
    notes: text for the model card, such as what the model was trained on.
    dtype: 'float32', 'bfloat16' or 'float16', of all tensors. None: as they
      are; norms and biases of a bfloat16 model, which are float32, become
      bfloat16 if that changes no value.

  Raises:
    ValueError: the folder exists or cannot be written, there is no tokenizer,
      no family of models has what this one has, or a number is too large.
  """
  path = check(net.cfg, path)
  _check_arrays(net, dtype)
  tree = hugging_face_config.from_model(net.cfg)
  source = model_card.Source.of(like)
  codec = _checked_tokenizer(net, codec, source)
  tree = _config(tree, source, codec)
  if codec is source.codec and source.kind == "hugging_face":
    files = tokenizer_files.of_folder(source.path)
  else:
    files = tokenizer_files.of(codec, _is_new(codec, source))
  files |= source.files()
  with _new_folder(path) as folder:
    written = hugging_face.write(folder, net, dtype)
    tree |= {"dtype": written.dtype, "tie_word_embeddings": written.tied}
    card = model_card.write(path.name, net.cfg, tree, source, notes)
    files |= {"config.json": _json(tree), "README.md": card.encode()}
    for name, content in files.items():
      (folder / name).write_bytes(content)


def save_meta(
  net: model.Model,
  path: str | pathlib.Path,
  *,
  like: str | pathlib.Path | model_card.Source | None = None,
  codec: tokenizer_lib.Tokenizer | None = None,
  dtype: str | None = None,
) -> None:
  """Writes a model in the format of Meta's release, which `load` reads again.

  The folder has params.json, consolidated.pth and the files of the tokenizer.
  Meta's own programs need a SentencePiece one.

  Args:
    net: a model with parallel heads, and with what Llama 2 has.
    path: as in `save`.
    like: as in `save`.
    codec: as in `save`.
    dtype: as in `save`.

  Raises:
    ValueError: as in `save`; this format has no such model.
  """
  path = check(net.cfg, path, to_meta=True)
  _check_arrays(net, dtype)
  source = model_card.Source.of(like)
  files = _checked_tokenizer(net, codec, source).files() | source.files()
  with _new_folder(path) as folder:
    meta.write(folder, net, dtype)
    for name, content in files.items():
      (folder / name).write_bytes(content)


def check(
  cfg: config.Model, path: str | pathlib.Path, *, to_meta: bool = False
) -> pathlib.Path:
  """What `save` or `save_meta` refuses without knowing the weights.

  Args:
    cfg: of the model that is to be written.
    path: the folder to write.
    to_meta: whether `save_meta` is to write it.

  Returns:
    The absolute path.

  Raises:
    ValueError: the folder exists or cannot be written, or the format has no
      such model.
  """
  path = storage.local(path).absolute()
  storage.check_text(path)
  if os.path.lexists(path):
    raise ValueError(f"{path} exists: name a new folder, or remove it")
  if to_meta:
    meta.from_model(cfg)
  else:
    names.check_kind(cfg)
    hugging_face_config.from_model(cfg)
  above = next(folder for folder in path.parents if os.path.lexists(folder))
  with _named_errors(path):
    tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=above).cleanup()
  return path


def _check_arrays(net: model.Model, dtype: str | None) -> None:
  """Raises ValueError if no process can write all arrays in this dtype."""
  if dtype not in (None, *DTYPES):
    raise ValueError(f"dtype={dtype!r}: choose {', '.join(DTYPES)} or None")
  if not net.embed[...].is_fully_addressable:
    raise ValueError(
      "other processes hold parts of the model: load it in a program of one "
      "process to write it"
    )


def _checked_tokenizer(
  net: model.Model,
  codec: tokenizer_lib.Tokenizer | None,
  source: "model_card.Source",
) -> tokenizer_lib.Tokenizer:
  """The tokenizer that is written with a model.

  Raises:
    ValueError: there is none, or it has more ids than the model.
  """
  codec = codec or source.codec
  if codec is None:
    raise ValueError(
      "a model needs its tokenizer: give `codec`, or the folder that it comes "
      "from as `like`"
    )
  if codec.vocab > net.cfg.vocab:
    raise ValueError(
      f"the tokenizer has {codec.vocab} ids, but the model {net.cfg.vocab}: "
      "the two belong to different models"
    )
  return codec


def _is_new(codec, source) -> bool:
  """Whether the tokenizer was made for another model than this one."""
  if not source.codec or codec.fingerprint != source.codec.fingerprint:
    return True
  return source.kind == "workdir" and not source.record.get("init")


@contextlib.contextmanager
def _new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder in a new one beside `path`, moved there if no error is raised.

  Raises:
    ValueError: the folder cannot be written.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(_named_errors(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    around = stack.enter_context(
      tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    )
    # Not `around` itself, which only its owner may read.
    partial = pathlib.Path(around) / path.name
    partial.mkdir()
    yield partial
    try:
      os.rename(partial, path)
    except OSError:
      if os.path.lexists(path):
        raise ValueError(
          f"{path} exists by now, made by another program: name a new folder"
        ) from None
      raise


@contextlib.contextmanager
def _named_errors(path: pathlib.Path) -> Iterator[None]:
  """Raises ValueError, which names the folder, in place of OSError."""
  try:
    yield
  except OSError as error:
    raise ValueError(
      f"{path} cannot be written: {error.strerror or error}"
    ) from error


def _config(tree, source, codec) -> dict[str, Any]:
  """The content of config.json, but for what depends on the tensors."""
  known = None
  if source.kind == "hugging_face":
    known = json_file.read(source.path / "config.json")
    one = hugging_face_config.to_model(known)
    if hugging_face_config.from_model(one) == tree:
      known.pop("torch_dtype", None)
      tree = known  # with what this library does not read
  elif length := source.length:
    tree.setdefault("max_position_embeddings", length)
  if tree is not known or codec is not source.codec:
    ids = tokenizer_files.ids(codec)
    tree |= ids | {"eos_token_id": codec.eos}
  return tree


def _json(tree) -> bytes:
  return f"{json.dumps(tree, indent=2)}\n".encode()
