"""ROUGE from its definition, to compare rouge-score with, and pairs for it."""

import collections
import functools
import random
import re

PIECES = ["a ", "b ", "c ", "Dog-1 ", "é ", "x", "\n", "\n\n", ". "]


def pairs() -> list[tuple[str, str]]:
  """(reference, summary): some are empty, all have repeats and ties."""
  draw = random.Random(0)

  def text():
    return "".join(draw.choice(PIECES) for _ in range(draw.randrange(40)))

  return [(text(), text()) for _ in range(100)]


def score(reference: str, summary: str) -> dict[str, tuple[float, ...]]:
  """Measure -> precision, recall, F1."""
  lines = [
    [tuple(_words(line)) for line in text.split("\n")]
    for text in (reference, summary)
  ]
  want, got = (sum(part, ()) for part in lines)
  found = {f"rouge{n}": _ngrams(want, got, n) for n in (1, 2, 3)}
  found["rougeL"] = _shares(len(_common(want, got)), len(want), len(got))
  matched = _matched(*lines)
  found["rougeLsum"] = _shares(matched, len(want), len(got))
  return found


def _words(text):
  return re.findall(r"[a-z0-9]+", text.lower())


def _shares(common, want, got):
  precision, recall = common / max(got, 1), common / max(want, 1)
  return precision, recall, 2 * common / max(want + got, 1)


def _ngrams(want, got, n):
  counts = [
    collections.Counter(w[i : i + n] for i in range(len(w) - n + 1))
    for w in (want, got)
  ]
  common = (counts[0] & counts[1]).total()
  return _shares(common, *(c.total() for c in counts))


def _common(want, got):
  """Places in `want` of a longest common subsequence.

  Of several, the one that a walk from the end finds first if it leaves out a
  word of `got` only where that is better than leaving out one of `want`.
  """

  @functools.cache
  def length(i, j):
    if not (i and j):
      return 0
    if want[i - 1] == got[j - 1]:
      return length(i - 1, j - 1) + 1
    return max(length(i - 1, j), length(i, j - 1))

  i, j, places = len(want), len(got), set()
  while i and j:
    if want[i - 1] == got[j - 1]:
      i, j = i - 1, j - 1
      places.add(i)
    elif length(i, j - 1) > length(i - 1, j):
      j -= 1
    else:
      i -= 1
  return places


def _matched(want, got):
  """Words of `want`'s lines in any of `got`'s, as often as both have them."""
  left = [collections.Counter(sum(lines, ())) for lines in (want, got)]
  matched = 0
  for line in want:
    for i in sorted(set().union(*(_common(line, other) for other in got))):
      if all(counts[line[i]] for counts in left):
        matched += 1
        for counts in left:
          counts[line[i]] -= 1
  return matched
