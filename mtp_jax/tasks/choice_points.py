"""A small language in which it is known which tokens matter for what follows.

A document alternates two kinds of blocks, for a tail of 3 tokens:

  ?bbbb!axxx?aaaa!cxxx...

Behind `?` stands a choice point: one of K letters, each as likely, and the
tail repeats it. Behind `!` stands a transition without consequence: one of the
same letters, as likely, but the tail is always the same. All else is certain.
So both random tokens are equally hard to predict, and only the first one has
consequences.

Head i, at t, predicts token t+i. A term of the loss belongs to a choice point
if its target is that token, or a token of its tail that is predicted from
before the choice: only these are uncertain. There are n of the first kind and
(n-1) + ... + 1 of the second, so a choice point has n(n+1)/2 terms; a
transition without consequence has n.

Reference: the paper, section 5.1 and appendix L.3.
"""

import dataclasses
import string

import numpy as np

VOCAB = 128  # every byte of a document is below


@dataclasses.dataclass(frozen=True)
class Language:
  """The language's sizes.

  Raises:
    ValueError: a size is too small or too large.
  """

  letters: int  # K
  tail: int  # tokens behind a random one; n-1 or more give all n its terms
  blocks: int  # of a document, half of them with a choice point

  def __post_init__(self):
    if not 2 <= self.letters <= 20:
      raise ValueError(f"{self.letters} letters: take 2 to 20")
    if self.tail < 0 or self.blocks < 6 or self.blocks % 2:
      raise ValueError(
        f"a tail of {self.tail} and {self.blocks} blocks: take a tail of 0 or "
        "more, and an even number of blocks, 6 or more"
      )

  @property
  def block(self) -> int:
    """Tokens of a block: its sign, the random token, the tail."""
    return self.tail + 2

  @property
  def tokens(self) -> int:
    """Tokens of a document."""
    return self.blocks * self.block

  @property
  def counted(self) -> int:
    """Random tokens of each kind whose terms `terms` finds."""
    return self.blocks // 2 - 2


def draw(
  language: Language, count: int, rng: np.random.Generator
) -> np.ndarray:
  """Draws documents: int32 [count, language.tokens], bytes as token ids.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> bytes(draw(Language(3, 1, 6), 1, rng)[0].tolist()).decode()
    '?cc!bx?bb!ax?aa!ax'
  """
  letters = np.frombuffer(string.ascii_lowercase.encode(), np.uint8)
  random = letters[
    rng.integers(language.letters, size=(count, language.blocks))
  ]
  found = np.full((count, language.blocks, language.block), ord("x"), np.int32)
  found[:, ::2, 0], found[:, 1::2, 0] = ord("?"), ord("!")
  found[:, :, 1] = random
  found[:, ::2, 2:] = random[:, ::2, None]
  return found.reshape(count, -1)


def terms(language: Language, n_future: int) -> dict[str, np.ndarray]:
  """Which terms of the loss belong to which kind of random token.

  Args:
    language: of the documents.
    n_future: N, at most language.tail + 1; head i's terms are row i-1.

  Returns:
    `choice` and `idle` (without consequence), bool [N, T] each, T =
    language.tokens - N. The first and the last random token of each kind, some
    of whose terms lie outside the document, are left out.

  Raises:
    ValueError: a tail that is too short for so many heads.
  """
  if n_future > language.tail + 1:
    raise ValueError(
      f"{n_future} heads look beyond a tail of {language.tail}: take a tail of "
      f"{n_future - 1} or more"
    )
  t = np.arange(language.tokens - n_future)
  target = t + np.arange(1, n_future + 1)[:, None]  # [N, T]
  block, place = np.divmod(target, language.block)
  inside = (block >= 2) & (block < language.blocks - 2)
  chosen = block % 2 == 0
  before = t < block * language.block + 1  # where the choice stands
  return {
    "choice": inside & chosen & (place > 0) & before,
    "idle": inside & ~chosen & (place == 1),
  }
