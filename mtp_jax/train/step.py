"""The training step: a pure function of state and batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtp_jax import config, loss, sharding
from mtp_jax.data import batch as batch_lib
from mtp_jax.model import attention, model, surgery
from mtp_jax.train import head_weights as weights_lib
from mtp_jax.train import optim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  """All that a run carries from step to step."""

  model: model.Model
  opt: optax.OptState
  step: jax.Array  # [] int32: batches consumed
  bad: jax.Array  # [] int32: non-finite steps in a row
  skipped: jax.Array  # [] int32: non-finite steps in all


def init_state(
  cfg: config.Config,
  mesh: jax.sharding.Mesh,
  init: model.Model | None = None,
) -> State:
  """A fresh State, placed as its parameters declare; equal on every mesh.

  Args:
    cfg: the run's settings.
    mesh: the devices that hold it.
    init: a model to start from, see `surgery.reconfigure`. Its arrays are
      copied, as float32. None: parameters are drawn from `train.seed`.

  Raises:
    ValueError: an axis of a parameter does not divide by its devices, `init` is
      no model of this config, or what `train.freeze` asks for is not possible.
  """
  make, _, where = _first_state(cfg, mesh)
  if init is None:
    return make(jax.random.key(cfg.train.seed))

  def place(a, named_sharding):
    # A copy: the training step donates its state. From the host: the mesh may
    # have devices of other processes.
    host = np.array(a, np.float32)
    return jax.make_array_from_callback(
      host.shape, named_sharding, lambda index: host[index]
    )

  net = surgery.reconfigure(init, cfg.model)
  net = jax.tree.map(place, net, where.model)

  def rest(net):
    return dataclasses.replace(_state(cfg, net), model=None)

  where = dataclasses.replace(where, model=None)
  state = jax.jit(rest, out_shardings=where)(net)
  return dataclasses.replace(state, model=net)


def abstract_state(cfg: config.Config, mesh: jax.sharding.Mesh) -> State:
  """Shapes, dtypes and shardings of `init_state`, without making it."""
  _, shapes, where = _first_state(cfg, mesh)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
    shapes,
    where,
  )


def train_step(
  state: State,
  batch: batch_lib.Batch,
  *,
  cfg: config.Config,
  mesh: jax.sharding.Mesh,
) -> tuple[State, dict[str, jax.Array]]:
  """One update; skipped, and counted, where loss or gradient is not finite.

  The loss is the sum over heads of their weighted nats, divided by the sum of
  the weights of the batch's next-token targets: all terms weigh the same, as in
  the paper. It is 0 where that sum is 0. `train.accumulate` microbatches give
  the same step in less memory. Under `train.freeze` 'trunk' the gradient is
  that of heads 2..N, and all else stays as it is, bit for bit.

  Args:
    state: donated by `compile_step`.
    batch: windows of T+reach tokens, under a frozen trunk perhaps with `z`.
    cfg: the run's settings.
    mesh: the devices that hold state and batch.

  Returns:
    The next state, and metrics: loss and nats [N] of each head, both nats per
    token, grad_norm, learning_rate, and bad and skipped as in the state.

  Reference: the paper, section 2; table S13 and its caption for AdamW.
  """
  if batch.z is not None and cfg.train.freeze != "trunk":
    raise ValueError(
      "the batch has z, so the trunk would learn nothing: set "
      "train.freeze='trunk'"
    )
  N, net = cfg.model.n_future, state.model
  targets = loss.future_targets(batch, N, cfg.model.offsets)
  sums = targets.weight_sums()
  divisors = jnp.where(sums > 0, sums, 1.0)
  weights = weights_lib.at(cfg.train, N, state.step) * (sums[0] > 0)
  scale = weights / divisors[0]
  if cfg.train.accumulate == 1:
    total, nats, grads = _gradient(net, batch, targets, scale, cfg, mesh)
  else:
    total, nats, grads = _sum_over_parts(net, batch, scale, cfg, mesh)

  norm = optax.tree.norm(grads)
  good = jnp.isfinite(total) & jnp.isfinite(norm)
  tx, old = optim.make(cfg.optim, cfg.train.steps), _trained(cfg, net)
  with jax.named_scope("update"):
    updates, opt = tx.update(grads, state.opt, old)
    new, opt = jax.tree.map(
      lambda new, old: jnp.where(good, new, old),
      (optax.apply_updates(old, updates), opt),
      (old, state.opt),
    )
    net = surgery.join(net, new) if cfg.train.freeze == "trunk" else new
  bad = jnp.where(good, 0, state.bad + 1)
  skipped = state.skipped + ~good
  rate = optim.schedule(cfg.optim, cfg.train.steps)
  metrics = {
    "loss": total,
    "nats": nats / divisors,
    "grad_norm": norm,
    "learning_rate": rate(state.step - state.skipped),
    "bad": bad,
    "skipped": skipped,
  }
  return State(net, opt, state.step + 1, bad, skipped), metrics


def _gradient(net, batch, targets, scale, cfg, mesh):
  """The loss of some rows, and its gradient.

  Args:
    net: the model.
    batch: the rows.
    targets: of the rows, from `loss.future_targets`.
    scale: [N], see `loss.token_loss`.
    cfg, mesh: of the run.

  Returns:
    (total, nats [N] summed over the rows, gradient of what is trained).
  """
  frozen = cfg.train.freeze == "trunk"
  settings = loss.Settings(
    implementation=cfg.train.loss,
    block=cfg.train.loss_block,
    shards=mesh.shape["data"],
    rows=sharding.batch_sharding(mesh),
    kernel=attention_kernel(cfg.model, mesh),
    detach=cfg.train.detach,
  )

  def objective(trained):
    whole = net if frozen else trained
    heads = whole.heads
    if not heads.kind.own_unembed:
      # Every head reads it: collected once, before their loop.
      unembed = sharding.gathered(heads.unembed, mesh)
      whole = whole.replace(heads=heads.replace(unembed=unembed))
    data = batch, targets, scale, settings
    if frozen:
      return loss.frozen_loss(trained, whole, *data)
    return loss.token_loss(whole, *data)

  value_and_grad = jax.value_and_grad(objective, has_aux=True)
  (total, nats), grads = value_and_grad(_trained(cfg, net))
  return total, nats, grads


def _sum_over_parts(net, batch, scale, cfg, mesh):
  """`_gradient` of a batch, summed over `train.accumulate` parts of it.

  A part's activations are freed before the next part's are computed.
  """
  N, parts = cfg.model.n_future, cfg.train.accumulate

  def add(sums, rows):
    # Targets of these rows: cut from the batch's, they would be exchanged
    # between devices.
    targets = loss.future_targets(rows, N, cfg.model.offsets)
    here = _gradient(net, rows, targets, scale, cfg, mesh)
    return jax.tree.map(jnp.add, sums, here), None

  rows = jax.tree.map(
    lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch
  )
  zeros = jax.tree.map(jnp.zeros_like, _trained(cfg, net))
  sums = jnp.zeros(()), jnp.zeros((N,)), zeros
  return jax.lax.scan(add, sums, rows)[0]


# Cached, so that a second `fit` in a notebook compiles nothing.
@functools.lru_cache(maxsize=8)
def compile_step(cfg: config.Config, mesh: jax.sharding.Mesh):
  """`train_step` jitted for `cfg`: state sharded as declared, and donated.

  Args:
    cfg: the run's settings, checked; one program per value.
    mesh: with axes 'data' and 'model'.

  Returns:
    (state, batch) -> (state, metrics).

  Example:
    >>> import jax.numpy as jnp, mtp_jax
    >>> from mtp_jax import sharding
    >>> from mtp_jax.data import batch
    >>> from mtp_jax.train import step
    >>> cfg = mtp_jax.Config().replace(
    ...   model={"width": 16, "mlp": 32, "head": "unembedding"},
    ...   data={"batch": 2, "seq_len": 4},
    ... )
    >>> mesh = sharding.make_mesh(cfg.mesh)
    >>> train_step = step.compile_step(cfg, mesh)
    >>> tokens = jnp.ones((2, 4 + cfg.model.n_future), jnp.int32)
    >>> state, metrics = train_step(
    ...   step.init_state(cfg, mesh), batch.of(tokens)
    ... )
    >>> metrics["nats"].shape  # one loss per head, nats per token
    (4,)
  """
  where = _first_state(cfg, mesh)[2]
  return jax.jit(
    functools.partial(train_step, cfg=cfg, mesh=mesh),
    in_shardings=(where, sharding.batch_sharding(mesh)),
    out_shardings=(where, None),
    donate_argnums=0,
  )


# Cached, since jit compiles again for a function that is a new object.
@functools.cache
def attention_kernel(
  cfg: config.Model, mesh: jax.sharding.Mesh
) -> attention.Kernel:
  """The attention that `cfg.attention` names, on the devices of `mesh`."""
  kernel = attention.choose(cfg.attention, mesh.devices.flat[0].platform)
  if kernel is attention.xla:
    return kernel
  q, kv = ("batch", None, "attn_heads", None), ("batch", None, "kv_heads", None)
  return sharding.local(kernel, mesh, (q, kv, kv, ("batch", None)), q)


def _first_state(cfg, mesh):
  """How the state of step 0 is made: a function, its shapes, its shardings.

  It is kept for the fields on which it depends, whatever the others are.
  """
  names = "steps", "freeze", "detach"
  train = config.Train(**{name: getattr(cfg.train, name) for name in names})
  cfg = config.Config(model=cfg.model, optim=cfg.optim, train=train)
  return _compiled_first_state(cfg, mesh)


# Cached: a run asks for it three times, and each would trace the model.
@functools.lru_cache(maxsize=8)
def _compiled_first_state(cfg, mesh):
  """(function of a key that makes a State, its shapes, its shardings).

  The shardings are of Adam's moments too; a bare jit would replicate them.
  """

  @jax.jit
  def make(key):
    return _state(cfg, model.Model(cfg.model, key))

  shapes = jax.eval_shape(make, jax.random.key(0))
  where = sharding.shardings(shapes, mesh)
  return jax.jit(make, out_shardings=where), shapes, where


def _state(cfg, net):
  """The State of step 0 with this model."""
  opt = optim.make(cfg.optim, cfg.train.steps).init(_trained(cfg, net))
  return State(net, opt, *jnp.zeros((3,), jnp.int32))


def _trained(cfg, net):
  """The part of a model that gradient and optimiser see."""
  if cfg.train.detach and net.heads.order is not None:
    raise ValueError(
      f"train.detach is {cfg.train.detach}, but {cfg.model.head} heads read "
      "each other: choose a model.head that reads the trunk alone"
    )
  return surgery.trainable(net) if cfg.train.freeze == "trunk" else net
