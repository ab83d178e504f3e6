"""Our parameters and the tensors of other formats: one table, read both ways.

A file has one matrix [out, in] per weight and layer. We keep [in, out], with
attention heads on an axis of their own, and stack layers. Hugging Face's files
also have another order of a query's and a key's channels: there channels j and
j + C/2 rotate as a pair, here and in Meta's files 2j and 2j + 1.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np

from mtp_jax import config
from mtp_jax.model import heads, layers

Array = jax.Array | np.ndarray


class Entry(NamedTuple):
  """One line of the table.

  Axes are README's letters. Joined letters are one axis: "HC D" is a matrix
  [H C, D].
  """

  ours: str  # attribute of `layers.Block`, or path in `model.Model`
  axes: str  # of our array, without the axis of a stack
  file_axes: str
  hugging_face: str
  meta: str
  rotates: bool = False  # whether channels C are in the rotary embedding


LAYER = (
  Entry("attn_norm", "D", "D", "input_layernorm", "attention_norm"),
  Entry("wq", "D H C", "HC D", "self_attn.q_proj", "attention.wq", True),
  Entry("wk", "D K C", "KC D", "self_attn.k_proj", "attention.wk", True),
  Entry("wv", "D K C", "KC D", "self_attn.v_proj", "attention.wv"),
  Entry("wo", "H C D", "D HC", "self_attn.o_proj", "attention.wo"),
  Entry("mlp_norm", "D", "D", "post_attention_layernorm", "ffn_norm"),
  Entry("w_gate", "D F", "F D", "mlp.gate_proj", "feed_forward.w1"),
  Entry("w_up", "D F", "F D", "mlp.up_proj", "feed_forward.w3"),
  Entry("w_down", "F D", "D F", "mlp.down_proj", "feed_forward.w2"),
)
# Meta's format has none of these.
BIASES = (
  Entry("bq", "HC", "HC", "self_attn.q_proj", "", True),
  Entry("bk", "KC", "KC", "self_attn.k_proj", "", True),
  Entry("bv", "KC", "KC", "self_attn.v_proj", ""),
)
NORMS = (
  Entry("q_norm", "C", "C", "self_attn.q_norm", "", True),
  Entry("k_norm", "C", "C", "self_attn.k_norm", "", True),
)
ENDS = (
  Entry("embed", "V D", "V D", "model.embed_tokens", "tok_embeddings"),
  Entry("heads.norm", "D", "D", "model.norm", "norm"),
  Entry("heads.unembed", "D V", "V D", "lm_head", "output"),
)


@dataclasses.dataclass(frozen=True)
class Scheme:
  """How a format names tensors and orders channels."""

  column: str  # of `Entry`, with the tensors' names
  layer: str  # before the names of layer {} of the trunk, and of head 1
  extra_head: str  # before those of head {} + 2
  halves: bool  # channels j and j + C/2 rotate as a pair, not 2j and 2j + 1

  def name(self, entry: Entry) -> str:
    """The name of an entry's tensor, without the prefix of a layer."""
    kind = "bias" if entry in BIASES else "weight"
    return f"{getattr(entry, self.column)}.{kind}"


HUGGING_FACE = Scheme(
  "hugging_face", "model.layers.{}.", "model.extra_heads.{}.", halves=True
)
META = Scheme("meta", "layers.{}.", "extra_heads.{}.", halves=False)


class Tensor(NamedTuple):
  """A tensor of a file, and where it lies in a `model.Model`."""

  name: str
  parameter: str  # path in the model, such as "trunk.wq"
  index: int | None  # in that stack; None: not stacked
  entry: Entry
  scheme: Scheme
  cfg: config.Model

  @property
  def shape(self) -> tuple[int, ...]:
    """Its shape in the file."""
    return _shape(self.entry.file_axes, self.cfg)

  def to_ours(self, x: Array) -> Array:
    """The file's tensor as our parameter, without the axis of a stack."""
    x = _split(x, self.entry.file_axes, self.cfg)
    if self._reordered:
      x = self._interleave(x, 2, self.cfg.channels // 2)
    return self._transpose(x, self.entry.file_axes, self.entry.axes)

  def to_file(self, x: Array) -> Array:
    """The inverse of `to_ours`."""
    x = _split(x, self.entry.axes, self.cfg)
    x = self._transpose(x, self.entry.axes, self.entry.file_axes, flat=False)
    if self._reordered:
      x = self._interleave(x, self.cfg.channels // 2, 2)
    return x.reshape(self.shape)

  @property
  def _reordered(self):
    return self.entry.rotates and self.scheme.halves

  def _interleave(self, x, rows, columns):
    """`x`, in the file's order of axes, with its channels in another order.

    They are one axis, [rows, columns] before and [columns, rows] after.
    """
    at = _letters(self.entry.file_axes).index("C")
    pairs = x.reshape(*x.shape[:at], rows, columns, *x.shape[at + 1 :])
    return pairs.swapaxes(at, at + 1).reshape(x.shape)

  def _transpose(self, x, axes, target, flat=True):
    """`x`, an axis per letter of `axes`, in the order of `target`."""
    order = [_letters(axes).index(letter) for letter in _letters(target)]
    x = x.transpose(order)
    return x.reshape(_shape(target, self.cfg)) if flat else x


def tensors(cfg: config.Model, scheme: Scheme) -> list[Tensor]:
  """Every tensor of a model, as it lies; see `check_kind`.

  Layers come in the order of the forward pass, head 1's as the last of them,
  then what the other heads have of their own; the embedding is first, norm and
  head 1's unembedding are last.
  """
  rows = LAYER
  rows += BIASES if cfg.qkv_bias else ()
  rows += NORMS if cfg.qk_norm else ()
  kind = heads.KINDS[cfg.head]

  def one(entry, prefix="", parameter=None, index=None):
    name = prefix + scheme.name(entry)
    return Tensor(name, parameter or entry.ours, index, entry, scheme, cfg)

  def layer(prefix, stack, index):
    return [one(e, prefix, f"{stack}.{e.ours}", index) for e in rows]

  embed, norm, unembed = ENDS
  found = [one(embed)]
  for i in range(cfg.trunk_layers):
    found += layer(scheme.layer.format(i), "trunk", i)
  if kind.layer:
    found += layer(scheme.layer.format(cfg.trunk_layers), "heads.layers", 0)
  for i in range(1, cfg.n_future):
    prefix = scheme.extra_head.format(i - 1)
    if kind.layer:
      found += layer(prefix, "heads.layers", i)
    if kind.own_unembed:
      found.append(one(unembed, prefix, index=i))
  first = 0 if kind.own_unembed else None
  return [*found, one(norm), one(unembed, index=first)]


def check_kind(cfg: config.Model) -> None:
  """Refuses heads that other formats have no tensors for.

  Raises:
    ValueError: trunk and head 1 are no stack of transformer layers.
  """
  kind = heads.KINDS[cfg.head]
  fault = ""
  if kind.layer not in (None, layers.Block):
    fault = "its head 1 is not a transformer layer"
  elif cfg.n_future > 1 and kind.feeds < 0:
    fault = "its head 1 reads the other heads"
  elif kind.reads_tokens:
    fault = "its heads read tokens"
  elif cfg.offsets:
    fault = f"its heads leap, by model.offsets {cfg.offsets}"
  if fault:
    raise ValueError(
      f"model.head {cfg.head!r} cannot be written in another format: {fault}"
    )


def _letters(axes: str) -> str:
  return axes.replace(" ", "")


def _sizes(cfg: config.Model) -> dict[str, int]:
  return {
    "V": cfg.vocab,
    "D": cfg.width,
    "F": cfg.mlp,
    "H": cfg.attn_heads,
    "K": cfg.kv_heads,
    "C": cfg.channels,
  }


def _shape(axes: str, cfg: config.Model) -> tuple[int, ...]:
  sizes = _sizes(cfg)
  groups = axes.split()
  return tuple(math.prod(sizes[a] for a in group) for group in groups)


def _split(x, axes, cfg):
  """`x` with an axis per letter."""
  sizes = _sizes(cfg)
  return x.reshape([sizes[letter] for letter in _letters(axes)])
