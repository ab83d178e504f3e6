"""Children's stories of named characters, written by chance.

Words and marks are tokens, and a name is exactly two: a beginning and an
ending, of which every pair is a name. Stories of a corpus take their names
from a pool of it, so that a beginning tells little of the ending, and other
pairs are left for tests: their endings are known only from earlier mentions.
"""

import dataclasses
import functools

import numpy as np

BOS, EOS = 0, 1
_SPECIAL = ("<bos>", "<eos>")
BEGINNINGS = tuple(
  first + vowel + last
  for first in ("B", "D", "F", "K", "L", "M", "P", "R", "S", "T")
  for vowel in "aio"
  for last in ("l", "n")
)
ENDINGS = tuple(
  first + vowel + last
  for first in ("b", "d", "f", "g", "k", "m", "p", "r", "t", "z")
  for vowel in "aeo"
  for last in ("", "x")
)
# What a slot is filled with; a, b and c are characters, it is the thing.
_WORDS = {
  "thing": "ball kite boat drum lamp cake coin shell hat map bell key book "
  "doll spoon box ring cup rope flag",
  "place": "park garden forest river beach farm market school hill house lake "
  "cave bridge barn meadow tower",
  "animal": "dog cat bird fox rabbit frog horse duck owl bear mouse goat",
  "look": "big little red blue green old new shiny soft round funny golden "
  "tiny heavy",
  "mood": "happy sad angry tired scared proud brave kind shy curious sleepy "
  "surprised",
  "go": "walked ran jumped danced hurried climbed",
  "do": "play sing draw swim dance cook read hide",
  "time": "day morning evening night summer winter",
  "kin": "mother father sister brother friend grandma",
}
_OPENINGS = """
One {time} {a} and {b} went to the {place} .
Once there was a {mood} child named {a} . {a} had a {kin} named {b} .
{a} lived near the {place} with {b} and a {look} {animal} .
Once there was a {look} {animal} named {a} . The best friend of {a} was {b} .
On a {look} {time} {a} met {b} at the {place} .
"""
_EVENTS = """
{a} found a {look} {it} in the {place} .
{a} wanted to {do} , but {b} was too {mood} .
" Look at the {it} , {b} ! " said {a} .
{b} {go} to the {place} and saw a {look} {animal} .
{a} gave the {it} to {b} , and {b} was {mood} .
The {animal} took the {it} and {go} away .
" Do not be {mood} , " said {b} to {a} .
{a} and {b} {go} to the {place} to {do} .
{a} was {mood} because the {it} was lost .
{b} asked {a} , " Can we {do} with the {it} ? "
A {mood} {animal} came to {a} and {b} .
The {kin} of {a} told {b} to {do} at the {place} .
{b} put the {it} in a {look} {thing} .
" I like your {look} {it} , {a} , " said the {animal} .
{a} {go} home , but {b} stayed at the {place} .
When it was {time} , {a} looked for {b} in the {place} .
{b} helped {a} to find the {thing} .
They shared the {it} , and {a} felt {mood} .
The {animal} and {a} {go} over the {place} .
" Where is {b} ? " asked the {kin} of {a} .
"""
_VISITS = """
Then {c} came to the {place} .
{c} gave a {look} {thing} to {a} .
" Let us {do} , {c} ! " said {b} .
{a} told {c} about the {look} {it} .
{c} was {mood} , so {b} {go} to {c} .
"""
_ENDINGS = """
In the end {a} and {b} were {mood} and went home .
{a} thanked {b} , and they were friends from that {time} on .
That {time} {b} learned to be {mood} , and {a} smiled .
{a} hugged {b} and said , " You are my best friend . "
"""
_PARTS = (_OPENINGS, _EVENTS, _VISITS, _ENDINGS)


@dataclasses.dataclass(frozen=True)
class Stories:
  """Stories as ids, and where names come again.

  Attributes:
    tokens: [count, L] int32, from bos to eos; 0 behind.
    lengths: [count].
    mentions: [count, M]: places of the first token of a name that the story
      has had before; -1 behind the last.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  mentions: np.ndarray

  def __len__(self) -> int:
    return len(self.lengths)


@functools.cache
def vocabulary() -> tuple[str, ...]:
  """The tokens by id: bos, eos, words, beginnings and endings of names."""
  words = {w for text in _WORDS.values() for w in text.split()}
  for text in _PARTS:
    words |= {w for w in text.split() if "{" not in w}
  # "to" and "fox" are words as well.
  endings = (f"-{ending}" for ending in ENDINGS)
  return (*_SPECIAL, *sorted(words), *BEGINNINGS, *endings)


def names(random: np.random.Generator, count: int) -> np.ndarray:
  """`count` different names: ids [count, 2] of beginning and ending.

  Raises:
    ValueError: more than there are.
  """
  pairs = len(BEGINNINGS) * len(ENDINGS)
  if not 0 <= count <= pairs:
    raise ValueError(f"{count} names: there are {pairs}")
  drawn = random.permutation(pairs)[:count]
  ending = len(vocabulary()) - len(ENDINGS)
  beginning = ending - len(BEGINNINGS)
  first, second = np.divmod(drawn, len(ENDINGS))
  return np.stack([beginning + first, ending + second], 1)


def write(
  random: np.random.Generator,
  count: int,
  pool: np.ndarray,
  *,
  events: tuple[int, int] = (6, 10),
  visitors: int = 1,
) -> Stories:
  """Random stories.

  Args:
    random: the draws.
    count: of stories.
    pool: [names, 2] to draw characters from, as `names` returns them.
    events: least and most sentences between opening and ending.
    visitors: at most so many characters beside the first two.

  Returns:
    `count` stories of about 12 tokens a sentence.

  Example:
    >>> import numpy as np
    >>> from mtp_jax.tasks import stories
    >>> random = np.random.default_rng(0)
    >>> some = stories.write(random, 1, stories.names(random, 9))
    >>> text = stories.read(some.tokens[0])
  """
  openings, happenings, visits, endings = map(_compiled, _PARTS)
  slots = {name: _ids(text.split()) for name, text in _WORDS.items()}
  tokens, mentions = [], []

  def pick(items):
    return items[int(random.random() * len(items))]

  for _ in range(count):
    cast = pool[random.choice(len(pool), 2 + visitors, replace=False)].tolist()
    plot = [pick(openings)]
    for _ in range(random.integers(events[0], events[1] + 1)):
      visit = visitors and random.random() < 0.25
      plot.append(pick(visits if visit else happenings))
    plot.append(pick(endings))
    it, text, seen, again = pick(slots["thing"]), [BOS], set(), []
    for sentence in plot:
      swapped = random.random() < 0.3
      for item in sentence:
        if isinstance(item, int):
          text.append(item)
        elif item == "it":
          text.append(it)
        elif item in slots:
          text.append(pick(slots[item]))
        else:
          who = "abc".index(item)
          if who == 2:
            who += int(random.random() * visitors)
          elif swapped:
            who = 1 - who
          if who in seen:
            again.append(len(text))
          seen.add(who)
          text += cast[who]
    tokens.append([*text, EOS])
    mentions.append(again)
  return Stories(
    padded(tokens, 0), np.array([*map(len, tokens)]), padded(mentions, -1)
  )


def read(tokens: np.ndarray) -> str:
  """Ids as text: names in one piece, words apart."""
  words = vocabulary()
  ending = len(words) - len(ENDINGS)
  text = ""
  for i in tokens.tolist():
    if i >= len(_SPECIAL):
      text += words[i][1:] if i >= ending else " " + words[i]
  return text.strip()


def padded(rows: list[list[int]], value: int) -> np.ndarray:
  """Rows of different lengths as one array, `value` behind each."""
  padded = np.full((len(rows), max(map(len, rows), default=0)), value, np.int32)
  for row, items in zip(padded, rows, strict=True):
    row[: len(items)] = items
  return padded


@functools.cache
def _compiled(text):
  """Sentences as lists of ids, and of the names of slots."""

  def item(word):
    return word[1:-1] if word.startswith("{") else _ids([word])[0]

  return [[*map(item, line.split())] for line in text.strip().splitlines()]


def _ids(words):
  numbers = {word: i for i, word in enumerate(vocabulary())}
  return [numbers[word] for word in words]
