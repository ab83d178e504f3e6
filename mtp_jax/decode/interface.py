"""What a decoding loop asks of a decoder and of a rule, and its settings.

`decoder.Transformer` is the decoder of a trained model; the rules are in
`accept`. Any object with the methods below can replace either of them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from mtp_jax.decode import accept, checks
from mtp_jax.decode import tree as tree_lib
from mtp_jax.decode import window as window_lib


@runtime_checkable
class Decoder(Protocol):
  """Logits of text and of drafts, over a cache of what was read before.

  A pytree, so that `jax.jit` takes it as an argument. A pass over drafts calls
  `forward`, `logits` of head 1 at every node, `keep_path`, and `draft`.
  Of a `Window` the loop reads `cache`; `prompts.read` also reads `start`, and
  keeps `trunk` and `states` at each prompt's last token.
  """

  vocab: int  # V
  n_future: int  # N, heads
  row_step: int  # the batch has to be a multiple of it

  def empty_cache(self, batch: int, cache_len: int, heads: int) -> tuple:
    """Zeros for B rows of S positions, for passes that use k heads."""

  def capacity(self, cache: tuple) -> int | None:
    """Positions that a cache holds; None: any number of them."""

  def grow(self, cache: tuple, cache_len: int) -> tuple:
    """The same cache with room for `cache_len` positions."""

  def forward(
    self,
    cache: tuple,
    tokens: jax.Array,
    start: jax.Array,
    *,
    tree: tree_lib.Tree | None = None,
    valid: jax.Array | None = None,
  ) -> window_lib.Window:
    """Reads a window [B, W] of text or of drafts; see `decoder.Transformer`."""

  def logits(
    self, window: window_lib.Window, head: int, at: jax.Array
  ) -> jax.Array:
    """Float32 [B, W', V] of one head (from 0) at places [B, W']."""

  def keep_path(
    self, window: window_lib.Window, node: jax.Array
  ) -> window_lib.Window:
    """Accepts a tree's nodes [B] and their ancestors; the rest is dropped.

    The result is a window of one token, the node's.
    """

  def draft(
    self, window: window_lib.Window, heads: int, tokens: jax.Array
  ) -> tuple[jax.Array, window_lib.Window]:
    """Logits [B, n, V] of the next heads, given the drafts before them.

    Called until heads 2..k have drafted. Heads that read the trunk alone all
    answer in the first call, in one product. A head that reads tokens answers
    alone: for head i the last of `tokens` is that at t+i-1.

    Args:
      window: of one token, at position t.
      heads: k, at least 2.
      tokens: [B, d] those after t: the bonus token, which is head 1's, and the
        first choices of heads 2..d. Head d+1 is next.

    Returns:
      Float32 logits of n >= 1 heads, head d+1 first, and the window that the
      next call takes.
    """


@runtime_checkable
class Rule(Protocol):
  """Proposes drafts, and decides which of them are accepted. A pytree."""

  def uses_seen(self) -> bool:
    """Whether it asks which tokens the text holds."""

  def check(self, tree: tree_lib.Tree) -> None:
    """Raises ValueError where the rule's numbers do not fit the tree."""

  def propose(
    self,
    logits: jax.Array,
    count: int,
    seen: jax.Array | None,
    keys: jax.Array,
  ) -> accept.Drafts:
    """`count` candidates per depth, from the heads' logits [B, D, V].

    `seen` [B, V] are the tokens of the text; `keys` [B], one per row.
    """

  def accept(
    self,
    tree: tree_lib.Tree,
    verification: accept.Verification,
    keys: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """(last accepted node [B], bonus token [B] after it), both int32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DecodingSettings:
  """What is written after prompts, and by which drafts.

  `check_settings` makes it from what a caller gives. The numbers are
  arrays to jit: only another tree, or another kind of rule, compiles anew.
  """

  max_new: np.int32  # most tokens to write after a prompt
  stop: np.ndarray  # [E] int32 end tokens; -1 is none
  rule: Rule
  seed: np.uint32
  tree: tree_lib.Tree = dataclasses.field(metadata={"static": True})


def check_settings(
  decoder: Decoder,
  *,
  heads: int | tree_lib.Tree,
  max_new: int,
  stop: int | Sequence[int] | None = None,
  rule: Rule = accept.GREEDY,
  seed: int = 0,
) -> DecodingSettings:
  """The settings of `generate.generate`, once all of them are sound.

  Args:
    decoder: from `mtp_jax.lay_out(model)`.
    heads: k, from 1 (ordinary decoding) to N, or a tree of drafts.
    max_new: most tokens to write per prompt.
    stop: id of the end token, or several of them, for all rows; None: every
      text has max_new tokens.
    rule: from `accept`; decides which drafts are accepted.
    seed: of the rules that draw, from 0 to 2**32 - 1; text i depends on
      (seed, i) alone.

  Raises:
    ValueError: `decoder` is not a decoder; heads outside 1..N; a tree too
      deep, wide or large; max_new below 1; an end token outside the
      vocabulary; what is not a rule, or has a bad number; a seed out of range.
  """
  if not isinstance(decoder, Decoder):
    raise ValueError(
      "the first argument is the decoder that mtp_jax.lay_out(model) returns, "
      f"not an object of type {type(decoder).__name__}"
    )
  tree = _check_tree(decoder, heads)
  max_new = checks.max_new(max_new)
  check_rule(rule, tree)
  return DecodingSettings(
    max_new=max_new,
    stop=checks.stop_ids(stop, decoder.vocab),
    rule=rule,
    seed=checks.seed(seed),
    tree=tree,
  )


def check_rule(rule: Any, tree: tree_lib.Tree) -> None:
  """Raises ValueError where `rule` is not a rule, or has a bad number."""
  if isinstance(rule, type) or not isinstance(rule, Rule):
    raise ValueError(
      f"rule={rule!r:.60} is not a rule; give one of mtp_jax.decode.accept, "
      "such as accept.GREEDY or accept.SpeculativeSampling()"
    )
  if isinstance(rule, accept.Forced):
    check_rule(rule.rule, tree)
  rule.check(tree)


def _check_tree(decoder, heads) -> tree_lib.Tree:
  """The tree of drafts that `heads` names; a number k is a chain."""
  tree = heads
  if not isinstance(heads, tree_lib.Tree):
    heads = checks.integer("heads", heads)
    if not 1 <= heads <= decoder.n_future:
      one = ": the model has one head" if decoder.n_future == 1 else ""
      raise ValueError(f"heads={heads} is outside 1..{decoder.n_future}{one}")
    tree = tree_lib.chain(heads)
  if tree.heads > decoder.n_future:
    raise ValueError(
      f"a tree {tree.max_depth} drafts deep needs {tree.heads} heads; the "
      f"model has {decoder.n_future}"
    )
  if tree.size > window_lib.CHUNK:
    raise ValueError(
      f"a tree of {tree.size} nodes; a pass reads at most {window_lib.CHUNK} "
      "tokens"
    )
  if tree.width > decoder.vocab:
    raise ValueError(
      f"a tree of {tree.width} candidates per head, but the vocabulary has "
      f"{decoder.vocab}"
    )
  return tree
