"""Arithmetic of polynomials over F_7 modulo X^5 (paper, section 4.2).

An element of the ring is its five coefficients, from 0 to 6, of X^0 first.
A document is an expression, an equality sign and its value:

  ((12034*50021)+(-11111))=42623

The paper says what the ring and its operations are, and that pause tokens
stand between question and equality sign. The text is our decision: a byte is a
token, an operand is its five digits, every operation has brackets, `@` is
composition (f@g is f of g) and `.` is a pause token. So is the shape of an
expression: an operation is drawn uniformly from the four, and the operations
below a binary one are divided between its operands uniformly.
"""

import dataclasses

import numpy as np

from mtp_jax.data import batch as batch_lib
from mtp_jax.data import rows as rows_lib
from mtp_jax.evaluate import choices
from mtp_jax.model import model
from mtp_jax.tokenizer import byte_ids

P = 7  # coefficients are taken modulo P
TERMS = 5  # coefficients of an element
PAUSE = "."
FRAME = 3 + TERMS  # tokens of a document beside question and pauses
_BINARY = "+*@"  # operations 1, 2, 3; negation is 0
# Symbols that are still to be written, on a stack; a number from 0 on stands
# for an expression of so many operations.
_CLOSE = -1  # ")"; operation k is _CLOSE - k


def add(f: np.ndarray, g: np.ndarray) -> np.ndarray:
  """f + g, of coefficients [..., 5], as uint8."""
  return (_digits(f) + _digits(g)) % P


def negate(f: np.ndarray) -> np.ndarray:
  """-f, of coefficients [..., 5], as uint8."""
  return (P - _digits(f)) % P


def multiply(f: np.ndarray, g: np.ndarray) -> np.ndarray:
  """f times g modulo X^5, of coefficients [..., 5], as uint8."""
  return _product(_digits(f), _digits(g))


def compose(f: np.ndarray, g: np.ndarray) -> np.ndarray:
  """f(g(X)) modulo X^5, of coefficients [..., 5], as uint8.

  f is the polynomial of degree below 5, not its class modulo X^5: where g has
  a constant term the two differ.
  """
  f, g = _digits(f), _digits(g)
  found = np.zeros(np.broadcast_shapes(f.shape, g.shape), np.uint8)
  for i in reversed(range(TERMS)):  # Horner's scheme
    found = _product(found, g)
    found[..., 0] = (found[..., 0] + f[..., i]) % P
  return found


def _digits(f) -> np.ndarray:
  return (np.asarray(f) % P).astype(np.uint8)


def _product(f, g) -> np.ndarray:
  found = np.zeros(np.broadcast_shapes(f.shape, g.shape), np.uint8)
  for i in range(TERMS):  # at most 5 * 36, in a byte
    found[..., i:] += f[..., i : i + 1] * g[..., : TERMS - i]
  return found % P


@dataclasses.dataclass(frozen=True)
class Expressions:
  """Expressions and their values.

  Attributes:
    text: [count, L] uint8, ASCII; 0 behind the end of each.
    lengths: [count] characters of each.
    values: [count, 5] uint8, coefficients.
  """

  text: np.ndarray
  lengths: np.ndarray
  values: np.ndarray

  def __len__(self) -> int:
    return len(self.lengths)

  def strings(self) -> list[str]:
    """The expressions, without their values."""
    return [
      bytes(row[:length]).decode()
      for row, length in zip(self.text, self.lengths, strict=True)
    ]


def draw(
  random: np.random.Generator, operations: np.ndarray | list[int]
) -> Expressions:
  """Random expressions, all of them together.

  Args:
    random: the draws.
    operations: [count] m of each, at least 0.

  Returns:
    `count` expressions; six million characters per second or more on one core.

  Raises:
    ValueError: a negative number of operations.

  Example:
    >>> import numpy as np
    >>> from mtp_jax.tasks import arithmetic
    >>> found = arithmetic.draw(np.random.default_rng(0), [1, 2])
    >>> [text.count("(") for text in found.strings()]
    [1, 2]
  """
  operations = np.asarray(operations, np.int64)
  if (operations < 0).any():
    raise ValueError(f"{operations.min()} operations: give 0 or more")
  count, most = len(operations), int(operations.max(initial=0))
  # One row of each per expression, and the place in it that comes next, both
  # in one axis: NumPy indexes it much faster than two.
  text = _Rows(count, 8 * most + TERMS, np.uint8)
  todo = _Rows(count, 3 * most + 1, np.int16)
  opened = _Rows(count, most + 1, np.int8)  # operations without their ")"
  values = _Rows(count, most + 1, np.uint8, TERMS)
  todo.push(np.arange(count), operations)
  live = np.arange(count)
  while live.size:
    top = todo.pop(live)

    leaf = live[top == 0]
    digits = random.integers(0, P, (len(leaf), TERMS), np.uint8)
    values.push(leaf, digits)
    for digit in (digits + ord("0")).T:
      text.push(leaf, digit)

    node, below = live[top > 0], top[top > 0] - 1
    kind = random.integers(0, 1 + len(_BINARY), len(node), np.int8)
    opened.push(node, kind)
    text.push(node, ord("("))
    todo.push(node, _CLOSE)
    one, two = kind == 0, kind > 0
    text.push(node[one], ord("-"))
    todo.push(node[one], below[one])
    left = random.integers(0, below[two] + 1, dtype=np.int16)
    todo.push(node[two], below[two] - left)
    todo.push(node[two], _CLOSE - kind[two])
    todo.push(node[two], left)

    operator = top < _CLOSE
    symbols = np.frombuffer(_BINARY.encode(), np.uint8)
    text.push(live[operator], symbols[-2 - top[operator]])

    closed = live[top == _CLOSE]
    text.push(closed, ord(")"))
    kind = opened.pop(closed)
    some = closed[kind == 0]
    values.push(some, negate(values.pop(some)))
    for k, operation in enumerate((add, multiply, compose), 1):
      some = closed[kind == k]
      right = values.pop(some)
      values.push(some, operation(values.pop(some), right))

    live = live[todo.sizes(live) > 0]
  everything = np.arange(count)
  lengths = text.sizes(everything)
  return Expressions(
    text.values.reshape(count, -1), lengths, values.pop(everything)
  )


class _Rows:
  """`count` stacks of `size` items each, in one array."""

  def __init__(self, count, size, dtype, *item):
    self.values = np.zeros((count * size, *item), dtype)
    self._first = np.arange(count) * size
    self._next = self._first.copy()

  def push(self, rows, items):
    places = self._next[rows]
    self.values[places] = items
    self._next[rows] = places + 1

  def pop(self, rows):
    places = self._next[rows] - 1
    self._next[rows] = places
    return self.values[places]

  def sizes(self, rows):
    return self._next[rows] - self._first[rows]


def documents(found: Expressions, pauses: int = 0) -> list[str]:
  """Expressions as text: question, pause tokens, equality sign, answer."""
  return [
    question + PAUSE * pauses + "=" + "".join(map(str, value.tolist()))
    for question, value in zip(found.strings(), found.values, strict=True)
  ]


def tokenise(
  found: Expressions, pauses: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """Documents as ids of bytes: [bos, question, pauses, '=', answer, eos].

  Returns:
    tokens [count, L] int32, 0 behind the end; the place [count] of each '='.
  """
  bytes_ = byte_ids.Bytes
  longest = found.text.shape[1]
  tokens = np.zeros((len(found), longest + pauses + FRAME), np.int32)
  tokens[:, 0] = bytes_.bos
  tokens[:, 1 : 1 + longest] = found.text
  end = found.lengths[:, None] + 1
  each = np.arange(len(found))[:, None]
  tokens[each, end + np.arange(pauses)] = ord(PAUSE)
  tail = np.full((len(found), TERMS + 2), ord("0"), np.int32)
  tail[:, 0], tail[:, -1] = ord("="), bytes_.eos
  tail[:, 1:-1] += found.values
  tokens[each, end + pauses + np.arange(TERMS + 2)] = tail
  return tokens, end[:, 0] + pauses


def pack(
  found: Expressions,
  pauses: int = 0,
  *,
  seq_len: int,
  reach: int,
  answers_only: bool = False,
) -> batch_lib.Batch:
  """Documents in rows of T tokens, see `data.rows.whole`.

  Args:
    found: the expressions.
    pauses: pause tokens of each.
    seq_len: T, at least the longest document.
    reach: tokens after each row's documents, see `data.pipeline.Batching`.
    answers_only: only answer and end are learnt, not the question.

  Returns:
    Rows [R, T + reach].
  """
  tokens, equals = tokenise(found, pauses)
  weight = None
  if answers_only:
    weight = np.arange(tokens.shape[1]) > equals[:, None]
  lengths = equals + TERMS + 2
  return rows_lib.whole(tokens, lengths, weight, seq_len=seq_len, reach=reach)


def exact_match(
  net: model.Model, found: Expressions, pauses: int = 0, *, rows: int = 500
) -> np.ndarray:
  """Whether the greedy answer to each question is its value.

  Equals writing five tokens with `mtp_jax.generate` behind each question, at
  the cost of one pass, see `evaluate.choices`.

  Args:
    net: the model, of bytes.
    found: the expressions.
    pauses: pause tokens of each question.
    rows: expressions of one pass.

  Returns:
    [count] bool.
  """
  tokens, equals = tokenise(found, pauses)
  longest = -(-tokens.shape[1] // 16) * 16  # few shapes compile
  tokens = np.pad(tokens, ((0, 0), (0, longest - tokens.shape[1])))
  places = equals[:, None] + np.arange(TERMS)
  right = np.take_along_axis(tokens, places + 1, 1)
  hits = []
  for low in range(0, len(found), rows):
    some = np.arange(low, low + rows).clip(max=len(found) - 1)
    written = choices.first_choices(net, tokens[some], places[some])
    hits.append((np.asarray(written) == right[some]).all(1))
  return np.concatenate(hits)[: len(found)]
