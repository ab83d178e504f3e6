"""Meta's folders: params.json, consolidated.pth and tokenizer.model.

The format of the models that came with the paper, and of Llama 2 before them,
whose file is consolidated.00.pth and whose vocabulary is its tokenizer's.
`layers` in consolidated.pth are the trunk with head 1 as the last of them, and
`extra_heads` are heads 2..N. Channels lie as ours do: neighbours rotate as a
pair. The tokenizer may lie in the folder above, which several share.
"""

import json
import math
import pathlib
from typing import Any

import jax
from absl import logging

from mtp_jax import config
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.interchange import names, streaming, torch_files
from mtp_jax.model import heads, model
from mtp_jax.tokenizer import json_file

PARAMS, WEIGHTS = "params.json", "consolidated.pth"
FIRST = "consolidated.00.pth"  # the name of Llama 2, whose large models have 01
_DTYPES = ("float32", "float16", "bfloat16")
_SIZES = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of")
_OPTIONAL = {
  "n_kv_heads": None,  # n_heads
  "n_future_tokens": 1,
  "ffn_dim_multiplier": None,  # 1
  "norm_eps": 1e-5,
  "rope_theta": 10_000.0,
}
_UNUSED = ("max_seq_len", "max_batch_size")  # they change no result
_OURS = ("layers.", "extra_heads.", "tok_embeddings.", "norm.", "output.")
# Some files store these frequencies, once or in every layer.
_COMPUTED = "rope.freqs"
# What `config.Model` may have and this format has not.
_LACKS = {
  "qkv_bias": False,
  "qk_norm": False,
  "sliding_window": 0,
  "rope_scaling": "none",
}


def settings(path: pathlib.Path) -> config.Model:
  """The shape of a folder's model.

  Raises:
    ValueError: params.json cannot be read, lacks a number, or asks for what is
      not supported.
  """
  file = path / PARAMS
  params = json_file.read(file)
  if params.get("vocab_size") == -1:
    codec = tokenizer_lib.load(str(find_tokenizer(path) or path))
    params["vocab_size"] = codec.vocab
  try:
    return to_model(params)
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error


def sequence_length(path: pathlib.Path) -> int | None:
  """The tokens that a folder's model is for; None: params.json has no such."""
  found = json_file.read(path / PARAMS).get("max_seq_len")
  return found if type(found) is int and found > 0 else None


def to_model(params: dict[str, Any]) -> config.Model:
  """The content of a params.json as settings of a model.

  Raises:
    ValueError: names what is wrong.
  """
  for name in _SIZES:
    if name not in params:
      raise ValueError(f"{name} is missing")
  known = (*_SIZES, *_OPTIONAL, *_UNUSED)
  for name, value in params.items():
    if name not in known:
      raise ValueError(f"{name!r:.60} is not supported")
    whole = name in _SIZES or name in ("n_kv_heads", "n_future_tokens")
    if value is None and name in _OPTIONAL or name in _UNUSED:
      continue
    sound = type(value) is int or (type(value) is float and not whole)
    if not sound or not 0 < value < 2**31:
      kind = "a whole number" if whole else "a number"
      raise ValueError(f"{name} is {value!r:.60}; it takes {kind} above 0")
  params = {k: v for k, v in params.items() if v is not None}
  params = {k: v for k, v in _OPTIONAL.items() if v is not None} | params
  return config.Model(
    vocab=params["vocab_size"],
    width=params["dim"],
    mlp=_mlp(params),
    layers=params["n_layers"],
    attn_heads=params["n_heads"],
    kv_heads=params.get("n_kv_heads", params["n_heads"]),
    n_future=params["n_future_tokens"],
    head="parallel",
    norm_eps=params["norm_eps"],
    rope_theta=params["rope_theta"],
  ).check()


def from_model(cfg: config.Model) -> dict[str, Any]:
  """The content of a params.json, from which `to_model` makes the same.

  Raises:
    ValueError: this format has no such model.
  """
  if not heads.KINDS[cfg.head].extends_trunk(cfg.n_future):
    raise ValueError(
      f"model.head is {cfg.head!r}, but Meta's format has parallel heads only"
    )
  for name, value in _LACKS.items():
    if getattr(cfg, name) != value:
      raise ValueError(
        f"model.{name} is {getattr(cfg, name)!r}, of which Meta's format knows "
        "nothing"
      )
  if cfg.channels * cfg.attn_heads != cfg.width:
    raise ValueError(
      f"model.attn_channels {cfg.channels} times model.attn_heads "
      f"{cfg.attn_heads} is not model.width {cfg.width}, as Meta's format needs"
    )
  params = {
    "dim": cfg.width,
    "n_layers": cfg.layers + cfg.extra_layers,
    "n_heads": cfg.attn_heads,
    "n_kv_heads": cfg.kv_heads,
    "n_future_tokens": cfg.n_future,
    "vocab_size": cfg.vocab,
    "norm_eps": cfg.norm_eps,
    "rope_theta": cfg.rope_theta,
  }
  sizes = {"multiple_of": 256, "ffn_dim_multiplier": 1.0}
  if _mlp(params | sizes) != cfg.mlp:
    # Half a channel more, which rounding down takes away again.
    factor = (cfg.mlp + 0.5) / int(8 * cfg.width / 3)
    sizes = {"multiple_of": 1, "ffn_dim_multiplier": factor}
  return params | sizes


def _mlp(params) -> int:
  """F: 8/3 of the width, times a factor, rounded up to a multiple."""
  size = int(8 * params["dim"] / 3)
  size = int(params.get("ffn_dim_multiplier", 1.0) * size)
  return params["multiple_of"] * math.ceil(size / params["multiple_of"])


def find_tokenizer(path: pathlib.Path) -> pathlib.Path | None:
  """The tokenizer's file in a folder or above it; None if there is none."""
  above = path.absolute().parent
  return tokenizer_lib.find(path) or tokenizer_lib.find(above)


def load(
  path: pathlib.Path,
  cfg: config.Model,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
) -> model.Model:
  """The model of a folder.

  Tensors that belong to no part of a model, such as rope.freqs, are not used;
  the log names them.

  Args:
    path: the folder.
    cfg: from `settings`.
    mesh: see `streaming.fill`.
    dtype: see `streaming.fill`.

  Raises:
    ValueError: the file is cut off or damaged or asks for more than tensors; a
      tensor is missing, has another shape or dtype, or is one too many.
  """
  found, wanted, unused = _checked(path, cfg)
  if unused:
    logging.info("%s: not used: %s", weights(path), ", ".join(unused))

  def read(name, index):
    return found[name].read(index)

  return streaming.fill(cfg, wanted, read, mesh=mesh, dtype=dtype)


def check_weights(path: pathlib.Path, cfg: config.Model) -> None:
  """Raises what `load` does, of what the file says of its tensors."""
  _checked(path, cfg)


def _checked(path, cfg):
  """Tensors by name, those that the model takes, and names of unused ones."""
  file = weights(path)
  stored = torch_files.read(file)
  found = _used(stored)
  for name, tensor in found.items():
    if str(tensor.place.dtype) not in _DTYPES:
      raise ValueError(
        f"{file}: tensor {name!r} is {tensor.place.dtype}; supported are "
        f"{', '.join(_DTYPES)}"
      )
  shapes = {name: tensor.place.shape for name, tensor in found.items()}
  streaming.check_layers(cfg, shapes, file)
  wanted = names.tensors(cfg, names.META)
  streaming.check(wanted, shapes, file)
  return found, wanted, [name for name in stored if name not in found]


def dtype(path: pathlib.Path) -> str:
  """See `folders.dtype`."""
  places = [x.place for x in _used(torch_files.read(weights(path))).values()]
  return streaming.exact_dtype((x.shape, str(x.dtype)) for x in places)


def _used(found: dict[str, Any]) -> dict[str, Any]:
  """The tensors that are a part of the model, of all in a file."""
  return {
    name: tensor
    for name, tensor in found.items()
    if name.startswith(_OURS) and not name.endswith(_COMPUTED)
  }


def weights(path: pathlib.Path) -> pathlib.Path:
  """The file of a folder's weights; it may be missing.

  Raises:
    ValueError: there are several.
  """
  numbered = sorted(path.glob("consolidated.[0-9][0-9].pth"))
  if (path / WEIGHTS).exists() or not numbered:
    return path / WEIGHTS
  if numbered != [path / FIRST]:
    raise ValueError(
      f"{path} has its weights in parts, up to {numbered[-1].name}; supported "
      f"is one file, {WEIGHTS} or {FIRST}"
    )
  return path / FIRST


def write(folder: pathlib.Path, net: model.Model, dtype: str | None) -> None:
  """Writes params.json and consolidated.pth.

  Args:
    folder: exists.
    net: the model.
    dtype: see `streaming.entries`.

  Raises:
    ValueError: see `from_model`.
  """
  params = from_model(net.cfg)
  text = f"{json.dumps(params, indent=2)}\n"
  (folder / PARAMS).write_text(text, "utf-8")
  wanted = names.tensors(net.cfg, names.META)
  entries = streaming.entries(net, wanted, dtype)
  torch_files.write(folder / WEIGHTS, entries)
