"""What `rouge-score` says of pairs of texts, live or as recorded.

`python -m tests.rouge_reference`, where rouge-score 0.1.2 is installed, writes
`rouge_reference.json`.
"""

import importlib.util
import json
import pathlib
import random

RECORD = pathlib.Path(__file__).with_suffix(".json")
NAMES = ("rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum")
PIECES = ["a ", "b ", "c ", "Dog-1 ", "é ", "x", "\n", "\n\n", ". "]


def pairs() -> list[tuple[str, str]]:
  """(reference, summary): some are empty, all have repeats and ties."""
  draw = random.Random(0)

  def text():
    return "".join(draw.choice(PIECES) for _ in range(draw.randrange(40)))

  return [(text(), text()) for _ in range(100)]


def reference() -> list[dict[str, list[float]]]:
  """For each pair: measure -> precision, recall, F1."""
  if importlib.util.find_spec("rouge_score"):
    return live()
  return json.loads(RECORD.read_text())


def live() -> list[dict[str, list[float]]]:
  """As `reference`, by rouge-score."""
  from rouge_score import rouge_scorer

  scorer = rouge_scorer.RougeScorer(list(NAMES))
  return [
    {name: list(value) for name, value in scorer.score(*pair).items()}
    for pair in pairs()
  ]


def main() -> None:
  """Records every pair."""
  rows = [
    json.dumps({k: [round(x, 9) for x in v] for k, v in row.items()})
    for row in live()
  ]
  RECORD.write_text("[\n" + ",\n".join(rows) + "\n]\n")


if __name__ == "__main__":
  main()
