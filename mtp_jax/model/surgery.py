"""Head surgery: fewer heads, more heads, other kinds of heads.

Each function takes a model and returns another one; the model that it is given
stays as it is. The parts that both models have are bit-equal. Other ids: see
`vocabulary`.

  drop_heads    heads 1..n alone
  add_heads     n heads, the new ones copied or initialised
  linear_heads  n linear heads, under which head 1's layer is one of the trunk
  drop_layers   without the last layers of the trunk
  reconfigure   the same arrays under settings that change no array
  rebuild       the same arrays under any settings, unchecked
  trainable     what a run with train.freeze='trunk' trains
  join          the model with another value of what was `trainable`
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mtp_jax import config, fields
from mtp_jax.model import heads, model

HOW = ("copy", "fresh")
# Settings that change no array.
SETTINGS = ("dtype", "remat", "attention", "mask_documents")


def drop_heads(net: model.Model, n: int) -> model.Model:
  """The model with heads 1..n alone.

  `cfg.layers` no longer counts the layers of the dropped heads.

  Args:
    net: a model of at least n heads.
    n: heads to keep.

  Raises:
    ValueError: there are no n heads, or head 1 reads those that would go.

  Example:
    >>> import jax
    >>> from mtp_jax import config
    >>> from mtp_jax.model import model, surgery
    >>> cfg = config.Model(vocab=7, width=8, mlp=12, layers=5, n_future=4)
    >>> net = model.Model(cfg, jax.random.key(0))
    >>> surgery.drop_heads(net, 1).cfg.layers
    2
  """
  N = net.cfg.n_future
  if not 1 <= n <= N:
    raise ValueError(f"cannot keep {n} heads of {N}: keep 1 to {N}")
  if n < N:
    _check_head_1_is_independent(net.cfg, "dropping heads")
  return _with_own(net, net.heads.own(slice(n)))


def add_heads(
  net: model.Model,
  n: int,
  key: jax.Array | None = None,
  how: str = "copy",
) -> model.Model:
  """The model with n heads, of which the first are those it has.

  A next-token model of L layers loses none: its last layer is head 1, and
  `cfg.layers` grows by the layers of the new heads.

  Args:
    net: a model of fewer than n heads.
    n: heads of the result.
    key: random key for 'fresh'.
    how: 'copy': each new head is a copy of the last one. If heads are
      independent, it begins with that head's logits. 'fresh': each is
      initialised as in a new model, in the dtypes of the heads there are.

  Raises:
    ValueError: the model has n heads or more, there is no such `how`, a key is
      missing, or head 1 would read the new heads.

  Example:
    >>> import jax
    >>> from mtp_jax import config
    >>> from mtp_jax.model import model, surgery
    >>> cfg = config.Model(vocab=7, width=8, mlp=12, layers=3, n_future=1)
    >>> net = model.Model(cfg, jax.random.key(0))
    >>> net = surgery.add_heads(net, 4)
    >>> net.cfg.layers, net.cfg.trunk_layers
    (6, 2)
    >>> net(jax.numpy.ones((1, 5), int)).shape  # logits [N, B, T, V]
    (4, 1, 5, 7)
  """
  N = net.cfg.n_future
  if n <= N:
    raise ValueError(f"the model has {N} heads already; {n} are not more")
  fields.one_of("how", how, HOW)
  if how == "fresh" and key is None:
    raise ValueError("how='fresh' needs a key to initialise heads with")
  _check_head_1_is_independent(net.cfg, "adding heads")
  own = net.heads.own()
  if how == "copy":
    new = jax.tree.map(lambda a: jnp.repeat(a[-1:], n - N, 0), own)
  else:
    # The depth of the new model, for the scale of some matrices depends on it.
    cfg = dataclasses.replace(net.cfg.with_heads(n), n_future=n - N)
    new = jax.jit(lambda key: heads.Heads(cfg, key).own())(key)
    leaves = jax.tree.leaves(new), jax.tree.leaves(own)
    new = jax.tree.map(lambda a, old: a.astype(old.dtype), *leaves)
  return _with_own(net, _concatenate(own, new))


def linear_heads(net: model.Model, n: int) -> model.Model:
  """A next-token model with n linear heads, every one the identity.

  Head 1's layer becomes the last of the trunk, so every head begins with the
  logits of head 1 (paper, table S6: linear heads on Llama 2).

  Args:
    net: a model with one head, a transformer layer.
    n: heads of the result.

  Raises:
    ValueError: the model has more heads, or a head of another kind.
  """
  cfg = net.cfg
  if cfg.n_future > 1 or not heads.KINDS[cfg.head].extends_trunk(1):
    raise ValueError(
      f"linear heads are put on a model with one parallel head; this one has "
      f"{cfg.n_future} {cfg.head} heads"
    )
  cfg = dataclasses.replace(cfg, head="linear", n_future=n).check()
  like = jax.eval_shape(lambda key: model.Model(cfg, key), jax.random.key(0))
  identity = jnp.eye(cfg.width, dtype=net.heads.unembed.dtype)
  identities = jax.tree.map(
    lambda a: jnp.broadcast_to(identity, a.shape), like.heads.layers
  )
  joined = like.replace(
    embed=net.embed,
    trunk=_concatenate(net.trunk, net.heads.layers),
    heads=net.heads.replace(layers=identities, cfg=cfg),
  )
  return rebuild(joined, cfg)


def drop_layers(net: model.Model, count: int) -> model.Model:
  """The model without the last `count` layers of its trunk.

  Heads added to a model of L layers make it longer; without as many layers of
  the trunk it has L again (paper, table S6: "+0"). Its text is not the same.

  Raises:
    ValueError: the trunk has not more than `count` layers.
  """
  left = net.cfg.trunk_layers - count
  if not 0 <= count < net.cfg.trunk_layers:
    raise ValueError(
      f"cannot drop {count} layers of a trunk of {net.cfg.trunk_layers}: drop "
      f"0 to {net.cfg.trunk_layers - 1}"
    )
  trunk = jax.tree.map(lambda a: a[:left], net.trunk)
  cfg = dataclasses.replace(net.cfg, layers=net.cfg.layers - count)
  return rebuild(net.replace(trunk=trunk), cfg)


def reconfigure(net: model.Model, cfg: config.Model) -> model.Model:
  """The arrays of `net` as a model of `cfg`.

  Args:
    net: a model.
    cfg: may differ from `net.cfg` in `SETTINGS`.

  Raises:
    ValueError: another field differs; names it and both values.
  """
  lines = [
    f"model.{field.name} {old!r} in the model, {new!r} in the config"
    for field in dataclasses.fields(cfg)
    if field.name not in SETTINGS
    and (old := getattr(net.cfg, field.name))
    != (new := getattr(cfg, field.name))
  ]
  if lines:
    raise ValueError(
      f"the model is not one of this config: {'; '.join(lines)}. Change the "
      "config, or the model with mtp_jax.model.surgery"
    )
  return rebuild(net, cfg)


def trainable(net: model.Model) -> heads.Own:
  """What is trained if the trunk is frozen: heads 2..N.

  Trunk, embedding, norm, head 1 and a shared unembedding stay as they are, and
  so does every text of the model.

  Returns:
    The layers and unembeddings of heads 2..N, each array with a leading axis
    N-1; see `join`.

  Raises:
    ValueError: there is no head 2, or head 1 reads the others.
  """
  if net.cfg.n_future < 2:
    raise ValueError(
      "train.freeze='trunk' trains heads 2..N, and model.n_future is 1: set "
      "--config.model.n_future=4, for example"
    )
  _check_head_1_is_independent(net.cfg, "train.freeze='trunk'")
  return net.heads.own(slice(1, None))


def join(net: model.Model, own: heads.Own) -> model.Model:
  """`net` with heads 2..N replaced; the inverse of `trainable`."""
  first = net.heads.own(slice(1))
  return net.replace(heads=net.heads.with_own(_concatenate(first, own)))


def _check_head_1_is_independent(cfg: config.Model, what: str) -> None:
  if heads.KINDS[cfg.head].feeds < 0:
    raise ValueError(
      f"{what} is not possible with {cfg.head} heads: head 1 reads the others, "
      "so its text would change"
    )


def _concatenate(first, second):
  """Both stacks along their leading axis, as a pytree like `first`."""
  pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
  return jax.tree.unflatten(
    jax.tree.structure(first), [jnp.concatenate(pair) for pair in pairs]
  )


def _with_own(net: model.Model, own: heads.Own) -> model.Model:
  changed = net.heads.with_own(own)
  return rebuild(net.replace(heads=changed), changed.cfg)


def rebuild(net: model.Model, cfg: config.Model) -> model.Model:
  """The arrays of `net` in a model whose modules all have `cfg`.

  Nothing is checked; see `reconfigure`.
  """
  return jax.tree.unflatten(_structure(cfg), jax.tree.leaves(net))


@functools.cache
def _structure(cfg: config.Model):
  made = jax.eval_shape(lambda key: model.Model(cfg, key), jax.random.key(0))
  return jax.tree.structure(made)
