"""What models read, and the stories that they are tested on."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np

from mtp_jax import config
from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.data import batch as batch_lib
from mtp_jax.data import corpora as reader
from mtp_jax.data import pipeline
from mtp_jax.tasks import induction, stories


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Rows to train on, and stories whose characters are renamed.

  Attributes:
    rows: [R, T+N] of the largest N.
    test: the stories of the measure.
    vocab: ids.
  """

  rows: batch_lib.Batch
  test: stories.Stories
  vocab: int


@functools.lru_cache(maxsize=4)
def written(
  tokens: int, test: int, names: int, books: float, seq_len: int, most: int
) -> Corpus:
  """The built-in stories, and beside them "books" with more characters.

  Books stand for the paper's second corpus (figure S14): longer documents, of
  150 tokens on average, with up to seven characters. These have any of the
  names that tests do not have, so that hardly a name is worth remembering
  beyond its document. Test names are in neither corpus.

  Args:
    tokens: about how many in all.
    test: stories to test on.
    names: in the training stories.
    books: the share of tokens that are of books.
    seq_len: T.
    most: the largest N.
  """
  random, pool, others, tested = _begin(test, names)
  parts = []
  for share, mean, cast, settings in (
    (1 - books, 130, pool, {}),
    (books, 150, others, {"events": (9, 11), "visitors": 5}),
  ):
    count = round(share * tokens / mean)  # tokens of a document, about
    if count:
      some = stories.write(random, count, cast, **settings)
      parts.append(induction.pack(some, seq_len=seq_len, reach=most))
  rows = jax.tree.map(lambda *a: np.concatenate(a), *parts)
  return Corpus(rows, tested, len(stories.vocabulary()))


def tested(test: int, names: int) -> stories.Stories:
  """The test stories of `written`, without the corpus."""
  return _begin(test, names)[-1]


def _begin(test, names):
  """Random draws, names of stories, names of books, and test stories."""
  random = np.random.default_rng(4)
  every = stories.names(random, len(stories.BEGINNINGS) * len(stories.ENDINGS))
  pool, rest = every[:names], every[names:]
  new, others = rest[: len(rest) // 2], rest[len(rest) // 2 :]
  return random, pool, others, stories.write(random, test, new)


def check(path: pathlib.Path, tokenizer: str) -> None:
  """Raises ValueError if a corpus or its tokenizer is missing."""
  tokenizer_lib.load(tokenizer)
  reader.files(_data(path, tokenizer))


@functools.lru_cache(maxsize=1)
def loaded(
  path: pathlib.Path, tokenizer: str, test: int, seq_len: int, most: int
) -> Corpus:
  """A corpus of stories in a file: a folder of texts, JSONL or ArrayRecord.

  Test stories are the held-out documents, with characters renamed to random
  names of two tokens, as in the paper.
  """
  data = dataclasses.replace(_data(path, tokenizer), seq_len=seq_len).check()
  codec = tokenizer_lib.load(tokenizer)
  train, held_out = pipeline.pack(data, codec)
  windows = [
    train.window(i, seq_len, most) for i in range(train.windows(seq_len))
  ]
  random = np.random.default_rng(4)
  starts = np.append(np.asarray(held_out.starts), len(held_out.tokens))
  texts = (
    codec.decode(held_out.tokens[low:high])
    for low, high in zip(starts[:-1], starts[1:], strict=True)
  )
  names = induction.two_token_names(codec, random, 100)
  tested = induction.renamed(
    texts, codec, names, random, count=test, seq_len=seq_len
  )
  rows = jax.tree.map(lambda *a: np.stack(a), *windows)
  return Corpus(rows, tested, codec.vocab)


def _data(path, tokenizer) -> config.Data:
  kinds = {".jsonl": "jsonl", ".array_record": "array_record"}
  return config.Data(
    source=kinds.get(path.suffix, "text"),
    path=str(path),
    tokenizer=tokenizer,
    batch=1,  # test stories are read one by one
    held_out=0.02,
  )
