"""ROUGE: what a summary and a reference have in common (Lin, 2004).

Computed by the package `rouge-score`, an extra, which is imported when a score
is asked for. Its words are runs of a to z and 0 to 9 of the lower-cased text.
`unicode_words` and `characters` are for other alphabets.
"""

import functools
import importlib
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

NAMES = ("rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum")
Words = Callable[[str], list[str]]


class Score(NamedTuple):
  """Shares from 0 to 1."""

  precision: float  # of the summary's units that the reference has
  recall: float  # of the reference's units that the summary has
  f1: float  # the harmonic mean of both


class _Splitter(NamedTuple):
  """A `Words` as what rouge-score calls a tokenizer."""

  tokenize: Words


def words(text: str) -> list[str]:
  """The words of a text in lower case, of ASCII letters and digits."""
  return _default(stem=False).tokenize(text)


def stems(text: str) -> list[str]:
  """As `words`, without English endings (Porter's stemmer)."""
  return _default(stem=True).tokenize(text)


def unicode_words(text: str) -> list[str]:
  """The words of a text of any alphabet: letters, marks, digits; lower case.

  What counts is our decision: a word is a run of characters whose category in
  Unicode begins with L, M or N, after normalisation to NFC. So the joiner that
  Persian writes inside a word ends it, as a space does.
  """
  text = unicodedata.normalize("NFC", text.lower())
  return "".join(c if _kind(c) in "LMN" else " " for c in text).split()


def characters(text: str) -> list[str]:
  """The characters of `unicode_words`, each with the marks that follow it.

  For scripts that put no spaces between words, such as Thai. That a character
  counts instead of a word is our decision.
  """
  text = " ".join(unicode_words(text))
  return "".join(c if _kind(c) == "M" else f" {c}" for c in text).split()


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
    words: splits a text; `stems` counts "cat" and "cats" as one word.

  Raises:
    ValueError: rouge-score is missing.

  Example:
    >>> from mtp_jax.evaluate import rouge
    >>> rouge.score("the cat sat", "the cat ran").get("rouge2")
    Score(precision=0.5, recall=0.5, f1=0.5)
  """
  scorer = _package("rouge_scorer").RougeScorer(
    NAMES, tokenizer=_Splitter(words)
  )
  found = scorer.score(target=reference, prediction=summary)
  return {name: Score(*found[name]) for name in NAMES}


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

  There is none, or one has no word; the message names it. Or rouge-score,
  which would score them, is missing.
  """
  _package("rouge_scorer")
  if not references:
    raise ValueError("there is no summary to score")
  for i, reference in enumerate(references):
    if not words(reference):
      raise ValueError(
        f"reference {i} has no word: {reference!r:.60}; leave it out, or give "
        "`words` for its alphabet, such as `unicode_words`"
      )


def _kind(character: str) -> str:
  """The first letter of its category: L letter, M mark, N number, ..."""
  return unicodedata.category(character)[0]


@functools.cache
def _default(stem: bool) -> Any:
  return _package("tokenizers").DefaultTokenizer(use_stemmer=stem)


def _package(module: str) -> Any:
  try:
    return importlib.import_module(f"rouge_score.{module}")
  except ImportError as error:
    raise ValueError(
      f"ROUGE needs rouge-score ({error}): pip install rouge-score"
    ) from error
