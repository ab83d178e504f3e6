"""A trained model laid out for decoding: layers apart, cast, split.

Training stacks layers and keeps float32. A decoding pass reads every weight
once, so a stack's slices and casts would cost as much as the pass itself.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mtp_jax import sharding
from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import checks, cpu, int8
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.model import heads, model, surgery

_PLATFORMS = "cpu", "gpu", "cuda", "rocm", "tpu"


def lay_out(
  net: model.Model,
  vocab: int | None = None,
  *,
  sliding_window: int | None = None,
  cache_dtype: str | None = None,
  draft_dtype: str | None = None,
  on: jax.sharding.Mesh | str | None = None,
) -> decoder_lib.Transformer:
  """Lays a trained model out for decoding; call it once, outside the loop.

  Matrices are cast to `cfg.dtype`; norms stay float32. On a CPU, but not on a
  mesh, large matrices, and all of a bfloat16 model, are transposed
  (`cpu.Matrix`), except int8 ones; a bfloat16 model's embedding is float32
  there. In a float32 model the embedding, and the unembedding if not
  transposed, are shared with `net`; the layers are copies. Heads behind a gap
  of `cfg.offsets` are left out: drafts are a text without gaps.

  Example, with the run that the example of `mtp_jax.fit` trains:
    >>> import mtp_jax
    >>> net, _, codec = mtp_jax.load("runs/tiny")
    >>> decoder = mtp_jax.lay_out(net, codec.vocab)
    >>> decoder.n_future
    4

  Args:
    net: the model.
    vocab: the tokenizer's ids, where the model's vocabulary is padded beyond
      them; a padding id is then never written.
    sliding_window: attend to the last so many tokens only, in a cache of about
      that size, so the text may have any length. None: the model's own
      (`cfg.sliding_window`), if it has one. Any other it was not trained for,
      unless its texts were no longer than the window.
    cache_dtype: one of `cache.DTYPES`. None: `cfg.dtype`; on a CPU without a
      mesh float32, since every pass would convert another cache.
    draft_dtype: keep what only heads 2..N use, their layers and unembedding,
      in 'bfloat16' or 'int8' (`int8.Matrix`). Texts stay head 1's
      own; drafts may be accepted less often.
    on: where the decoder runs. A mesh: tensor parallel over its axis 'model',
      rows over 'data'. Or the name of a platform, as 'cpu', 'gpu' or 'tpu';
      None: `jax.default_backend()`.

  Raises:
    ValueError: the model has fewer ids than `vocab`, or none are wanted; a
      sliding_window below 1; an unknown dtype or platform; heads that read
      tokens; draft_dtype where head 1 reads the other heads (anticausal), or
      int8 on a mesh; sizes that the mesh does not divide.
  """
  cfg, mesh = net.cfg, on if isinstance(on, jax.sharding.Mesh) else None
  vocab = checks.integer("vocab", cfg.vocab if vocab is None else vocab, 1)
  on_cpu = mesh is None and (on or jax.default_backend()) == "cpu"
  if cache_dtype is None:
    cache_dtype = cpu.row_dtype(cfg.dtype) if on_cpu else cfg.dtype
  if vocab > cfg.vocab:
    raise ValueError(f"vocab {vocab} exceeds the model's {cfg.vocab} ids")
  if sliding_window is None:
    sliding_window = cfg.sliding_window or None
  else:
    sliding_window = checks.integer("sliding_window", sliding_window, 1)
  _one_of("cache_dtype", cache_dtype, cache_lib.DTYPES)
  _one_of("draft_dtype", draft_dtype, (None, "bfloat16", "int8"))
  if mesh is None:
    _one_of("on", on, (None, *_PLATFORMS, jax.default_backend()))
  _check_drafts(cfg, draft_dtype, mesh)
  if cfg.drafting < cfg.n_future:
    net = surgery.drop_heads(net, cfg.drafting)
  decoder = decoder_lib.Transformer(
    **_weights(net, draft_dtype, on_cpu),
    cfg=net.cfg,
    vocab=vocab,
    sliding_window=sliding_window,
    cache_dtype=cache_dtype,
    mesh=mesh,
  )
  return decoder if mesh is None else _place(decoder, mesh)


def _weights(net, draft_dtype, on_cpu) -> dict[str, Any]:
  """The fields of a `decoder.Transformer` that hold weights.

  Layers are taken out of their stacks and matrices cast.
  """
  cfg = net.cfg
  embed_dtype = cpu.row_dtype(cfg.dtype) if on_cpu else cfg.dtype
  smallest = cpu.smallest(cfg.dtype) if on_cpu else None

  def cast(p):
    return p.replace(p.astype(cfg.dtype)) if len(p.axes) > 1 else p

  def unstack(tree, size):
    return (jax.tree.map(lambda a, i=i: a[i], tree) for i in range(size))

  def arrange_all(layers):  # head 1's, then those that only draft
    first, *rest = layers
    dtype = draft_dtype or cfg.dtype
    return arrange(first), *(arrange(layer, dtype=dtype) for layer in rest)

  embed = net.embed.replace(net.embed.astype(embed_dtype))
  trunk, cast_heads = _map(cast, (net.trunk, net.heads))
  arrange = functools.partial(_arrange, dtype=cfg.dtype, smallest=smallest)
  unembed = cast_heads.unembed
  if cast_heads.kind.own_unembed:
    unembed = unstack(unembed, cfg.n_future)
  else:  # a second one, for drafts, where they are in another dtype
    unembed = [unembed] * (2 if draft_dtype else 1)
  return {
    "embed": embed,
    "trunk": tuple(map(arrange, unstack(trunk, cfg.trunk_layers))),
    "head_modules": arrange_all(unstack(cast_heads.layers, cfg.n_future)),
    "norm": cast_heads.norm,
    "unembed": arrange_all(unembed),
  }


def limit_drafts(
  decoder: decoder_lib.Transformer, ids: Sequence[int] | np.ndarray
) -> decoder_lib.Transformer:
  """A decoder that drafts some ids alone, such as the commonest of a corpus.

  With few rows on a CPU the unembedding of 49,152 ids costs as much as eight
  layers, and drafting reads it once per pass: heads 2..N then multiply by the
  columns of `ids` only. Texts stay head 1's own. A draft of another id is never
  made, so drafts may be accepted less often. Speculative sampling stays exact:
  the other ids have draft probability 0.

  Args:
    decoder: from `lay_out`.
    ids: the ids, in any order; each counts once.

  Raises:
    ValueError: there are none, or one is beyond `decoder.vocab`; drafts are
      limited already; the decoder lies on a mesh.

  Example:
    >>> import mtp_jax
    >>> from mtp_jax.decode import layout
    >>> net, _, codec = mtp_jax.load("runs/tiny")
    >>> decoder = layout.limit_drafts(mtp_jax.lay_out(net), range(32, 127))
    >>> text = mtp_jax.generate(decoder, [[104, 105]], heads=4, max_new=8)
    >>> text.tokens[0].shape
    (8,)
  """
  ids = np.unique(np.asarray(ids, np.int64))
  if not len(ids) or ids[0] < 0 or ids[-1] >= decoder.vocab:
    wrong = "none" if not len(ids) else ids[0] if ids[0] < 0 else ids[-1]
    raise ValueError(f"draft ids: {wrong}; give some of 0..{decoder.vocab - 1}")
  if decoder.mesh is not None or decoder.draft_columns is not None:
    what = "limited already" if decoder.mesh is None else "on a mesh"
    raise ValueError(f"drafts that are {what} cannot be limited to some ids")

  def cut(p):
    match p.get_value():
      case cpu.Matrix(values, inputs):
        return p.replace(cpu.Matrix(values[ids], inputs, (len(ids),)))
      case w:  # an array, or int8.Matrix
        return p.replace(jax.tree.map(lambda a: a[:, ids], w))

  first, *rest = decoder.unembed
  if not heads.KINDS[decoder.cfg.head].own_unembed:
    rest = rest or [first]
  columns = np.full(decoder.cfg.vocab, len(ids), np.int32)
  columns[ids] = np.arange(len(ids))
  return dataclasses.replace(
    decoder,
    unembed=(first, *map(cut, rest)),
    draft_columns=jnp.asarray(columns),
  )


def _check_drafts(cfg, draft_dtype, mesh) -> None:
  """Raises ValueError for heads that cannot draft, or not in this dtype."""
  kind = heads.KINDS[cfg.head]
  if kind.reads_tokens:
    raise ValueError(
      f"model.head is {cfg.head!r}, whose heads read tokens: no decoder drafts "
      "with them yet"
    )
  if draft_dtype and kind.feeds < 0:
    raise ValueError(
      f"draft_dtype={draft_dtype!r} would change the text: in an anticausal "
      "model head 1 reads what the other heads wrote"
    )
  if draft_dtype == "int8" and mesh is not None:
    raise ValueError("draft_dtype='int8' is not split over a mesh: 'bfloat16'")


def _arrange(layer, dtype, smallest):
  """The layer with its matrices in a dtype.

  Those of `smallest` elements or more are kept as a `cpu.Matrix`; None: none.
  """

  def one(p):
    w = p[...]
    if w.ndim == 1:
      return p
    if dtype == "int8":
      return p.replace(int8.matrix(w))
    w = w.astype(dtype)
    turned = smallest is not None and w.size >= smallest
    return p.replace(cpu.matrix(w, _inputs(p)) if turned else w)

  return _map(one, layer)


def _inputs(p: nnx.Param) -> int:
  """How many leading axes a product sums over: `embed`, or all but the last."""
  return 1 if p.axes[0] == "embed" else len(p.axes) - 1


def _place(
  decoder: decoder_lib.Transformer, mesh: jax.sharding.Mesh
) -> decoder_lib.Transformer:
  """Splits weights over 'model'. Over 'data', every pass would gather them."""
  model_size = mesh.shape["model"]
  if decoder.cfg.kv_heads % model_size:
    raise ValueError(
      f"kv_heads {decoder.cfg.kv_heads} is not divisible by {model_size} "
      "devices of axis 'model'"
    )
  rules = {k: v for k, v in sharding.RULES.items() if v != "data"}
  return jax.device_put(decoder, sharding.shardings(decoder, mesh, rules))


def _map(fun, tree):
  """`fun` of every parameter, with its axes."""
  return jax.tree.map(fun, tree, is_leaf=lambda x: isinstance(x, nnx.Param))


def _one_of(name, value, known):
  if value not in known:
    raise ValueError(
      f"{name}={value!r} is none of {', '.join(map(str, known))}"
    )
