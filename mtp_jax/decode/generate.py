"""From lists of ids to texts and their statistics, on the host."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.decode import cache as cache_lib
from mtp_jax.decode import checks, interface, loop
from mtp_jax.decode import prompts as prompts_lib
from mtp_jax.decode import tree as tree_lib


@dataclasses.dataclass(frozen=True)
class Text:
  """The text written after one prompt, and its statistics."""

  tokens: np.ndarray  # [n] new tokens, the end token included
  per_pass: np.ndarray  # [passes] tokens that each pass wrote
  logprob: np.ndarray  # [n] of each token under head 1 as it is, nats
  margin: np.ndarray  # [n] between head 1's best two logits at each token
  # Counts of the model, whether or not the text ended within a path:
  nodes: np.ndarray  # [M] passes by their last accepted node
  rank_counts: np.ndarray  # [k-1, R+1] true tokens by rank; last: no candidate


@dataclasses.dataclass(frozen=True)
class Result:
  """Texts in the order of the prompts, and counts over all of them."""

  texts: list[Text]
  tree: tree_lib.Tree

  @property
  def tokens(self) -> list[np.ndarray]:
    """New tokens of each row, its end token included."""
    return [t.tokens for t in self.texts]

  @property
  def per_pass(self) -> list[np.ndarray]:
    """Tokens written by each of a row's passes."""
    return [t.per_pass for t in self.texts]

  @property
  def passes(self) -> np.ndarray:
    """Passes [B] in which each row wrote, the prompt's not counted."""
    return np.array([len(t.per_pass) for t in self.texts])

  @property
  def tokens_per_forward(self) -> float:
    """New tokens over decoding passes, all rows together, from 1 to k.

    The bonus token of each pass (head 1's own) counts; the prompt's pass and
    the token that it writes do not. Without any other pass it is nan.
    """
    counts = np.concatenate(self.per_pass)
    return float(counts.mean()) if counts.size else float("nan")

  @property
  def accepted(self) -> np.ndarray:
    """Share of passes [k] that accepted a draft of head i; head 1's is 1."""
    nodes = sum(t.nodes for t in self.texts)
    depth = self.tree.depth[:, None] >= np.arange(self.tree.heads)
    return _share(nodes @ depth, nodes.sum())

  @property
  def accepted_in_turn(self) -> np.ndarray:
    """The same [k], of the passes that accepted a draft of head i-1."""
    accepted = self.accepted
    before = np.concatenate([accepted[:1], accepted[:-1]])
    return _share(accepted, before)

  @property
  def rank_acceptance(self) -> np.ndarray:
    """[k-1, R]: how often the rank-r candidate of head 2, 3, ... was right.

    Given that the drafts before it were: what `tree.build` takes. Candidates
    count whether or not the tree verified them.
    """
    counts = sum(t.rank_counts for t in self.texts)
    return _share(counts[:, :-1], counts.sum(-1, keepdims=True))

  @property
  def wasted(self) -> float:
    """Share of window positions, over all passes, that added no token."""
    counts = np.concatenate(self.per_pass)
    return float(1 - _share(counts.sum(), counts.size * self.tree.size))

  def near_ties(self, epsilon: float) -> float:
    """Share of tokens whose best two logits are closer than `epsilon`.

    Rounding may choose either of the two there. A text that differs from
    ordinary decoding's anywhere else is a bug.
    """
    margins = np.concatenate([t.margin for t in self.texts])
    return float((margins < epsilon).mean())


def generate(
  decoder: interface.Decoder,
  prompts: Sequence[Sequence[int]],
  *,
  cache_len: int | None = None,
  **settings: Any,
) -> Result:
  """Continues every prompt, all of them in one batch.

  With `accept.Greedy` it equals appending head 1's choice to the text until
  it ends, one pass per token, which is what heads=1 does. A pass over k tokens
  rounds differently from a pass over one, so a near-tie of two tokens may be
  decided differently.

  Example, with the run that the example of `mtp_jax.fit` trains:
    >>> import mtp_jax
    >>> net, _, codec = mtp_jax.load("runs/tiny")
    >>> decoder = mtp_jax.lay_out(net, codec.vocab)
    >>> prompts = [[codec.bos, *codec.encode(text)] for text in ("To", "be or")]
    >>> result = mtp_jax.generate(decoder, prompts, heads=4, max_new=9)
    >>> [len(tokens) for tokens in result.tokens]
    [9, 9]
    >>> 1 <= result.tokens_per_forward <= 4
    True

  Args:
    decoder: from `mtp_jax.lay_out(model)`.
    prompts: sequences of token ids, of any lengths.
    cache_len: positions of the cache; None: as many as turn out to be needed,
      the cache growing by half with the texts.
    **settings: `heads`, from 1 (ordinary decoding) to N, or a tree of drafts,
      and `max_new` tokens. Optional: `stop`, an end token or several; `rule`
      from `accept`; `seed`. See `interface.check_settings`.

  Raises:
    ValueError: a bad setting, an empty prompt, an id outside the vocabulary,
      or a prompt that with max_new and the last window exceeds cache_len.
      Afterwards:
      logits that are not finite; names the text.
  """
  if cache_len is not None:
    cache_len = checks.integer("cache_len", cache_len)
  checked = interface.check_settings(decoder, **settings)
  reserve = _reserve(int(checked.max_new), checked.tree)
  tokens, lengths = prompts_lib.pad(
    prompts, decoder.vocab, cache_len=cache_len, reserve=reserve
  )
  state = start(decoder, tokens, lengths, checked, cache_len=cache_len)
  state = loop.finish(decoder, checked.rule, state)
  texts = collect(state, lengths)
  finite(enumerate(texts))
  return Result(texts, checked.tree)


def start(
  decoder: interface.Decoder,
  tokens: jax.Array,
  lengths: jax.Array,
  settings: interface.DecodingSettings,
  *,
  samples: int = 1,
  cache_len: int | None = None,
) -> loop.State:
  """Reads the prompts and begins their texts: the first state of the loop.

  Args:
    decoder: from `mtp_jax.lay_out(model)`.
    tokens, lengths: from `prompts.pad`.
    settings: from `interface.check_settings`.
    samples: texts per prompt, in neighbouring rows. They share one reading.
    cache_len: positions of the cache; None: it may grow.

  Raises:
    ValueError: samples below 1, or a cache_len that a last window would leave.
  """
  samples = checks.integer("samples", samples, 1)
  tree, max_new = settings.tree, int(settings.max_new)
  B, P = tokens.shape
  needed = P + _reserve(max_new, tree)
  if cache_len is not None and cache_len < needed:
    raise ValueError(
      f"prompts of {P} tokens, max_new={max_new} and windows of {tree.size} "
      f"need {needed} positions, but cache_len={cache_len}"
    )
  size, cache_len = sizes(P, tree, max_new, cache_len)
  prompt = prompts_lib.read_jit(
    decoder, tokens, lengths, heads=tree.heads, cache_len=cache_len
  )
  if samples > 1:
    prompt = jax.tree.map(lambda a: jnp.repeat(a, samples, 0), prompt)
  key = loop.row_keys(settings.seed, np.arange(B * samples))
  return loop.begin_jit(decoder, settings, prompt, size=size, key=key)


def sizes(
  width: int, tree: tree_lib.Tree, max_new: int, cache_len: int | None
) -> tuple[int, int]:
  """(S of the text, positions of the first cache) for prompts [B, width].

  Both are `cache_len` if it is given. Otherwise both are rounded up, so that
  other lengths seldom compile another program.
  """
  if cache_len is not None:
    return cache_len, cache_len
  size = cache_lib.rounded(width + _reserve(max_new, tree))
  return size, min(size, cache_lib.ladder(width + tree.size))


def _reserve(max_new: int, tree: tree_lib.Tree) -> int:
  """Positions behind a prompt that decoding writes to.

  A row that is done is computed with the others, in a window from its last
  token on.
  """
  return max_new + tree.size - 1


def last_size(longest: int, tree: tree_lib.Tree) -> int:
  """Positions of a cache that grew until a text of `longest` tokens ended."""
  size = cache_lib.rounded(longest + tree.size - 1)  # see `sizes`
  # The last window begins at the last token but one.
  return min(size, cache_lib.ladder(longest - 2 + tree.size))


def parts(state: loop.State) -> tuple:
  """What texts are made from: tokens, lengths and statistics of all rows."""
  return state.tokens, state.length, state.statistics


def collect(state: loop.State, lengths: Sequence[int]) -> list[Text]:
  """Copies a state's texts to the host; `lengths` [B] are the prompts'."""
  host = jax.device_get(parts(state))
  return [
    text(jax.tree.map(lambda a, b=b: a[b], host), length)
    for b, length in enumerate(lengths)
  ]


def finite(texts: Iterable[tuple[int, Text]]) -> None:
  """Raises ValueError that names texts whose logits were not finite.

  A row ends at the first such token, whose log-probability is then nan.
  """
  bad = [(i, t) for i, t in texts if np.isnan(t.logprob).any()]
  if bad:
    i, text = bad[0]
    others = f", and {len(bad) - 1} more texts" if bad[1:] else ""
    raise ValueError(
      f"the logits of text {i} are not finite at its new token "
      f"{np.isnan(text.logprob).argmax()}{others}: the model's weights hold "
      "NaN, or its dtype overflows; take an earlier checkpoint, or float32"
    )


def text(row: tuple, length: int, kept: int | None = None) -> Text:
  """The text of one row of `parts`, after a prompt of `length` tokens.

  With `kept`, its first so many tokens, and the passes that wrote them.
  """
  tokens, end, counts = row
  new = slice(length, end if kept is None else length + kept)
  return Text(
    tokens=tokens[new],
    per_pass=np.bincount(counts.written_in[new])[1:],
    logprob=counts.logprob[new],
    margin=counts.margin[new],
    nodes=counts.nodes,
    rank_counts=counts.rank_counts,
  )


def _share(part, whole):
  """part / whole; nan where there is nothing to share."""
  with np.errstate(divide="ignore", invalid="ignore"):
    return np.true_divide(part, whole)
