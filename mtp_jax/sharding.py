"""From logical axes to devices: one mesh, one table, one function.

Parameters are born with logical axes in their metadata (`model/layers.py`);
this module knows only those names, not the model.
"""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax import config

# Logical axis -> mesh axis: FSDP over 'data', tensor parallel over 'model'.
RULES = {
  "batch": "data",
  "embed": "data",
  "vocab": "model",
  "mlp": "model",
  "heads": "model",
  "kv_heads": "model",
}


def make_mesh(cfg: config.Mesh, devices=None) -> jax.sharding.Mesh:
  """A mesh with axes ('data', 'model').

  Args:
    cfg: devices along each axis; -1 takes all that are left.
    devices: default `jax.devices()`.

  Raises:
    ValueError: the axes' product is not the number of devices.
  """
  cfg = cfg.check()
  devices = jax.devices() if devices is None else devices
  shape = [cfg.data, cfg.model]
  if -1 in shape:
    shape[shape.index(-1)] = len(devices) // -int(np.prod(shape))
  if int(np.prod(shape)) != len(devices):
    raise ValueError(
      f"mesh.data={cfg.data} x mesh.model={cfg.model} does not use exactly "
      f"the {len(devices)} devices at hand"
    )
  return jax.make_mesh(
    tuple(shape), ("data", "model"), (AxisType.Auto,) * 2, devices=devices
  )


def shardings(tree, mesh: jax.sharding.Mesh, rules: dict = RULES):
  """NamedSharding of every array in `tree`.

  Args:
    tree: a pytree of `nnx.Variable`s and bare arrays or their abstract
      forms: a model, or an optimiser state whose moments are shaped like one.
    mesh: see `make_mesh`.
    rules: logical axis -> mesh axis. Leading stacked axes (layers, heads) and
      bare arrays (step counts) are replicated.

  Returns:
    The tree with a NamedSharding for each array.

  Raises:
    ValueError: an axis is not divisible by the devices it is split over.
  """

  def one(x):
    if not isinstance(x, nnx.Variable):
      return NamedSharding(mesh, P())
    if not jax.tree.leaves(x):  # an optimiser that leaves this one to another
      return x
    value = x.get_value()
    axes = (None,) * value.ndim
    axes = axes[: value.ndim - len(x.axes)] + tuple(x.axes)
    names = [rules.get(a) for a in axes]
    for axis, name, size in zip(axes, names, value.shape, strict=True):
      if name and size % mesh.shape[name]:
        raise ValueError(
          f"{axis} {size} is not divisible by {mesh.shape[name]} devices of "
          f"axis {name!r}: change the size (a vocabulary can be padded) or "
          "the mesh"
        )
    return x.replace(NamedSharding(mesh, P(*names)))

  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def gathered(param: nnx.Variable, mesh: jax.sharding.Mesh) -> nnx.Variable:
  """`param` collected from the 'data' axis, still split over 'model'.

  What a loop reads at every turn is gathered once, before it, not inside. Its
  gradient is split as it is summed, a reduce-scatter where the compiler has
  one: the constraint's own transpose would leave it whole on every device.
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
  """`fun` called by each device on its own part, for what XLA cannot split.

  Args:
    fun: a function of arrays whose parts need nothing of each other.
    mesh: see `make_mesh`.
    inputs: for each argument its logical axes, or None where they are whole.
    output: the result's logical axes.

  Returns:
    A function of whole arrays, each axis divisible by its devices.
  """

  def spec(axes):
    return P(*(RULES.get(axis) for axis in axes))

  return jax.shard_map(
    fun,
    mesh=mesh,
    in_specs=tuple(spec(axes) for axes in inputs),
    out_specs=spec(output),
    check_vma=False,  # a Pallas kernel does not say how its result varies
  )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Rows of a batch over 'data', everything else whole."""
  return NamedSharding(mesh, P("data"))


def reader(mesh: jax.sharding.Mesh, process: int) -> tuple[int, int]:
  """Which rows of a batch a process reads.

  Processes whose devices hold the same rows (the 'model' axis may span them)
  read the same block, all others different ones: no row is read for two
  places, none is left out.

  Args:
    mesh: see `make_mesh`.
    process: index of the process.

  Returns:
    (block, blocks): the batch in that many blocks, and which of them.

  Raises:
    ValueError: the processes' shares of the rows overlap or differ in size.
  """
  held = {}  # process -> places along 'data' of its devices
  for place, devices in enumerate(mesh.devices):
    for device in devices.flat:
      held.setdefault(device.process_index, set()).add(place)
  blocks = sorted({tuple(sorted(places)) for places in held.values()})
  sizes = {len(block) for block in blocks}
  if len(sizes) > 1 or sum(map(len, blocks)) > len(mesh.devices):
    raise ValueError(
      f"{len(held)} processes cannot share the {len(mesh.devices)} devices of "
      f"axis 'data' evenly: they hold the places {blocks}. Choose mesh.model "
      "as a divisor or a multiple of the devices of one process"
    )
  return blocks.index(tuple(sorted(held[process]))), len(blocks)
