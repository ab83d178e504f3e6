"""What a decoding loop counts about the texts that it writes."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.decode import accept
from mtp_jax.decode import tree as tree_lib


class Block(NamedTuple):
  """What a pass writes in each row: accepted drafts, then the bonus token."""

  node: jax.Array  # [B] last accepted node
  depth: jax.Array  # [B] accepted drafts
  tokens: jax.Array  # [B, k]
  keep: jax.Array  # [B, k] bool: those up to an end token or the row's end
  logprob: jax.Array  # [B, k] of each token under head 1, nats
  margin: jax.Array  # [B, k] between head 1's best two logits there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
  """Counts of a decoding state; the first axis of all arrays is the row."""

  passes: jax.Array  # [B] decoding passes so far, the prompt's not counted
  written_in: jax.Array  # [B, S] pass that wrote a token; 0: the prompt's
  logprob: jax.Array  # [B, S] of each written token under head 1, nats
  margin: jax.Array  # [B, S] between head 1's best two logits there
  nodes: jax.Array  # [B, M] passes by their last accepted node
  # [B, k-1, R+1] rank of the true token among candidates
  rank_counts: jax.Array

  def update(
    self,
    block: Block,
    drafts: accept.Drafts | None,
    start: jax.Array,
    active: jax.Array,
  ) -> "Statistics":
    """The counts after one more pass.

    Args:
      block: what the pass writes.
      drafts: what it verified; None: the prompt's pass, which is not counted.
      start: [B] position of the block's first token.
      active: [B] bool: rows that were not done before the pass.
    """
    passes, nodes, rank_counts = self.passes, self.nodes, self.rank_counts
    if drafts is not None:
      passes = passes + active
      nodes = nodes.at[jnp.arange(len(active)), block.node].add(active)
      ranks = true_ranks(drafts, block) * active[:, None, None]
      rank_counts = rank_counts + ranks
    put = functools.partial(put_rows, start=start, keep=block.keep)
    written_in = jnp.broadcast_to(passes[:, None], block.tokens.shape)
    return Statistics(
      passes=passes,
      written_in=put(self.written_in, written_in),
      logprob=put(self.logprob, block.logprob),
      margin=put(self.margin, block.margin),
      nodes=nodes,
      rank_counts=rank_counts,
    )


def empty(batch: int, size: int, tree: tree_lib.Tree) -> Statistics:
  """Zeros for B rows of S positions each."""

  def zeros(*shape, dtype=jnp.int32):
    return jnp.zeros((batch, *shape), dtype)

  return Statistics(
    passes=zeros(),
    written_in=zeros(size),
    logprob=zeros(size, dtype=jnp.float32),
    margin=zeros(size, dtype=jnp.float32),
    nodes=zeros(tree.size),
    rank_counts=zeros(tree.max_depth, tree.width + 1),
  )


def scores(
  verification: accept.Verification, path: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """(log-probability, margin) [B, k] of tokens [B, k] after nodes `path`."""
  rows = jnp.arange(len(path))[:, None]
  logits, best = verification.logits[rows, path], verification.best[rows, path]
  others = jnp.where(
    jnp.arange(logits.shape[-1]) == best[..., None], -jnp.inf, logits
  )

  def of(token):
    return jnp.take_along_axis(logits, token[..., None], -1)[..., 0]

  logprob = of(tokens) - jax.nn.logsumexp(logits, -1)
  return logprob, of(best) - others.max(-1)


def true_ranks(drafts: accept.Drafts, block: Block) -> jax.Array:
  """[B, k-1, R+1] int32: rank of each true token among the candidates.

  True tokens are the accepted drafts and the bonus token after them. The last
  column counts true tokens that were not among the candidates.
  """
  D = drafts.tokens.shape[1]
  hit = drafts.tokens == block.tokens[:, :D, None]  # [B, D, R]
  first = hit & (jnp.cumsum(hit, -1) == 1)
  missed = ~hit.any(-1, keepdims=True)
  known = jnp.arange(D) <= block.depth[:, None]
  return (jnp.concatenate([first, missed], -1) & known[..., None]).astype(
    jnp.int32
  )


def put_rows(
  buffer: jax.Array, new: jax.Array, start: jax.Array, keep: jax.Array
) -> jax.Array:
  """buffer [B, S] with new [B, W] from `start` [B] on, where `keep` [B, W]."""

  def row(buffer, new, start, keep):
    old = jax.lax.dynamic_slice_in_dim(buffer, start, new.shape[0])
    new = jnp.where(keep, new, old)
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, 0)

  return jax.vmap(row)(buffer, new, start, keep)
