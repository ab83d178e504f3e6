"""Small Python functions, described in words: to learn from, and to write.

A function takes a number or a list of numbers through one to three steps. Its
docstring names the steps and shows two examples; hidden tests call it with
other values. Models of a few million parameters that read bytes learn to write
some of them. A held-out sequence of steps never occurs in a document: of every
eight, chosen by a checksum, one is held out. A document may still have other
steps that amount to the same function, such as the same two in another order.

  def f(x):
    \"\"\"Adds 3, then multiplies by 2.

    (two calls with their values, as doctest shows them: f(1) is 8)
    \"\"\"
    x = x + 3
    x = x * 2
    return x
"""

import dataclasses
import zlib
from collections.abc import Iterator

import numpy as np

from mtp_jax.tasks import code, pairs

# Words and Python of each step; # is a number from 2 to 9.
_NUMBER = {
  "adds #": "x + #",
  "subtracts #": "x - #",
  "multiplies by #": "x * #",
  "divides by #, rounded down": "x // #",
  "takes the remainder by #": "x % #",
  "takes # if that is larger": "max(x, #)",
  "takes # if that is smaller": "min(x, #)",
  "subtracts from #": "# - x",
  "negates": "-x",
  "squares": "x * x",
  "takes the absolute value": "abs(x)",
}
_LIST = {
  "adds # to each": "[y + # for y in x]",
  "multiplies each by #": "[y * # for y in x]",
  "keeps those above #": "[y for y in x if y > #]",
  "keeps those below #": "[y for y in x if y < #]",
  "keeps the even ones": "[y for y in x if y % 2 == 0]",
  "keeps the odd ones": "[y for y in x if y % 2 == 1]",
  "keeps the first #": "x[:#]",
  "drops the first": "x[1:]",
  "sorts": "sorted(x)",
  "reverses": "x[::-1]",
  "squares each": "[y * y for y in x]",
}
_LAST = {"counts them": "len(x)", "sums them": "sum(x)"}  # of a list
_HELD_OUT = 8  # one of so many


@dataclasses.dataclass(frozen=True)
class Function:
  """A function: its steps in words and in Python, and values to call it with.

  Values are Python source; the first two are the docstring's examples.
  """

  words: tuple[str, ...]
  steps: tuple[str, ...]
  values: tuple[str, ...]

  @property
  def held_out(self) -> bool:
    """Whether it may be a problem; else it may be a document."""
    return zlib.crc32("; ".join(self.words).encode()) % _HELD_OUT == 0

  @property
  def body(self) -> str:
    """The lines after the docstring."""
    return "".join(f"  x = {step}\n" for step in self.steps) + "  return x\n"

  @property
  def prompt(self) -> str:
    """The lines up to the docstring's end."""
    text = ", then ".join(self.words)
    examples = "".join(
      f"  >>> f({value})\n  {self(value)}\n" for value in self.values[:2]
    )
    return f'def f(x):\n  """{text.capitalize()}.\n\n{examples}  """\n'

  def __call__(self, value: str) -> str:
    """What it returns for a value, as Python writes it."""
    x = eval(value)
    for step in self.steps:
      x = eval(step, {"x": x})
    return repr(x)

  def pair(self) -> pairs.Pair:
    """The function as a prompt and its answer."""
    return pairs.Pair(self.prompt, self.body)

  def problem(self) -> code.Problem:
    """The function as a problem, tested on the values that it does not show."""
    tests = (f"assert f({v}) == {self(v)}\n" for v in self.values[2:])
    return code.Problem(
      name="; ".join(self.words),
      prompt=self.prompt,
      before=self.prompt,
      stops=("\ndef", "\n#", "\nclass", "\nif", "\nprint"),
      tests="".join(tests),
      solution=self.body,
    )


def documents(count: int, seed: int = 0) -> Iterator[pairs.Pair]:
  """Functions to learn from; `pairs.write` makes the file of a run.

  Example:
    >>> from mtp_jax.tasks import functions
    >>> pair, = functions.documents(1)
    >>> pair.prompt.startswith("def f(x):")
    True

  Args:
    count: of functions. The same steps may occur again, with other examples.
    seed: of the draw.
  """
  rng = np.random.default_rng([0, seed])
  while count:
    function = draw(rng)
    if not function.held_out:
      count -= 1
      yield function.pair()


def problems(count: int, seed: int = 0) -> list[code.Problem]:
  """Different held-out functions as problems.

  A function whose hidden answers are all alike is left out: a constant would
  pass.

  Args:
    count: of problems, up to 2,000.
    seed: of the draw.

  Raises:
    ValueError: count is outside 1..2000.
  """
  if not 1 <= count <= 2000:
    raise ValueError(f"{count} problems: give 1 to 2000")
  rng, found = np.random.default_rng([1, seed]), {}
  while len(found) < count:
    function = draw(rng)
    if not function.held_out or function.words in found:
      continue
    if len({function(value) for value in function.values[2:]}) > 1:
      found[function.words] = function.problem()
  return list(found.values())


def draw(rng: np.random.Generator) -> Function:
  """A function, held out or not."""
  of_list = rng.random() < 0.5
  count = int(rng.integers(1, 4))
  kinds = [_LIST if of_list else _NUMBER] * count
  if of_list and rng.random() < 0.3:
    kinds[-1] = _LAST
  words, steps = [], []
  for kind in kinds:
    text = list(kind)[rng.integers(len(kind))]
    number = str(rng.integers(2, 10))
    words.append(text.replace("#", number))
    steps.append(kind[text].replace("#", number))
  values = {}  # all different
  while len(values) < 8:
    size = rng.integers(3, 7)
    value = (
      rng.integers(0, 12, size).tolist() if of_list else rng.integers(-9, 30)
    )
    values[str(value)] = None
  return Function(tuple(words), tuple(steps), tuple(values))
