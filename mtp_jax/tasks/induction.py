"""Induction: a name that was mentioned is known again (paper, section 4.1).

The measure is the paper's: in stories whose characters have random names of
exactly two tokens, the share of later mentions of a name whose second token is
head 1's first choice behind the first one.

Stories are those of `stories`, or texts of a corpus whose characters are
renamed (`renamed`). The paper names neither its corpus nor how it finds the
names in it.
"""

import collections
import re
from collections.abc import Iterable, Sequence

import numpy as np

from mtp_jax import tokenizer as tokenizer_lib
from mtp_jax.data import batch as batch_lib
from mtp_jax.data import rows as rows_lib
from mtp_jax.evaluate import choices
from mtp_jax.model import model
from mtp_jax.tasks import stories

Stories = stories.Stories
_WORD = re.compile(r"[A-Za-z]+")


def accuracy(net: model.Model, some: Stories, *, rows: int = 50) -> float:
  """Share of later mentions whose second token head 1 gets right.

  Args:
    net: the model, of the stories' ids.
    some: the stories; every one is read alone, from its beginning.
    rows: stories of one pass.

  Raises:
    ValueError: no name is mentioned twice.
  """
  wanted = some.mentions >= 0
  if not wanted.any():
    raise ValueError(f"no name comes twice in these {len(some)} stories")
  places = np.maximum(some.mentions, 0)
  right = np.take_along_axis(some.tokens, places + 1, 1)
  hits = 0
  for low in range(0, len(some), rows):
    part = np.arange(low, low + rows)
    inside = (part < len(some))[:, None]
    part = part.clip(max=len(some) - 1)  # one shape compiles
    found = choices.first_choices(net, some.tokens[part], places[part])
    hits += (np.asarray(found) == right[part])[wanted[part] & inside].sum()
  return float(hits / wanted.sum())


def pack(some: Stories, *, seq_len: int, reach: int) -> batch_lib.Batch:
  """Stories in rows of T tokens, see `data.rows.whole`."""
  return rows_lib.whole(some.tokens, some.lengths, seq_len=seq_len, reach=reach)


def two_token_names(
  codec: tokenizer_lib.Tokenizer, random: np.random.Generator, count: int
) -> list[str]:
  """Random names that are exactly two tokens behind a word and a space.

  Raises:
    ValueError: this tokenizer has fewer of them.
  """
  pairs = [(b, e) for b in stories.BEGINNINGS for e in stories.ENDINGS]
  before = len(codec.encode("and"))
  found = []
  for i in random.permutation(len(pairs)):
    name = "".join(pairs[i])
    if len(found) < count and len(codec.encode(f"and {name}")) == before + 2:
      found.append(name)
  if len(found) < count:
    raise ValueError(
      f"{len(found)} names are two tokens of this tokenizer, and {count} are "
      "asked for: take a smaller number or another tokenizer"
    )
  return found


def characters(text: str) -> list[str]:
  """The names in a story: words with a capital that are never without one.

  They come twice at least, and once elsewhere than at a sentence's beginning,
  where every word has a capital.
  """
  capitals, inside, small = collections.Counter(), set(), set()
  for match in _WORD.finditer(text):
    word, before = match.group(), text[: match.start()].rstrip()
    if word[0].islower():
      small.add(word)
    elif word[1:].islower():
      capitals[word] += 1
      if before and before[-1] not in '.!?"':
        inside.add(word)
  return [
    word
    for word, count in capitals.items()
    if count > 1 and word in inside and word.lower() not in small
  ]


def renamed(
  texts: Iterable[str],
  codec: tokenizer_lib.Tokenizer,
  names: Sequence[str],
  random: np.random.Generator,
  *,
  count: int = 100,
  seq_len: int = 2048,
) -> Stories:
  """Stories of a corpus, in which characters get names of two tokens.

  A mention counts where it stands behind a space: elsewhere the tokens of a
  name may be others.

  Args:
    texts: a story each; those without a character are left out.
    codec: gives the ids.
    names: from `two_token_names`.
    random: draws a name for each character.
    count: stories to return, the paper's 100.
    seq_len: T: the rest of a longer story is cut off.

  Raises:
    ValueError: fewer stories have characters.
  """
  before = len(codec.encode("and"))
  tokens, mentions = [], []
  for text in texts:
    if len(tokens) == count:
      break
    known = characters(text)
    if not known or len(known) > len(names):
      continue
    drawn = random.choice(len(names), len(known), replace=False)
    new = {old: names[i] for old, i in zip(known, drawn, strict=True)}
    text = _WORD.sub(lambda m, new=new: new.get(m.group(), m.group()), text)
    ids = np.asarray([*codec.prefix, *codec.encode(text)])[:seq_len]
    again = []
    for name in new.values():
      pair = codec.encode(f"and {name}")[before:]
      here = (ids[:-1] == pair[0]) & (ids[1:] == pair[1])
      again += np.flatnonzero(here)[1:].tolist()
    tokens.append(ids.tolist())
    mentions.append(sorted(again))
  if len(tokens) < count:
    raise ValueError(
      f"{len(tokens)} stories have characters that come twice, and {count} are "
      "asked for"
    )
  lengths = np.array([*map(len, tokens)])
  return Stories(
    stories.padded(tokens, 0), lengths, stories.padded(mentions, -1)
  )
