"""The kinds of prediction heads: one table, read by model, loss and decoder.

Head i (from 1) predicts token t+i from the trunk's output z at position t.

  parallel     f_i(z)                     one transformer layer each
  linear       W_i z                      one matrix each
  causal       f_i(...f_2(f_1(z)))        a chain, the nearest token first
  anticausal   f_i(...f_{N-1}(f_N(z)))    a chain, the furthest token first
  unembedding  z, and each head has its own unembedding (the byte models' kind)

Reference: the paper, section 2 (parallel) and appendix B (the others).
"""

import dataclasses

from mtp_jax.model import layers
from mtp_jax.model.heads import linear


@dataclasses.dataclass(frozen=True)
class Kind:
  """What distinguishes one kind of head from another.

  Attributes:
    layer: the module of one head, made by `layer(cfg, key)` and called as
      `layer(x, ctx)`, [B, T, D] -> [B, T, D]; None: a head has no layer.
    feeds: 0: every head reads z. 1: head i's output is what head i+1 reads.
      -1: what head i-1 reads.
    own_unembed: each head has its own unembedding; else all share one.
    reads_tokens: head i (from 1) also reads the embedding e of token t+i-1, the
      last one before its target. Its layer has a method `join`, and is called
      as `layer(layer.join(x, e), ctx)`, e like x [B, T, D]. Head 1 joins, too,
      since all layers are of one class.
  """

  layer: type | None = layers.Block
  feeds: int = 0
  own_unembed: bool = False
  reads_tokens: bool = False

  def order(self, n_future: int) -> list[int] | None:
    """Heads (from 0) in the order in which each feeds the next.

    None where heads are independent.
    """
    return list(range(n_future))[:: self.feeds] if self.feeds else None

  def extends_trunk(self, n_future: int) -> bool:
    """Whether each of N heads is one more transformer layer on the trunk.

    All then share one unembedding. A single head feeds no other.
    """
    feeds = 0 if n_future == 1 else self.feeds
    return dataclasses.replace(self, feeds=feeds) == Kind()


# Another kind is a line here and one in `sections.HEAD_KINDS`.
KINDS = {
  "parallel": Kind(),
  "linear": Kind(linear.Linear),
  "causal": Kind(feeds=1),
  "anticausal": Kind(feeds=-1),
  "unembedding": Kind(None, own_unembed=True),
}
