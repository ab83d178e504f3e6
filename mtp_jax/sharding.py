"""Maps the logical axes of arrays to the axes of a mesh of devices.

Every parameter names its logical axes in its metadata (`model/layers.py`).
This module reads those names and does not import the model.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mtp_jax import config

# Logical axis -> mesh axis: FSDP over 'data', tensor parallel over 'model'.
RULES = {
  "batch": "data",
  "embed": "data",
  "vocab": "model",
  "mlp": "model",
  "attn_heads": "model",
  "kv_heads": "model",
}


def make_mesh(cfg: config.Mesh, devices=None) -> jax.sharding.Mesh:
  """A mesh with axes ('data', 'model').

  Args:
    cfg: devices along each axis; -1 means all remaining devices.
    devices: default `jax.devices()`.

  Raises:
    ValueError: the product of the axes is not the number of devices.
  """
  cfg = cfg.check()
  devices = jax.devices() if devices is None else devices
  shape = [cfg.data, cfg.model]
  if -1 in shape:
    shape[shape.index(-1)] = len(devices) // -int(np.prod(shape))
  if int(np.prod(shape)) != len(devices):
    raise ValueError(
      f"mesh.data={cfg.data} x mesh.model={cfg.model} does not use exactly "
      f"the {len(devices)} devices that there are"
    )
  return jax.make_mesh(
    tuple(shape), ("data", "model"), (AxisType.Auto,) * 2, devices=devices
  )


def first_device() -> jax.sharding.Mesh:
  """A mesh of this process's first device."""
  return make_mesh(config.Mesh(data=1, model=1), jax.local_devices()[:1])


def shardings(tree, mesh: jax.sharding.Mesh, rules: dict = RULES):
  """The NamedSharding of every array in `tree`.

  Args:
    tree: a model or an optimiser state: a pytree of `nnx.Variable`s and plain
      arrays, or their abstract forms.
    mesh: see `make_mesh`.
    rules: logical axis -> mesh axis. Leading axes without a name, of stacked
      layers or heads, and plain arrays, such as step counts, are replicated.

  Returns:
    `tree` with a NamedSharding in place of each array.

  Raises:
    ValueError: an axis is not divisible by the devices of its mesh axis.
  """

  def one(x):
    if not isinstance(x, nnx.Variable):
      return NamedSharding(mesh, PartitionSpec())
    if not jax.tree.leaves(
      x
    ):  # a parameter that this optimiser does not update
      return x
    value = x.get_value()
    axes = (None,) * value.ndim
    axes = axes[: value.ndim - len(x.axes)] + tuple(x.axes)
    names = [rules.get(a) for a in axes]
    for axis, name, size in zip(axes, names, value.shape, strict=True):
      if name and size % mesh.shape[name]:
        count, remedy = mesh.shape[name], "the size or the mesh"
        if axis == "vocab":
          padded = size + -size % count
          remedy = (
            f"the mesh, or train with --config.model.vocab={padded}, and "
            "--init=PATH if the model exists already"
          )
        raise ValueError(
          f"{axis} {size} is not divisible by {count} devices of axis "
          f"{name!r}: change {remedy}"
        )
    return x.replace(NamedSharding(mesh, PartitionSpec(*names)))

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def gathered(param: nnx.Variable, mesh: jax.sharding.Mesh) -> nnx.Variable:
  """Gathers `param` over the 'data' axis; it stays split over 'model'.

  Called before a loop that reads `param` in every iteration, so that it is
  gathered once. The gradient is split over 'data' as it is summed, by a
  reduce-scatter if the compiler supports it. Without the custom rule, every
  device would hold the whole gradient.
  """
  rules = {k: v for k, v in RULES.items() if v != "data"}
  split, whole = (shardings(param, mesh, r).get_value() for r in (RULES, rules))

  @jax.custom_vjp
  def gather(x):
    return jax.lax.with_sharding_constraint(x, whole)

  gather.defvjp(
    lambda x: (gather(x), None),
    lambda _, g: (jax.lax.with_sharding_constraint(g, split),),
  )
  return param.replace(gather(param.get_value()))


def local(
  fun: Callable, mesh: jax.sharding.Mesh, inputs: tuple, output: tuple
) -> Callable:
  """Makes each device call `fun` on its own shard.

  For functions that XLA cannot partition, such as Pallas kernels.

  Args:
    fun: a function of arrays; its result on a shard needs no other shard.
    mesh: see `make_mesh`.
    inputs: the logical axes of each argument; None for an axis that is not
      split.
    output: the logical axes of the result.

  Returns:
    A function of whole arrays. Each axis must be divisible by its devices.
    Keywords that it is called with are passed to `fun` as they are.
  """

  def spec(axes):
    return PartitionSpec(*(RULES.get(axis) for axis in axes))

  def call(*arrays, **static):
    return jax.shard_map(
      functools.partial(fun, **static) if static else fun,
      mesh=mesh,
      in_specs=tuple(spec(axes) for axes in inputs),
      out_specs=spec(output),
      check_vma=False,  # Pallas kernels do not declare what this would check
    )(*arrays)

  return call


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Splits the rows of a batch over 'data' and no other axis."""
  return NamedSharding(mesh, PartitionSpec("data"))


def row_shard(mesh: jax.sharding.Mesh, process: int) -> tuple[int, int]:
  """Which rows of a batch a process reads.

  A batch is divided into equal blocks of rows. Processes whose devices hold
  the same rows, which happens if the 'model' axis spans processes, read the
  same block; others read different blocks.

  Args:
    mesh: see `make_mesh`.
    process: index of the process.

  Returns:
    (shard, shards): the index of the process's block, and their number.

  Raises:
    ValueError: the blocks of the processes overlap or differ in size.
  """
  positions = {}  # process -> indices of its devices along 'data'
  for index, devices in enumerate(mesh.devices):
    for device in devices.flat:
      positions.setdefault(device.process_index, set()).add(index)
  blocks = sorted({tuple(sorted(indices)) for indices in positions.values()})
  sizes = {len(block) for block in blocks}
  if len(sizes) > 1 or sum(map(len, blocks)) > len(mesh.devices):
    raise ValueError(
      f"{len(positions)} processes cannot share the {len(mesh.devices)} "
      f"devices of axis 'data' evenly: their positions are {blocks}. Choose "
      "mesh.model as a divisor or a multiple of the devices of one process"
    )
  return blocks.index(tuple(sorted(positions[process]))), len(blocks)
