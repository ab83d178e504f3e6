"""ROUGE: what a summary and a reference have in common (Lin, 2004).

Computed here, without a package; equals `rouge-score` 0.1.2 without stemming.
Words are runs of a to z and 0 to 9 of the lower-cased text, so texts of other
alphabets need a `words` of their own.
"""

import collections
import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

NAMES = ("rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum")
Words = Callable[[str], list[str]]


class Score(NamedTuple):
  """Shares from 0 to 1."""

  precision: float  # of the summary's units that the reference has
  recall: float  # of the reference's units that the summary has
  f1: float  # the harmonic mean of both


def words(text: str) -> list[str]:
  """The words of a text in lower case, of ASCII letters and digits."""
  return re.findall(r"[a-z0-9]+", text.lower())


def score(
  reference: str, summary: str, words: Words = words
) -> dict[str, Score]:
  """Every measure of `NAMES` for one summary.

  rouge1 to rouge3 count n-grams, each as often as both texts have it. rougeL
  is their longest common subsequence of words. rougeLsum takes, for each line
  of the reference, the words that any line of the summary has in common with
  it in order.

  Args:
    reference: the text that is wanted.
    summary: the text that a model wrote.
    words: splits a text.

  Example:
    >>> from mtp_jax.evaluate import rouge
    >>> rouge.score("the cat sat", "the cat ran").get("rouge2")
    Score(precision=0.5, recall=0.5, f1=0.5)
  """
  want, got = words(reference), words(summary)
  found = {f"rouge{n}": _ngrams(want, got, n) for n in (1, 2, 3)}
  common = len(_common(want, got))
  found["rougeL"] = _score(common, len(want), len(got))
  lines = [
    [words(line) for line in text.split("\n") if line]
    for text in (reference, summary)
  ]
  found["rougeLsum"] = _lines(*lines)
  return found


def mean(
  pairs: Iterable[tuple[str, str]], words: Words = words
) -> dict[str, Score]:
  """The mean of each measure over (reference, summary) pairs.

  Raises:
    ValueError: see `check`.
  """
  pairs = list(pairs)
  check([reference for reference, _ in pairs], words)
  scores = [score(*pair, words) for pair in pairs]
  return {
    name: Score(
      *(
        sum(values) / len(scores)
        for values in zip(*(s[name] for s in scores), strict=True)
      )
    )
    for name in NAMES
  }


def check(references: Sequence[str], words: Words = words) -> None:
  """Raises ValueError for references that no summary can match.

  There is none, or one has no word; the message names it.
  """
  if not references:
    raise ValueError("there is no summary to score")
  for i, reference in enumerate(references):
    if not words(reference):
      raise ValueError(
        f"reference {i} has no word: {reference!r:.60}; leave it out, or give "
        "`words` for its alphabet"
      )


def _score(common: int, want: int, got: int) -> Score:
  precision, recall = common / max(got, 1), common / max(want, 1)
  total = precision + recall
  return Score(precision, recall, 2 * precision * recall / (total or 1))


def _ngrams(want: Sequence[str], got: Sequence[str], n: int) -> Score:
  counts = [
    collections.Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1))
    for w in (want, got)
  ]
  common = (counts[0] & counts[1]).total()
  return _score(common, *(c.total() for c in counts))


def _common(want: Sequence[str], got: Sequence[str]) -> list[int]:
  """Places in `want` of a longest common subsequence, ascending.

  Where there are several, the one that a walk back through the table finds
  first; sums over sentences depend on which it is.
  """
  rows = [[0] * (len(got) + 1)]
  for word in want:
    above, row = rows[-1], [0]
    for j, other in enumerate(got):
      longer = above[j] + 1 if word == other else max(above[j + 1], row[j])
      row.append(longer)
    rows.append(row)
  i, j, places = len(want), len(got), []
  while i and j:
    if want[i - 1] == got[j - 1]:
      i, j = i - 1, j - 1
      places.append(i)
    elif rows[i][j - 1] > rows[i - 1][j]:
      j -= 1
    else:
      i -= 1
  return places[::-1]


def _lines(want: list[list[str]], got: list[list[str]]) -> Score:
  """rougeLsum: a word counts at most as often as both texts have it."""
  left = [collections.Counter(w for line in lines for w in line)
          for lines in (want, got)]  # fmt: skip
  common = 0
  for line in want:
    union = sorted({i for other in got for i in _common(line, other)})
    for i in union:
      if all(counts[line[i]] > 0 for counts in left):
        common += 1
        for counts in left:
          counts[line[i]] -= 1
  sizes = (sum(map(len, lines)) for lines in (want, got))
  return _score(common, *sizes)
