"""Hugging Face folders: what they hold, and reading their weights.

A folder has config.json, and weights as model.safetensors or as several files
that model.safetensors.index.json lists.
"""

import contextlib
import json
import pathlib
from typing import Any

import jax
import safetensors

from mtp_jax import config
from mtp_jax.interchange import hugging_face_config, names, streaming
from mtp_jax.model import model

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_DTYPES = ("F32", "F16", "BF16")
# Old files hold these, which a config says as well.
_COMPUTED = ".rotary_emb.inv_freq"


def settings(path: pathlib.Path) -> config.Model:
  """The shape of a folder's model, which has one head, the next token's.

  Raises:
    ValueError: config.json cannot be read, or asks for what is not supported.
  """
  file = path / "config.json"
  try:
    return hugging_face_config.to_model(read_json(file))
  except ValueError as error:
    if str(file) in str(error):
      raise
    raise ValueError(f"{file}: {error}") from error


def load(
  path: pathlib.Path,
  cfg: config.Model,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
) -> model.Model:
  """The model of a folder; the last of its layers is head 1's.

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
  files = _files(path)
  shapes = {name: shape for name, (_, shape) in files.items()}
  wanted = names.tensors(cfg, names.HUGGING_FACE)
  embed, *_, unembed = wanted
  tied = read_json(path / "config.json").get("tie_word_embeddings")
  if tied and unembed.name not in shapes:
    wanted[-1] = unembed._replace(name=embed.name)
  streaming.check(wanted, shapes, path)

  def read(name, index):
    # Opened anew for each tensor: pages that an open file has been read from
    # would stay in memory.
    with _open(files[name][0]) as opened:
      if all(part == slice(None) for part in index):
        return opened.get_tensor(name)  # a slice would be copied once more
      return opened.get_slice(name)[index]

  return streaming.fill(cfg, wanted, read, mesh=mesh, dtype=dtype)


def _files(path) -> dict[str, tuple[pathlib.Path, tuple[int, ...]]]:
  """The file and the shape of every tensor of a folder, by its name."""
  listed = _listed(path / INDEX) if (path / INDEX).exists() else {}
  if not listed and not (path / SINGLE).exists():
    raise ValueError(
      f"{path} has neither {SINGLE} nor {INDEX}: weights in other formats are "
      "not read; save the model as safetensors"
    )
  found = {}
  for name in sorted(set(listed.values())) or [SINGLE]:
    for tensor, shape in _shapes(path / name).items():
      if tensor in found:
        raise ValueError(
          f"tensor {tensor!r} is in {found[tensor][0]} and in {path / name}"
        )
      found[tensor] = path / name, shape
  for tensor, name in listed.items():
    if found.get(tensor, (None,))[0] != path / name:
      raise ValueError(
        f"{path / INDEX} says that tensor {tensor!r} is in {name}, which does "
        "not hold it"
      )
  return {k: v for k, v in found.items() if not k.endswith(_COMPUTED)}


def _listed(file) -> dict[str, str]:
  """The name of each tensor's file, from an index."""
  listed = read_json(file).get("weight_map")
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


def _shapes(file) -> dict[str, tuple[int, ...]]:
  shapes = {}
  with _open(file) as opened:
    for name in opened.keys():  # noqa: SIM118 (it is no dict)
      part = opened.get_slice(name)
      if part.get_dtype() not in _DTYPES:
        raise ValueError(
          f"{file}: tensor {name!r} is {part.get_dtype()}; supported are "
          f"{', '.join(_DTYPES)}"
        )
      shapes[name] = tuple(part.get_shape())
  return shapes


@contextlib.contextmanager
def _open(file):
  """A safetensors file; what is wrong with it is a ValueError of one line."""
  try:
    with safetensors.safe_open(file, "np") as opened:
      yield opened
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(
      f"{file} is no whole safetensors file ({str(error).splitlines()[0]}): "
      "fetch it again"
    ) from error


def read_json(file: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file.

  Raises:
    ValueError: it cannot be read, or holds something else.
  """
  try:
    tree = json.loads(file.read_text(encoding="utf-8"))
  except OSError as error:
    raise ValueError(f"cannot read {file}: {error.strerror}") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{file} is not JSON: {error}") from error
  if not isinstance(tree, dict):
    raise ValueError(f"{file} does not hold a JSON object")
  return tree
