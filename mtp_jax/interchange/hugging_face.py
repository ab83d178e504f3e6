"""Hugging Face folders: what they hold, reading and writing their weights.

A folder has config.json, and weights as model.safetensors or as several files
that model.safetensors.index.json lists. Heads 2..N, which only this library
knows of, are in a file of their own (`extra_heads`).
"""

import contextlib
import json
import os
import pathlib
from typing import NamedTuple

import jax
import safetensors

from mtp_jax import config
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.interchange import (
  extra_heads,
  hugging_face_config,
  names,
  safetensors_file,
  streaming,
)
from mtp_jax.model import model
from mtp_jax.tokenizer import json_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PART_BYTES = 5 * 10**9  # of a file of weights
_GIT_LFS = b"version https://git-lfs"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Old files store these frequencies, which follow from the config.
_COMPUTED = ".rotary_emb.inv_freq"


def settings(path: pathlib.Path) -> config.Model:
  """The shape of a folder's model.

  It has one head, the next token's, unless the folder has more in a file.

  Raises:
    ValueError: config.json cannot be read, or asks for what is not supported.
  """
  file = path / "config.json"
  try:
    found = hugging_face_config.to_model(json_file.read(file))
  except ValueError as error:
    if str(file) in str(error):
      raise
    line = hugging_face_config.their_names(str(error))
    raise ValueError(f"{file}: {line}") from error
  file = path / extra_heads.NAME
  if not os.path.lexists(file):
    return found
  with _open(file) as opened:
    return extra_heads.with_heads(found, file, opened.metadata())


def find_tokenizer(path: pathlib.Path) -> pathlib.Path | None:
  """The tokenizer's file in a folder; None if there is none."""
  return tokenizer_lib.find(path)


def load(
  path: pathlib.Path,
  cfg: config.Model,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
) -> model.Model:
  """The model of a folder; the last of its layers is head 1's, if it has one.

  The headers of all files are checked before the first tensor is read.

  Args:
    path: the folder.
    cfg: from `settings`.
    mesh: see `streaming.fill`.
    dtype: see `streaming.fill`.

  Raises:
    ValueError: a file is missing, cut off or damaged; a tensor is missing, has
      another shape or dtype, or is one too many.
  """
  files, wanted = _checked(path, cfg)

  def read(name, index):
    # Opened anew for each tensor: pages that an open file has been read from
    # would stay in memory.
    with _open(files[name].file) as opened:
      if all(part == slice(None) for part in index):
        return opened.get_tensor(name)  # a slice would be copied once more
      return opened.get_slice(name)[index]

  return streaming.fill(cfg, wanted, read, mesh=mesh, dtype=dtype)


def check_weights(path: pathlib.Path, cfg: config.Model) -> None:
  """Raises what `load` does, of what the headers of the files say."""
  _checked(path, cfg)


def _checked(path, cfg):
  """Tensors of a folder by name, and those that the model takes of them."""
  files = _files(path)
  shapes = {name: stored.shape for name, stored in files.items()}
  streaming.check_layers(cfg, shapes, path)
  wanted = names.tensors(cfg, names.HUGGING_FACE)
  embed, *_, unembed = wanted
  tied = json_file.read(path / "config.json").get("tie_word_embeddings")
  if tied and unembed.name not in shapes:
    wanted[-1] = unembed._replace(name=embed.name)
  streaming.check(wanted, shapes, path)
  return files, wanted


def dtype(path: pathlib.Path) -> str:
  """See `folders.dtype`."""
  found = _files(path).values()
  return streaming.exact_dtype((x.shape, x.dtype) for x in found)


class Written(NamedTuple):
  """What config.json says of the tensors in a folder."""

  dtype: str  # of matrices
  tied: bool  # embedding and unembedding are equal, and so written once


def write(folder: pathlib.Path, net: model.Model, dtype: str | None) -> Written:
  """Writes the weights of a model, and heads 2..N beside them.

  Args:
    folder: exists.
    net: a model that `names.check_kind` accepts.
    dtype: of all tensors. None: that of the model's matrices. Its vectors are
      float32, and stay so unless this dtype has all their values.
  """
  wanted = names.tensors(net.cfg, names.HUGGING_FACE)
  tied = is_tied(net)
  if tied:
    del wanted[-1]
  entries = streaming.entries(net, wanted, dtype)
  extra = {k: e for k, e in entries.items() if k.startswith(extra_heads.PREFIX)}
  if extra:
    safetensors_file.write(
      folder / extra_heads.NAME, extra, extra_heads.metadata(net.cfg)
    )
  _write_parts(folder, {k: e for k, e in entries.items() if k not in extra})
  return Written(entries[wanted[0].name].dtype, tied)


def is_tied(net: model.Model) -> bool:
  """Whether embedding and unembedding of head 1 are equal, bit for bit."""
  embed, unembed = net.embed[...], net.heads.unembed[...]
  unembed = unembed[0] if unembed.ndim > 2 else unembed
  return bool(_equal_bits(embed, unembed.T))


@jax.jit
def _equal_bits(a, b):
  kind = f"uint{8 * a.dtype.itemsize}"
  a, b = (jax.lax.bitcast_convert_type(x, kind) for x in (a, b))
  return (a == b).all()


def _write_parts(folder, entries):
  """Files of at most `PART_BYTES`, or one tensor, and what lists them."""
  parts, size = [{}], 0
  for name, entry in entries.items():
    if parts[-1] and size + len(entry) > PART_BYTES:
      parts.append({})
      size = 0
    parts[-1][name] = entry
    size += len(entry)
  metadata = {"format": "pt"}  # transformers refuses files without it
  if len(parts) == 1:
    safetensors_file.write(folder / SINGLE, entries, metadata)
    return
  listed = {}
  for i, part in enumerate(parts, 1):
    name = f"model-{i:05}-of-{len(parts):05}.safetensors"
    safetensors_file.write(folder / name, part, metadata)
    listed |= dict.fromkeys(part, name)
  total = sum(map(len, entries.values()))
  index = {"metadata": {"total_size": total}, "weight_map": listed}
  (folder / INDEX).write_text(f"{json.dumps(index, indent=2)}\n", "utf-8")


class _Stored(NamedTuple):
  """A tensor in a folder."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: str


def _files(path) -> dict[str, _Stored]:
  """Every tensor of a folder, by its name."""
  listed = {}
  if (path / SINGLE).exists():  # before an index, as transformers has it
    pass
  elif (path / INDEX).exists():
    listed = _listed(path / INDEX)
  else:
    raise ValueError(_without_weights(path))
  found = {}
  parts = sorted(set(listed.values())) or [SINGLE]
  if os.path.lexists(path / extra_heads.NAME):
    parts.append(extra_heads.NAME)
  for name in parts:
    for tensor, stored in _tensors(path / name).items():
      if tensor in found:
        raise ValueError(
          f"tensor {tensor!r} is in {found[tensor].file} and in {stored.file}"
        )
      found[tensor] = stored
  for tensor, name in listed.items():
    if tensor not in found or found[tensor].file != path / name:
      raise ValueError(
        f"{path / INDEX} says that tensor {tensor!r} is in {name}, which does "
        "not hold it"
      )
  return {k: v for k, v in found.items() if not k.endswith(_COMPUTED)}


def _without_weights(path) -> str:
  """The error of a folder that has neither weights nor an index of them."""
  for name in (SINGLE, INDEX):
    if (path / name).is_symlink():
      return f"{path / name} is a link to nothing: fetch the file"
  if parts := sorted(path.glob("*-of-*.safetensors")):
    return (
      f"{path} has {parts[0].name}, but no {INDEX}, which says where each "
      "tensor is: fetch it, too"
    )
  return (
    f"{path} has neither {SINGLE} nor {INDEX}: weights in other formats are "
    "not read; save the model as safetensors"
  )


def _listed(file) -> dict[str, str]:
  """The name of each tensor's file, from an index."""
  listed = json_file.read(file).get("weight_map")
  texts = isinstance(listed, dict) and map(type, listed.values())
  if not listed or not texts or set(texts) != {str}:
    raise ValueError(f"{file}: weight_map has to name the file of each tensor")
  for name in sorted(set(listed.values())):
    if pathlib.PurePath(name).name != name:  # a path, maybe out of the folder
      raise ValueError(
        f"{file} names {name!r:.60}; it may name files beside it only"
      )
    if not (file.parent / name).is_file():
      raise ValueError(f"{file} names {name}, which is missing")
  return listed


def _tensors(file) -> dict[str, _Stored]:
  found = {}
  with _open(file) as opened:
    for name in opened.keys():  # noqa: SIM118 (it is no dict)
      part = opened.get_slice(name)
      if part.get_dtype() not in _DTYPES:
        raise ValueError(
          f"{file}: tensor {name!r} is {part.get_dtype()}; supported are "
          f"{', '.join(_DTYPES)}"
        )
      shape = tuple(part.get_shape())
      found[name] = _Stored(file, shape, _DTYPES[part.get_dtype()])
  return found


def _open(file) -> safetensors.safe_open:
  """A safetensors file; what is wrong with it is a ValueError of one line."""
  try:
    return safetensors.safe_open(file, "np")
  except OSError as error:
    raise ValueError(
      f"cannot read {file}: {error.strerror or error}"
    ) from error
  except safetensors.SafetensorError as error:
    with contextlib.suppress(OSError), open(file, "rb") as opened:
      if opened.read(len(_GIT_LFS)) == _GIT_LFS:
        raise ValueError(
          f"{file} is a pointer of Git LFS, not the weights: run git lfs pull"
        ) from error
    raise ValueError(
      f"{file} is no whole safetensors file ({str(error).splitlines()[0]}): "
      "fetch it again"
    ) from error
