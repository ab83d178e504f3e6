"""Folders that hold a model: runs of this library, and those of others."""

import pathlib

import jax

from mtp_jax import config
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.checkpoint import checkpoints, storage
from mtp_jax.interchange import hugging_face, meta, streaming
from mtp_jax.model import model
from mtp_jax.tokenizer import json_file
from mtp_jax.train import workdir


def load(
  path: str | pathlib.Path,
  step: int | None = None,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str | None = None,
) -> tuple[model.Model, config.Config, tokenizer_lib.Tokenizer]:
  """A model, its config and its tokenizer, from any folder that holds them.

  The folder is a workdir of `fit`, or a Hugging Face folder of a Llama,
  Mistral, Qwen2 or Qwen3 model: config.json, *.safetensors, and tokenizer.json
  or tokenizer.model. Such a model of L layers gets one head, whose layer is the
  last of them, and the others that `save` put beside it; tied embeddings become
  two arrays. Or it is Meta's: params.json, consolidated.pth, of which nothing
  is executed, and tokenizer.model there or above. Nothing is printed.

  Example, with the run that the example of `fit` trains:
    >>> import mtp_jax
    >>> net, cfg, codec = mtp_jax.load("runs/tiny")
    >>> net(codec.encode("To be")[None]).shape  # logits [N, B, T, V]
    (4, 1, 5, 259)

  Args:
    path: the folder.
    step: of a workdir's checkpoint; None means the newest whole one.
    mesh: devices to put the parameters on, from `sharding.make_mesh`; None:
      this process's first device. Folders of other programs are read one
      tensor at a time; each device reads only its shard.
    dtype: 'float32' or 'bfloat16', of matrices and of activations. Norms and
      biases stay float32. With bfloat16 a model takes half the memory, to be
      decoded but not trained. None: parameters are float32, and activations
      as the folder's config says.

  Returns:
    (model, config, tokenizer). For a folder of others, the config has the
    model's section and the path of the tokenizer; the rest are defaults.

  Raises:
    checkpoints.CheckpointError: the folder holds no model, or there is no such
      checkpoint.
    ValueError: the model is not supported; a file or a tensor is missing,
      damaged or of another shape.
  """
  return load_step(path, step, mesh=mesh, dtype=dtype)[:3]


def load_step(
  path: str | pathlib.Path,
  step: int | None = None,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str | None = None,
) -> tuple[model.Model, config.Config, tokenizer_lib.Tokenizer, int | None]:
  """`load`, and the step of the checkpoint; None for a folder of others."""
  if dtype not in (None, "float32", "bfloat16"):
    raise ValueError(f"dtype={dtype!r}: choose float32, bfloat16 or None")
  path = storage.local(path)
  if kind(path) == "workdir":
    net, cfg, codec, step = workdir.load_step(path, step, mesh=mesh)
    if dtype is None:
      return net, cfg, codec, step
    cfg = cfg.replace(model={"dtype": dtype})
    return streaming.cast(net, cfg.model, dtype), cfg, codec, step
  cfg, codec = settings(path, step)
  if dtype is not None:
    cfg = cfg.replace(model={"dtype": dtype})
  reader = _OTHERS[kind(path)]
  net = reader.load(path, cfg.model, mesh=mesh, dtype=dtype or "float32")
  return net, cfg, codec, None


def settings(
  path: str | pathlib.Path, step: int | None = None
) -> tuple[config.Config, tokenizer_lib.Tokenizer]:
  """The config and the tokenizer of a folder, without reading its weights.

  Arguments and errors are those of `load`.
  """
  path = storage.local(path)
  if kind(path) == "workdir":
    return workdir.settings(path, step)
  if step is not None:
    raise ValueError(f"step={step}, but {path} is no workdir: it has no steps")
  reader = _OTHERS[kind(path)]
  shape = reader.settings(path)
  file = reader.find_tokenizer(path)
  codec = tokenizer_lib.load(str(file or path))
  if codec.vocab > shape.vocab:
    raise ValueError(
      f"{file} has {codec.vocab} ids, but the model {shape.vocab}: the two "
      "belong to different models"
    )
  cfg = config.Config(model=shape, data=config.Data(tokenizer=str(file)))
  return cfg.check(), codec


def check_weights(path: str | pathlib.Path) -> None:
  """Checks the weights of another program's folder, by its files' headers.

  Nothing is checked of a workdir.

  Raises:
    ValueError: a file is missing, cut off or damaged; a tensor is missing or
      has another shape.
  """
  path = storage.local(path)
  if reader := _OTHERS.get(kind(path)):
    reader.check_weights(path, reader.settings(path))


def trained_length(
  kind: str, path: pathlib.Path, cfg: config.Config
) -> int | None:
  """Tokens of the sequences of a folder's training, where that is known.

  Args:
    kind: from `kind`.
    path: a folder that `load` reads.
    cfg: its config.
  """
  match kind:
    case "workdir":
      return cfg.data.seq_len
    case "meta":
      return meta.sequence_length(path)
  return None


def dtype(path: str | pathlib.Path) -> str:
  """A dtype in which a folder's model is held and written without a change.

  Returns:
    'float32', 'float16' or 'bfloat16'. With the last, `load` and `save` keep
    norms and biases in float32 where the folder has them so.
  """
  path = storage.local(path)
  found = kind(path)
  return "float32" if found == "workdir" else _OTHERS[found].dtype(path)


def kind(path: pathlib.Path) -> str:
  """What a folder is: 'workdir', 'hugging_face' or 'meta'.

  Raises:
    checkpoints.CheckpointError: it holds no model.
  """
  if (path / "checkpoints").is_dir():
    return "workdir"
  if _is_hugging_face(path):
    return "hugging_face"
  if any((path / name).exists() for name in _META):
    return "meta"
  line = workdir.no_run(path)
  # As names on the Hub look, and as no folder near here does.
  is_name = len(path.parts) == 2 and not {"/", "..", "."} & set(path.parts)
  if is_name and not path.parent.exists():
    line += (
      f"; a model of Hugging Face's Hub is fetched first: hf download {path} "
      "--local-dir=FOLDER"
    )
  if path.is_dir():
    line = (
      f"{path} is no Hugging Face folder, which has config.json with a "
      f"model_type and {hugging_face.SINGLE}, and none of Meta, with "
      f"{meta.PARAMS} and {meta.WEIGHTS}; {line}"
    )
  raise checkpoints.CheckpointError(line)


_META = meta.PARAMS, meta.WEIGHTS, meta.FIRST
# Each has `settings`, `find_tokenizer`, `check_weights`, `load` and `dtype`.
_OTHERS = {"hugging_face": hugging_face, "meta": meta}


def _is_hugging_face(path: pathlib.Path) -> bool:
  """A workdir has a config.json too, but that names no model type."""
  try:
    return "model_type" in json_file.read(path / "config.json")
  except ValueError:
    names = hugging_face.SINGLE, hugging_face.INDEX
    return any((path / name).exists() for name in names)
