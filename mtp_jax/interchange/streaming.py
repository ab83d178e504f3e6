"""A model from a file's tensors, one at a time, straight onto its devices."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sized
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtp_jax import config, sharding
from mtp_jax.interchange import names
from mtp_jax.model import model

# Part of a tensor's values: read("lm_head.weight", (slice(0, 9), slice(None))).
Read = Callable[[str, tuple[slice, ...]], np.ndarray]


def check_layers(cfg: config.Model, found: Sized, where: object) -> None:
  """Refuses more layers than tensors, before anything is made for each layer.

  Args:
    cfg: the model's settings.
    found: the tensors of a file.
    where: the file or folder, for messages.

  Raises:
    ValueError: the file has too few tensors.
  """
  layers = max(cfg.layers, cfg.n_future)
  if layers > len(found):
    raise ValueError(
      f"{where} has {len(found)} tensors, too few for the {layers} layers and "
      "heads of its config"
    )


def check(
  wanted: list[names.Tensor],
  found: dict[str, tuple[int, ...]],
  where: object,
) -> None:
  """Compares the tensors of a file with those of a model.

  Args:
    wanted: from `names.tensors`.
    found: shapes by name.
    where: the file or folder, for messages.

  Raises:
    ValueError: a tensor is missing, has another shape, or is not the model's.
  """
  for tensor in wanted:
    if tensor.name not in found:
      raise ValueError(
        f"{where} has no tensor {tensor.name!r}, which its config makes "
        f"{list(tensor.shape)}"
      )
    if tuple(found[tensor.name]) != tensor.shape:
      raise ValueError(
        f"{where}: tensor {tensor.name!r} is {list(found[tensor.name])}; the "
        f"config makes it {list(tensor.shape)}"
      )
  surplus = sorted(found.keys() - {tensor.name for tensor in wanted})
  if surplus:
    name = surplus[0]
    raise ValueError(
      f"{where} has tensor {name!r}, {list(found[name])}, which its config "
      f"does not describe ({len(surplus)} such tensors)"
    )


def fill(
  cfg: config.Model,
  wanted: list[names.Tensor],
  read: Read,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: str = "float32",
) -> model.Model:
  """A model whose parameters are read one after another.

  Beside the model itself, one tensor at a time is in memory. On a mesh each
  device's part of it is read alone.

  Args:
    cfg: the model's settings, checked.
    wanted: from `names.tensors`; every parameter of the model occurs.
    read: gives a part of a tensor by its name.
    mesh: of `sharding.make_mesh`; None: this process's first device.
    dtype: of matrices. Vectors are float32.
  """
  mesh = sharding.first_device() if mesh is None else mesh
  like = jax.eval_shape(lambda key: model.Model(cfg, key), jax.random.key(0))
  leaves, treedef = jax.tree_util.tree_flatten_with_path(
    like, is_leaf=_is_param
  )
  params = {_name(path): param for path, param in leaves}
  filled = dict.fromkeys(params)
  for tensor in wanted:
    param = params[tensor.parameter]
    kind = dtype if len(param.axes) > 1 else "float32"
    out = sharding.shardings(param, mesh).get_value()
    where = filled[tensor.parameter]
    if tensor.index is not None and where is None:
      where = jnp.zeros(param.shape, kind, device=out)
    x = _read(tensor, param, read, mesh)
    how = _How.of(tensor, kind, out)
    filled[tensor.parameter] = _put(where, x, tensor.index, how)
    jax.block_until_ready(filled[tensor.parameter])  # then x is freed
  arrays = [params[name].replace(filled[name]) for name in params]
  return jax.tree.unflatten(treedef, arrays)


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor that will be written.

  Attributes:
    shape: in the file.
    dtype: 'float32', 'float16' or 'bfloat16'.
    make: gives its values; called when the tensor is written.
  """

  shape: tuple[int, ...]
  dtype: str
  make: Callable[[], np.ndarray]

  def __len__(self) -> int:
    """Bytes."""
    return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

  def bytes(self) -> memoryview:
    """The values, little-endian."""
    return memoryview(self.make().reshape(-1).view(np.uint8))


def entries(
  net: model.Model, wanted: list[names.Tensor], dtype: str | None
) -> dict[str, Entry]:
  """Tensors of a model to be written, by name.

  Args:
    net: the model.
    wanted: from `names.tensors`.
    dtype: of all tensors. None: that of the model's matrices; vectors, which
      are float32, stay so unless that dtype has all their values.
  """
  matrices = vectors = dtype or str(net.embed[...].dtype)
  if dtype is None and matrices != "float32":
    values = [take(net, t, "float32") for t in wanted if len(t.shape) == 1]
    if any((x.astype(matrices).astype(x.dtype) != x).any() for x in values):
      vectors = "float32"

  def entry(tensor):
    kind = matrices if len(tensor.shape) > 1 else vectors
    make = functools.partial(take, net, tensor, kind)
    return Entry(tensor.shape, kind, make)

  return {tensor.name: entry(tensor) for tensor in wanted}


def exact_dtype(found: Iterable[tuple[tuple[int, ...], str]]) -> str:
  """The smallest dtype that keeps all values; see `folders.dtype`.

  Args:
    found: shape and dtype of each tensor in a folder.
  """
  found = list(found)
  # `entries` takes care of the vectors of a bfloat16 model.
  if {kind for shape, kind in found if len(shape) > 1} == {"bfloat16"}:
    return "bfloat16"
  return "float16" if {kind for _, kind in found} == {"float16"} else "float32"


def take(
  net: model.Model, tensor: names.Tensor, dtype: str | np.dtype
) -> np.ndarray:
  """A tensor of a model as it lies in a file: the inverse of `fill`.

  Raises:
    ValueError: a number is too large for `dtype`.
  """
  param = operator.attrgetter(tensor.parameter)(net)[...]
  if tensor.index is not None:
    param = _layer(param, tensor.index)
  x = tensor.to_file(np.asarray(param))
  with np.errstate(over="ignore"):
    found = np.ascontiguousarray(x, jnp.dtype(dtype))
  if found.dtype not in (x.dtype, np.float32):
    large = np.isfinite(x) & ~np.isfinite(found)
    if large.any():
      raise ValueError(
        f"tensor {tensor.name!r} holds {float(x[large][0]):.4g}, which {dtype} "
        "cannot: choose bfloat16 or float32"
      )
  return found


def cast(net: model.Model, cfg: config.Model, dtype: str) -> model.Model:
  """`net` as a model of `cfg`, which differs in its dtype; see `fill`."""
  like = jax.eval_shape(lambda key: model.Model(cfg, key), jax.random.key(0))
  _, treedef = jax.tree.flatten(like, is_leaf=_is_param)

  def one(param):
    matrix = len(param.axes) > 1
    return param.replace(param.astype(dtype)) if matrix else param

  params = jax.tree.leaves(net, is_leaf=_is_param)
  return jax.tree.unflatten(treedef, map(one, params))


@jax.jit
def _layer(stack, index):
  """`stack[index]`, by one program for every index."""
  return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)


class _How(NamedTuple):
  """How a tensor becomes a parameter; tensors that share it share a program."""

  tensor: names.Tensor
  dtype: str
  out: jax.sharding.NamedSharding

  @classmethod
  def of(cls, tensor, dtype, out):
    """Keeps of a tensor only what the program depends on."""
    cfg = tensor.cfg
    sizes = ("vocab", "width", "mlp", "attn_heads", "kv_heads")
    same = tensor._replace(
      name="",
      parameter="",
      index=None,
      entry=tensor.entry._replace(ours="", hugging_face="", meta=""),
      cfg=config.Model(
        **{name: getattr(cfg, name) for name in sizes},
        attn_channels=cfg.channels,
      ),
    )
    return cls(same, dtype, out)


def _read(tensor, param, read, mesh):
  """The tensor as it lies in the file, split over the devices like `param`."""
  ours = zip(tensor.entry.axes.split(), param.axes, strict=True)
  logical = {letters[0]: axis for letters, axis in ours}
  axes = tuple(
    logical[letters[0]] for letters in tensor.entry.file_axes.split()
  )
  like = nnx.Param(jax.ShapeDtypeStruct(tensor.shape, jnp.float32), axes=axes)
  where = sharding.shardings(like, mesh).get_value()
  return jax.make_array_from_callback(
    tensor.shape, where, functools.partial(read, tensor.name)
  )


@functools.partial(jax.jit, static_argnames="how", donate_argnums=0)
def _put(stack, x, index, how):
  """`stack` with x at `index`; x itself where there is no stack."""
  x = how.tensor.to_ours(x).astype(how.dtype)
  x = x if stack is None else stack.at[index].set(x)
  return jax.lax.with_sharding_constraint(x, how.out)


def _name(path) -> str:
  return jax.tree_util.keystr(path).removeprefix(".")


def _is_param(x) -> bool:
  return isinstance(x, nnx.Param)
