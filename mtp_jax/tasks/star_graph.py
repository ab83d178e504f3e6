"""Paths in star graphs, whose first step only looking ahead can tell.

G(d, l) has a centre, from which d arms lead, each a path of l nodes with the
centre. A document lists all edges in random order, then centre and goal, the
end of one arm, then the path to it:

  oT,kc,Ta,ok:oa=Ta.

Behind the first step every node of the path follows from the node before it
and the list of edges. The first step has d candidates, and only the goal at
the path's other end tells them apart.

Reference: Bachmann and Nagarajan 2024, The Pitfalls of Next-Token Prediction
(arXiv 2403.06963). How they write a graph as text is not copied: nodes here
are letters and digits, each one token, and a path is written without its
centre.
"""

import dataclasses
import string

import numpy as np

from mtp_jax.data import batch as batch_lib
from mtp_jax.evaluate import choices
from mtp_jax.model import model

# The names of nodes: one byte each, so the byte tokenizer reads the documents.
NAMES = string.ascii_letters + string.digits
VOCAB = 128  # every byte of a document is below


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape G(d, l) of a star graph.

  Raises:
    ValueError: no such graph, or more nodes than `NAMES`.
  """

  degree: int  # d: arms
  length: int  # l: nodes of an arm, the centre included
  names: int = len(NAMES)  # the nodes of a graph are named by some of so many

  def __post_init__(self):
    if self.degree < 2 or self.length < 2:
      raise ValueError(
        f"G({self.degree},{self.length}) has no path to choose: take 2 arms or "
        "more, of 2 nodes or more"
      )
    if not self.nodes <= self.names <= len(NAMES):
      raise ValueError(
        f"G({self.degree},{self.length}) has {self.nodes} nodes, and "
        f"{self.names} names: it takes as many names as nodes or more, up to "
        f"{len(NAMES)}"
      )

  @property
  def nodes(self) -> int:
    """Nodes of the graph."""
    return self.degree * (self.length - 1) + 1

  @property
  def steps(self) -> int:
    """Nodes of the path that a model writes: all but the centre."""
    return self.length - 1

  @property
  def prompt(self) -> int:
    """Tokens before the path."""
    return 3 * self.degree * self.steps + 3

  @property
  def tokens(self) -> int:
    """Tokens of a document, its full stop included."""
    return self.prompt + self.steps + 1


def draw(shape: Shape, count: int, rng: np.random.Generator) -> np.ndarray:
  """Draws documents: int32 [count, shape.tokens], bytes as token ids.

  Example:
    >>> rng = np.random.default_rng(0)
    >>> bytes(draw(Shape(2, 3), 1, rng)[0].tolist()).decode()
    'ld,ln,du,nc:lu=du.'
  """
  names = np.frombuffer(NAMES[: shape.names].encode(), np.uint8)
  order = rng.random((count, shape.names)).argsort(1)[:, : shape.nodes]
  nodes = names[order]  # the centre, then arm after arm; the first has the goal
  arms = nodes[:, 1:].reshape(count, shape.degree, shape.steps)
  centres = np.broadcast_to(nodes[:, :1, None], (count, shape.degree, 1))
  starts = np.concatenate([centres, arms[..., :-1]], 2)
  edges = np.stack([starts, arms, np.full_like(arms, ord(","))], -1)
  edges = edges.reshape(count, -1, 3)
  shuffled = rng.random(edges.shape[:2]).argsort(1)
  edges = np.take_along_axis(edges, shuffled[..., None], 1)
  edges = edges.reshape(count, -1)
  edges[:, -1] = ord(":")
  ends = nodes[:, :1], arms[:, 0, -1:]
  signs = (np.full((count, 1), ord(sign), np.uint8) for sign in "=.")
  equals, stop = signs
  parts = [edges, *ends, equals, arms[:, 0], stop]
  return np.concatenate(parts, 1).astype(np.int32)


def batch(
  documents: np.ndarray, shape: Shape, n_future: int
) -> batch_lib.Batch:
  """A training batch: only the path, with its full stop, weighs in the loss.

  Args:
    documents: [B, shape.tokens] from `draw`.
    shape: of their graphs.
    n_future: N.

  Returns:
    Windows of T+N tokens with T = shape.tokens - 1: documents, then padding
    that belongs to none.
  """
  more = ((0, 0), (0, n_future - 1))
  tokens = np.pad(documents, more)
  segments = np.pad(np.ones_like(documents), more)
  weight = np.zeros(tokens.shape, np.float32)
  weight[:, shape.prompt : shape.tokens] = 1
  return batch_lib.of(tokens, segments, weight)


def accuracy(
  net: model.Model, documents: np.ndarray, shape: Shape
) -> dict[str, float]:
  """How often greedy decoding writes the right path.

  Greedy decoding writes the whole path if and only if head 1's first choice is
  right at each of its tokens behind the right ones before it. So one pass over
  the documents tells it, without decoding.

  Args:
    net: the model.
    documents: [B, shape.tokens] from `draw`, none of which were trained on.
    shape: of their graphs.

  Returns:
    `first`: share of documents whose first step is right. A guess among the
    arms has 1 / degree.
    `path`: share whose every step is right.
  """
  path = documents[:, shape.prompt : -1]
  before = shape.prompt - 1 + np.arange(shape.steps)  # each step's last token
  chosen = choices.first_choices(
    net, documents, np.broadcast_to(before, path.shape)
  )
  correct = np.asarray(chosen) == path
  return {
    "first": float(correct[:, 0].mean()),
    "path": float(correct.all(1).mean()),
  }
