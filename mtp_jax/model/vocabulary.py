"""Models with other ids: padded beyond the tokenizer's, or cut to some.

Each function takes a model and returns another one; the model that it is given
stays as it is. The rows of the ids that both have are bit-equal.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from mtp_jax.model import model, surgery


def pad(net: model.Model, size: int) -> model.Model:
  """The model with `size` ids; those beyond its own occur in no text.

  A new row of the embedding, and a new column of an unembedding, is the mean of
  all others. The new ids together then get a probability of at most their share
  of the ids, at every position: the exponential of a mean is at most the mean
  of exponentials. Zeros would have no such bound. A decoder never writes these
  ids, if `mtp_jax.lay_out` is told the tokenizer's number of ids.

  Args:
    net: a model.
    size: ids of the result, such as `-(-net.cfg.vocab // 8) * 8` for 8 devices
      along the axis 'model'.

  Raises:
    ValueError: the model has more ids.
  """
  more = size - net.cfg.vocab
  if more < 0:
    raise ValueError(
      f"vocab {size} would cut the model's {net.cfg.vocab} ids; pad to more"
    )

  def padded(rows):  # [..., V, D]
    mean = rows.mean(-2, keepdims=True)
    return jnp.concatenate([rows, jnp.repeat(mean, more, -2)], -2)

  unembed = jnp.swapaxes(net.heads.unembed[...], -1, -2)
  unembed = jnp.swapaxes(padded(unembed), -1, -2)
  net = net.replace(
    embed=net.embed.replace(padded(net.embed[...])),
    heads=net.heads.replace(unembed=net.heads.unembed.replace(unembed)),
  )
  return surgery.rebuild(net, dataclasses.replace(net.cfg, vocab=size))


def cut(net: model.Model, ids: Sequence[int] | np.ndarray) -> model.Model:
  """The model with some ids alone; id i of the result is `ids[i]`.

  Its probabilities are those of `net`, given that the token is one of `ids`.

  Args:
    net: a model.
    ids: ids to keep, ascending.

  Raises:
    ValueError: `ids` is empty, not ascending, or beyond the vocabulary.

  Example:
    >>> import jax
    >>> from mtp_jax import config
    >>> from mtp_jax.model import model, vocabulary
    >>> cfg = config.Model(vocab=7, width=8, mlp=12, layers=3, n_future=2)
    >>> net = model.Model(cfg, jax.random.key(0))
    >>> vocabulary.cut(net, [1, 2, 5]).cfg.vocab
    3
  """
  ids = np.asarray(ids)
  if not len(ids) or (np.diff(ids) < 1).any():
    raise ValueError("give the ids to keep in ascending order, at least one")
  if ids[0] < 0 or ids[-1] >= net.cfg.vocab:
    wrong = ids[0] if ids[0] < 0 else ids[-1]
    raise ValueError(f"id {wrong} is none of the model's {net.cfg.vocab}")
  unembed = net.heads.unembed
  net = net.replace(
    embed=net.embed.replace(net.embed[...][ids]),
    heads=net.heads.replace(unembed=unembed.replace(unembed[...][..., ids])),
  )
  return surgery.rebuild(net, dataclasses.replace(net.cfg, vocab=len(ids)))
