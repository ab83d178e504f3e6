"""A packed split: one sequence of tokens, read in windows and excerpts."""

import dataclasses

import numpy as np

from mtp_jax.data import batch, blocks


@dataclasses.dataclass(frozen=True)
class Packed:
  """A split as one sequence of tokens; every document is [bos, ids, eos].

  The arrays that `pack.pack` returns are verified block by block whenever they
  are read. If the cache is damaged while it is in use, `CacheDamaged` is raised
  before a damaged token is used. So all steps before the error are sound.
  """

  tokens: np.ndarray | blocks.Array  # [tokens], unsigned
  starts: np.ndarray | blocks.Array  # [documents], int64, ascending from 0
  # UTF-8 bytes / predicted tokens, which exclude bos and tokens of weight 0
  bytes_per_token: float
  fingerprint: str  # of tokens, starts and tokenizer
  documents: int
  skipped: dict[str, int]  # records left out of the corpus, by reason
  cut: str = ""  # what is held out, if a document was cut (`splits.find_cut`)
  files: int = 0  # files of the corpus, for both splits together
  # [tokens], of each token in the loss; None: 1. See `batch.Batch.weight`.
  weight: np.ndarray | blocks.Array | None = None

  def __post_init__(self):
    if self.weight is not None and len(self.weight) != len(self.tokens):
      raise ValueError(
        f"{len(self.weight)} weights for {len(self.tokens)} tokens: give one "
        "for each"
      )

  def windows(self, seq_len: int) -> int:
    """Number of windows; the last one may be padded."""
    return -(-len(self.tokens) // seq_len)

  def window(self, index: int, seq_len: int, reach: int) -> batch.Batch:
    """Tokens [index T, index T + T + reach), their documents and weights.

    Args:
      index: from 0 to `windows(seq_len)` - 1.
      seq_len: T.
      reach: tokens after the window's end, see `pipeline.Batching`.

    Returns:
      A row of a Batch, arrays [T + reach]. Segments are the index of the
      document plus 1, and 0 (with token 0 and weight 0) past the end of the
      data.

    Raises:
      IndexError: no such window.
      ValueError: a weight that is negative or not finite.
      CacheDamaged: its tokens are not the ones that were packed.
    """
    if not 0 <= index < self.windows(seq_len):
      raise IndexError(
        f"window {index} of {self.windows(seq_len)} at seq_len {seq_len}"
      )
    low = index * seq_len
    ids = self.tokens[low : low + seq_len + reach]
    tokens = np.zeros(seq_len + reach, np.int32)
    segments = np.zeros_like(tokens)
    tokens[: len(ids)] = ids
    places = np.arange(low, low + len(ids))
    before = self.starts.searchsorted(low, "right")
    until = self.starts.searchsorted(low + len(ids), "left")
    inside = self.starts[before:until]
    segments[: len(ids)] = before + np.searchsorted(
      inside, places, side="right"
    )
    return batch.Batch(tokens, segments, self._weights(low, len(tokens)))

  def _weights(self, low: int, size: int) -> np.ndarray:
    """[size] float32 from token `low` on; 0 past the end of the data."""
    inside = min(size, len(self.tokens) - low)
    weights = np.ones(inside, np.float32)
    if self.weight is not None:
      weights = np.asarray(self.weight[low : low + inside], np.float32)
      wrong = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
      if len(wrong):
        raise ValueError(
          f"the weight of token {low + wrong[0]} is {weights[wrong[0]]}: make "
          "every weight finite and at least 0"
        )
    return np.pad(weights, (0, size - inside))

  def excerpts(
    self, count: int, length: int, size: int, per_document: int = 1
  ) -> list[np.ndarray]:
    """Cuts documents into pieces and returns the first tokens of some pieces.

    Args:
      count: number of pieces, spread evenly over all pieces.
      length: tokens to return of each piece, at most `size`.
      size: tokens of a piece. The first piece of a document begins with it.
      per_document: maximum number of pieces of one document. It is raised if
        there are fewer than `count` pieces.

    Returns:
      `count` arrays [length].

    Raises:
      ValueError: all documents together have fewer pieces.
    """
    starts = np.asarray(self.starts)
    ends = np.append(starts[1:], len(self.tokens))
    whole = (ends - starts) // size
    pieces = np.minimum(whole, per_document)
    while pieces.sum() < min(count, whole.sum()):
      per_document += 1
      pieces = np.minimum(whole, per_document)
    number = np.arange(pieces.sum()) - np.repeat(
      np.cumsum(pieces) - pieces, pieces
    )
    starts = np.repeat(starts, pieces) + number * size
    if len(starts) < count:
      fewer = f"ask for at most {len(starts)}, or " if len(starts) else ""
      raise ValueError(
        f"only {len(starts)} pieces of documents have {size} tokens, but "
        f"{count} were asked for: {fewer}hold out more or longer documents"
      )
    places = np.linspace(0, len(starts) - 1, count).astype(int)
    return [np.array(self.tokens[s : s + length]) for s in starts[places]]
