"""Rules that propose drafts and decide which of them are accepted.

  Greedy               the text equals ordinary greedy decoding's
  SpeculativeSampling  the text has the distribution of ordinary sampling
  Typical              Medusa's: accepts what is likely enough. NOT lossless
  TopK                 Stern et al.'s: accepts the k best tokens. NOT lossless
  Forced               accepts a fixed number of drafts, to measure speed alone

A rule proposes candidates for every depth of a tree from the heads' logits.
Once head 1 has logits for every node of the tree, the rule names the last
accepted node, whose ancestors are accepted too, and the bonus token after it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.decode import checks, sampling
from mtp_jax.decode import tree as tree_lib


class Drafts(NamedTuple):
  """Candidates for the tokens at depth 1, 2, ... of a tree."""

  tokens: jax.Array  # [B, D, R] int32, in the order of their ranks
  # [B, D, V] the draft distribution they were sampled from, or None.
  probabilities: jax.Array | None = None


class Verification(NamedTuple):
  """What a rule decides from: a tree's tokens and head 1's logits there."""

  tokens: jax.Array  # [B, M] of the nodes
  logits: jax.Array  # [B, M, V] float32: head 1 after each node
  best: jax.Array  # [B, M] its first choices
  drafts: Drafts | None  # None: there are none, before the first ones
  seen: jax.Array | None  # [B, V] tokens of the text so far, root included


class _Best:
  """Proposes each head's best candidates; draws nothing."""

  def uses_seen(self) -> bool:
    """Whether the rule asks which tokens the text holds."""
    return False

  def propose(self, logits, count, seen, keys) -> Drafts:
    """Candidates [B, D, count] from the heads' logits [B, D, V]."""
    return Drafts(sampling.best(logits, count))

  def check(self, tree: tree_lib.Tree) -> None:
    """Raises ValueError where the rule's numbers make no sense."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy(_Best):
  """A draft is accepted if it is head 1's most likely token.

  Reference: the paper, section 3.2; Stern et al. 2018.
  """

  def accept(
    self, tree, verification: Verification, keys
  ) -> tuple[jax.Array, jax.Array]:
    """(last accepted node [B], bonus token [B] after it)."""
    node = deepest(
      tree, verification.tokens == verification.best[:, tree.parent]
    )
    return node, _at(verification.best, node)


GREEDY = Greedy()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK(_Best):
  """A draft is accepted if it is among head 1's k best. NOT lossless.

  Attributes:
    k: 1 is `Greedy`.
    block: fewest tokens that a pass writes. First choices up to there are
      accepted whatever head 1 says.

  Reference: Stern et al. 2018, sections 5.1 and 5.3.
  """

  k: int = dataclasses.field(metadata={"static": True})
  block: int = dataclasses.field(default=1, metadata={"static": True})

  def check(self, tree):
    """Raises ValueError: k below 1, or a block beyond the greedy path."""
    if checks.integer("k", self.k) < 1:
      raise ValueError(
        f"k={self.k}: at least the best token has to be accepted"
      )
    if not 1 <= checks.integer("block", self.block) <= len(tree.greedy_path):
      raise ValueError(
        f"block={self.block} is outside 1..{len(tree.greedy_path)}"
      )

  def accept(self, tree, verification, keys):
    """(last accepted node [B], bonus token [B]: head 1's best after it)."""
    k = min(self.k, verification.logits.shape[-1])
    least = jax.lax.top_k(verification.logits, k)[0][..., -1]
    accepted = _scores(tree, verification) >= least[:, tree.parent]
    accepted = accepted.at[:, tree.greedy_path[: self.block]].set(True)
    node = deepest(tree, accepted)
    return node, _at(verification.best, node)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Typical(_Best):
  """A draft is accepted if p(draft) > min(epsilon, delta exp(-H(p))).

  p is head 1 at `temperature`, H its entropy in nats. NOT lossless. Of accepted
  paths of equal length the most likely is taken. The bonus token is sampled
  from the tokens that would be accepted; if there is none, it is the best.

  Reference: Cai et al. 2024 (Medusa), section 2.3.1, with its code's numbers.
  """

  epsilon: float = 0.09
  delta: float = 0.3
  temperature: float = 1.0

  def check(self, tree):
    """Raises ValueError: a number that is not above 0."""
    for name in ("epsilon", "delta"):
      if not checks.number(name, getattr(self, name)) > 0:
        raise ValueError(f"{name}={getattr(self, name)} has to be above 0")
    sampling.Sampler(temperature=self.temperature).check()

  def accept(self, tree, verification, keys):
    """(last accepted node [B], bonus token [B], drawn with `keys` [B])."""
    epsilon, delta, temperature = (
      jnp.asarray(x, jnp.float32)
      for x in (self.epsilon, self.delta, self.temperature)
    )
    log_p = jax.nn.log_softmax(verification.logits / temperature)
    p = jnp.exp(log_p)
    entropy = -jnp.where(p > 0, p * log_p, 0).sum(-1)
    least = jnp.minimum(epsilon, delta * jnp.exp(-entropy))
    chosen = _scores(tree, verification._replace(logits=log_p))
    chosen = jnp.where(tree.depth > 0, chosen, 0)
    path = jnp.where(tree.ancestor_mask, chosen[:, None], 0).sum(-1)
    accepted = jnp.exp(chosen) > least[:, tree.parent]
    node = deepest(tree, accepted, path)
    p, least = _at(p, node), _at(least, node)[:, None]
    typical = (p > least) | (p == p.max(-1, keepdims=True))
    return node, sampling.draw(jnp.where(typical, p, 0), keys)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Forced:
  """Accepts `count` first choices, whatever they are, to measure speed.

  The text is worthless. The time per pass is the cost of writing count + 1
  tokens at once, independent of how well the model drafts.

  Attributes:
    count: drafts.
    rule: proposes the drafts and chooses the bonus token.
  """

  count: int
  rule: Any = GREEDY

  def uses_seen(self) -> bool:
    """As `rule` does."""
    return self.rule.uses_seen()

  def check(self, tree):
    """Raises ValueError: a bad `rule`, or a count beyond the greedy path."""
    self.rule.check(tree)
    most = len(tree.greedy_path) - 1
    if not 0 <= checks.integer("count", self.count) <= most:
      raise ValueError(f"count={self.count} is outside 0..{most}")

  def propose(self, logits, count, seen, keys):
    """As `rule` proposes."""
    return self.rule.propose(logits, count, seen, keys)

  def accept(self, tree, verification, keys):
    """(first choice [B] at depth `count`, bonus token [B] of `rule`)."""
    _, token = self.rule.accept(tree, verification, keys)
    # Clipped for the prompt's pass, which drafts nothing.
    count = jnp.minimum(self.count, len(tree.greedy_path) - 1)
    node = jnp.asarray(tree.greedy_path)[count]
    return jnp.broadcast_to(node, token.shape), token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpeculativeSampling:
  """Speculative sampling: tokens follow head 1's distribution p exactly.

  p is the target distribution, head 1 under `sampler`. A draft x sampled from q
  is accepted with probability min(1, p(x) / q(x)). If it is rejected, p becomes
  the residual norm(max(p - q, 0)), x is removed from q, and the next sibling is
  tried. The text follows p for any q. With sample_drafts=False the heads' best
  candidates are proposed instead: x is accepted with probability p(x), and if
  rejected, is removed from p.

  Attributes:
    sampler: the same filters for head 1 and for drafts.
    sample_drafts: from q; False: the best candidates.

  Reference: Leviathan et al. 2023 and Chen et al. 2023 for chains; siblings
  without replacement as Jeon et al. 2024 (recursive speculative decoding).
  """

  sampler: sampling.Sampler = sampling.Sampler()
  sample_drafts: bool = dataclasses.field(
    default=True, metadata={"static": True}
  )

  def uses_seen(self) -> bool:
    """Whether the sampler has a repetition penalty."""
    return self.sampler.penalty is not None

  def check(self, tree):
    """Raises ValueError: a sampler's number, or siblings that skip a rank."""
    if not isinstance(self.sampler, sampling.Sampler):
      raise ValueError(
        f"sampler={self.sampler!r:.60} is not a sampler; give one such as "
        "sampling.Sampler(temperature=0.8)"
      )
    self.sampler.check()
    if (tree.child[:, :-1] < 0)[tree.child[:, 1:] >= 0].any():
      raise ValueError(
        "sampled drafts need siblings of ranks 0, 1, ... without gaps; this "
        f"tree has others: {[list(p) for p in tree.paths]}"
      )

  def propose(self, logits, count, seen, keys):
    """Candidates [B, D, count], drawn without replacement or the best.

    Logits are [B, D, V]; `seen` [B, V] counts for the repetition penalty.
    """
    seen = None if seen is None else seen[:, None]
    q = self.sampler.probabilities(logits, seen)
    if not self.sample_drafts:
      return Drafts(sampling.best(q, count))
    return Drafts(sampling.draw_distinct(q, count, keys), q)

  def accept(self, tree, verification, keys):
    """(last accepted node [B], bonus token [B] drawn from the residual)."""
    keys = jax.vmap(jax.random.split)(keys)  # [B, 2]: to accept, and to draw
    shape = tree.max_depth, tree.width
    u = jax.vmap(lambda k: jax.random.uniform(k, shape, jnp.float32))(
      keys[:, 0]
    )

    def target(node, seen):
      return self.sampler.probabilities(_at(verification.logits, node), seen)

    node, p, _ = walk(tree, verification.drafts, target, u, verification.seen)
    return node, sampling.draw(p, keys[:, 1])


def walk(
  tree: tree_lib.Tree,
  drafts: Drafts,
  target: Callable[[jax.Array, jax.Array | None], jax.Array],
  u: jax.Array,
  seen: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Walks down a tree by recursive rejection sampling.

  Args:
    tree: the topology.
    drafts: candidates, shared by all nodes of a depth.
    target: head 1's distribution [B, V] after nodes [B] of a text that holds
      `seen`.
    u: [B, D, R] uniform numbers, one per candidate.
    seen: [B, V] bool, or None.

  Returns:
    node [B]: the last accepted node.
    p [B, V]: the distribution of the bonus token after it.
    acceptance [B, D, R]: the probability of accepting each candidate that was
      tried, nan for the others.
  """
  rows = jnp.arange(len(u))
  node = jnp.zeros(len(u), jnp.int32)
  walking = jnp.ones(len(u), bool)
  p = target(node, seen)
  acceptance = jnp.full(u.shape, jnp.nan, u.dtype)
  for d in range(tree.max_depth):
    q = None if drafts.probabilities is None else drafts.probabilities[:, d]
    here, stepped = node, jnp.zeros_like(walking)
    for r in range(tree.width):
      if not (tree.child[tree.depth == d, r] >= 0).any():
        break
      child = jnp.asarray(tree.child)[here, r]
      tried = walking & ~stepped & (child >= 0)
      x = drafts.tokens[:, d, r]
      q_x = 1.0 if q is None else q[rows, x]
      ratio = jnp.where(q_x > 0, p[rows, x] / jnp.where(q_x > 0, q_x, 1), 0)
      acceptance = acceptance.at[:, d, r].set(
        jnp.where(tried, jnp.minimum(ratio, 1), jnp.nan)
      )
      accepted = tried & (u[:, d, r] < ratio)
      rejected = (tried & ~accepted)[:, None]
      node, stepped = jnp.where(accepted, child, node), stepped | accepted
      if seen is not None:
        seen = seen.at[rows, x].max(accepted)
      p = jnp.where(rejected, _residual(p, q, x), p)
      if q is not None:
        q = jnp.where(rejected, _normalise(q.at[rows, x].set(0), q), q)
    p = jnp.where(stepped[:, None], target(node, seen), p)
    walking = stepped
  return node, p, acceptance


def deepest(
  tree: tree_lib.Tree, accepted: jax.Array, score: jax.Array | None = None
) -> jax.Array:
  """The deepest node [B] that is accepted with all its ancestors.

  Args:
    tree: the topology.
    accepted: [B, M] bool: whether each node alone is accepted; the root always
      is.
    score: [B, M] decides between nodes of one depth; else the first.
  """
  accepted = accepted.at[:, 0].set(True)
  whole = (accepted[:, None] | ~jnp.asarray(tree.ancestor_mask)).all(-1)
  depth = jnp.where(whole, jnp.asarray(tree.depth), -1)
  if score is None:
    return depth.argmax(-1).astype(jnp.int32)
  last = depth == depth.max(-1, keepdims=True)
  return jnp.where(last, score, -jnp.inf).argmax(-1).astype(jnp.int32)


def _scores(tree, verification):
  """[B, M] logit of each node's token after its parent."""
  rows = jnp.arange(verification.tokens.shape[0])[:, None]
  return verification.logits[rows, tree.parent, verification.tokens]


def _residual(p, q, x):
  """The residual distribution after draft x was rejected."""
  if q is None:
    return _normalise(p.at[jnp.arange(len(p)), x].set(0), p)
  return _normalise(jnp.maximum(p - q, 0), p)


def _normalise(p, otherwise):
  """p over its sum, or `otherwise` where the sum is 0, as by rounding."""
  total = p.sum(-1, keepdims=True)
  return jnp.where(total > 0, p / jnp.where(total > 0, total, 1), otherwise)


def _at(x, node):
  """x [B, M, ...] at each row's node [B] -> [B, ...]."""
  return x[jnp.arange(len(node)), node]
