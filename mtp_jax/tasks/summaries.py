"""Summaries: pairs of a text and its summary, and their ROUGE.

Eight sets that the paper finetunes on, read from local JSONL files, and two
that a machine has: manual pages and Python modules.
"""

import ast
import io
import os
import pathlib
import re
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mtp_jax import config, tokenizer
from mtp_jax.data import corpora, formats, splits
from mtp_jax.decode import interface, serve
from mtp_jax.evaluate import rouge
from mtp_jax.tasks import man_pages, pairs


class Fields(NamedTuple):
  """Names of the fields of a line of JSON, and what ROUGE counts."""

  text: str
  summary: str
  words: rouge.Words = rouge.words


# Of the sets' own files; BigPatent is in table S13 and has no result. The words
# of French, Persian and Thai texts are our decision.
SETS = {
  "bigpatent": Fields("description", "abstract"),
  "cnn_dm": Fields("article", "highlights"),
  "multi_news": Fields("document", "summary"),
  "orangesum": Fields("text", "summary", rouge.unicode_words),
  "pn_summary": Fields("article", "summary", rouge.unicode_words),
  "samsum": Fields("dialogue", "summary"),
  "thaisum": Fields("body", "summary", rouge.characters),
  "wikisummary": Fields("article", "highlights", rouge.unicode_words),
  "xsum": Fields("document", "summary"),
}
BUILT_IN = ("man_pages", "docstrings")
ASK = "\n\nSummary:"  # stands between a text and its summary


def pair(text: str, summary: str, size: int) -> pairs.Pair:
  """A document to finetune on, of the first `size` characters of a text.

  The space is the answer's: a prompt that ends in one has other sub-words.
  """
  return pairs.Pair(text[:size].rstrip() + ASK, f" {summary.strip()}")


def read(
  path: str | os.PathLike, fields: Fields, size: int
) -> Iterator[pairs.Pair]:
  """The pairs of a JSONL file (.gz and .zst too), in its order.

  Args:
    path: the file.
    fields: such as `SETS["xsum"]`.
    size: characters of the text to keep.

  Raises:
    ValueError: a line is damaged, lacks a field, or has an empty one; names
      file and line.
  """
  path = pathlib.Path(path).expanduser()
  if not path.is_file():
    raise ValueError(f"there is no file {path}; give a JSONL file of summaries")
  for line, record in formats.records(
    "jsonl", path, fields.summary, fields.text
  ):
    if isinstance(record, formats.Damage):
      raise ValueError(f"{path}:{line}: {record.reason}: {record.detail}")
    text, summary = (part.decode("utf-8") for part in record)
    if not (text.strip() and summary.strip()):
      raise ValueError(
        f"{path}:{line}: {fields.text!r} or {fields.summary!r} is empty: "
        "remove the line"
      )
    yield pair(text, summary, size)


def built_in(name: str, size: int) -> list[pairs.Pair]:
  """The pairs of a task of BUILT_IN, without duplicates.

  man_pages: what a manual page's NAME says, from its DESCRIPTION.
  docstrings: the first paragraph of a module's docstring, from its source. The
  files are those of the corpus `python`, on which models are trained by
  default. That corpus holds out whole files and `split` holds out pairs, so
  such a model may have read docstrings that it is tested on.

  Raises:
    ValueError: there is no such task, or this machine has no manual pages.
  """
  if name == "man_pages":
    pages = man_pages.read(size=size)
    found = (pair(page.description, page.summary, size) for page in pages)
  elif name == "docstrings":
    found = _docstrings(size)
  else:
    raise ValueError(f"no task {name!r}; choose one of {', '.join(BUILT_IN)}")
  return list(dict.fromkeys(found))


def _docstrings(size: int) -> Iterator[pairs.Pair]:
  for document in corpora.read(config.Data(source="python")):
    found = docstring(document.text.decode("utf-8"))
    if found:
      yield pair(*found, size)


def docstring(source: str) -> tuple[str, str] | None:
  """(source without its docstring, first paragraph of that), if it has one.

  Comments above the docstring are left out: they are licences.
  """
  passed = tokenize.COMMENT, tokenize.NL
  try:  # the first statement alone: parsing whole files takes minutes
    found = tokenize.generate_tokens(io.StringIO(source).readline)
    token = next(t for t in found if t.type not in passed)
    if token.type != tokenize.STRING or next(found).type != tokenize.NEWLINE:
      return None
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of others' invalid escapes
      value = ast.literal_eval(token.string)
  except (SyntaxError, ValueError, tokenize.TokenError, StopIteration):
    return None
  if not isinstance(value, str):
    return None
  first = " ".join(re.split(r"\n\s*\n", value.strip())[0].split())
  rest = "".join(source.splitlines(keepends=True)[token.end[0] :])
  if not (first and rest.strip()):
    return None
  return rest.strip(), first


def split(
  found: Sequence[pairs.Pair], held_out: float
) -> tuple[list[pairs.Pair], list[pairs.Pair]]:
  """(train, test): a pair's place depends on its text alone.

  `data.pack` holds out the same pairs of a file of them.
  """
  parts = [], []
  for one in found:
    text = (one.prompt + one.answer).encode("utf-8")
    parts[splits.is_held_out(text, held_out)].append(one)
  return parts


class Summaries(NamedTuple):
  """What a model wrote, and its measures."""

  texts: list[str]
  rouge: dict[str, rouge.Score]  # means
  tokens_per_forward: float


def evaluate(
  decoder: interface.Decoder,
  codec: tokenizer.Tokenizer,
  found: Sequence[pairs.Pair],
  *,
  words: rouge.Words = rouge.words,
  **settings: Any,
) -> Summaries:
  """Greedy summaries of the prompts, and their ROUGE against the answers.

  Args:
    decoder: from `mtp_jax.lay_out`.
    codec: its tokenizer.
    found: pairs that the model was not trained on. What it read in
      pretraining is not known here; see `built_in` on docstrings.
    words: what ROUGE counts, such as `SETS["thaisum"].words`.
    **settings: of `serve.generate_all`: `rows`, summaries at once (16 by
      default); `heads` to draft with, which change no summary (1); `max_new`,
      tokens at which a summary is cut (128).

  Raises:
    ValueError: an answer has no word that ROUGE counts; as `generate_all`.
  """
  rouge.check([one.answer for one in found], words)
  prompts = [[*codec.prefix, *codec.encode(one.prompt)] for one in found]
  settings = {"rows": 16, "heads": 1, "max_new": 128} | settings
  written = serve.generate_all(decoder, prompts, stop=codec.ends, **settings)
  texts = [
    codec.decode(tokens, after=prompt).strip()
    for prompt, tokens in zip(prompts, written.tokens, strict=True)
  ]
  answers = (one.answer.strip() for one in found)
  means = rouge.mean(zip(answers, texts, strict=True), words)
  return Summaries(texts, means, written.tokens_per_forward)
