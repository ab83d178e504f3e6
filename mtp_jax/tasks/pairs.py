"""Prompts and their answers, as documents to finetune on.

`write` makes the file that `data.source="jsonl"` reads with
`data.prompt="prompt"` and `data.field="answer"`.
"""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from mtp_jax import config


class Pair(NamedTuple):
  """A prompt, and what a model is to write after it."""

  prompt: str
  answer: str


def write(path: str | os.PathLike, pairs: Iterable[Pair]) -> int:
  """Writes a line of JSON for each pair, all or nothing; returns how many.

  Example:
    >>> from mtp_jax.tasks import pairs
    >>> pairs.write("sums.jsonl", [pairs.Pair("1 + 1 = ", "2")])
    1
    >>> pairs.data("sums.jsonl", loss_on="answer").prompt
    'prompt'
  """
  path = pathlib.Path(path).expanduser()
  partial, count = path.with_name(f"{path.name}.partial"), 0
  with partial.open("w", encoding="utf-8") as file:
    for pair in pairs:
      file.write(json.dumps(pair._asdict()) + "\n")
      count += 1
  partial.replace(path)
  return count


def data(path: str | os.PathLike, **settings) -> config.Data:
  """The section `data` of a run that learns a file of `write`.

  Args:
    path: the file, whose name ends in .jsonl.
    **settings: other fields of `config.Data`, such as `loss_on="answer"`.
  """
  names = {"source": "jsonl", "prompt": "prompt", "field": "answer"}
  return config.Data(**names, path=str(path), **settings)


def conditioned(prompt: str, correct: bool) -> str:
  """A prompt for reward conditioning: it says what kind of answer follows.

  A model that learns both kinds is asked for correct answers afterwards. The
  paper does so on CodeContests (appendix F); this form is ours.
  """
  return f"# {'correct' if correct else 'incorrect'}\n{prompt}"
