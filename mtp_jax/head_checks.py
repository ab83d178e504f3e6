"""Checks of the settings of single heads: offsets, weights, stages, detach.

Each raises a ValueError that names the setting, its value and the remedy.
"""


def offsets(given: tuple[int, ...], n_future: int) -> None:
  """Checks `model.offsets`, which may be empty."""
  if given and len(given) != n_future:
    raise ValueError(
      f"model.offsets has {len(given)} entries for model.n_future={n_future}: "
      "give one offset per head, or --config.model.offsets=() for 1 to N"
    )
  if given and (given[0] != 1 or not _ascending(given)):
    raise ValueError(
      f"model.offsets is {given}; it has to ascend from 1, which is head 1's"
    )


def weights(
  given: tuple[float, ...], stages: tuple[float, ...], change: str
) -> None:
  """Checks `train.head_weights`, `head_stages` and `head_change`.

  How many heads there are is not known here; `for_heads` checks that.
  """
  if change != "step" and not stages:
    raise ValueError(
      f"train.head_change is {change!r}, but train.head_stages names no stage "
      "to change at"
    )
  if not _ascending((0, *stages)) or any(share > 1 for share in stages):
    raise ValueError(
      f"train.head_stages is {stages}; shares of train.steps have to ascend "
      "between 0 and 1"
    )
  if any(weight < 0 for weight in given):
    raise ValueError(
      f"train.head_weights is {given}; no weight may be negative"
    )
  count = len(stages) + 1
  if stages and (not given or len(given) % count):
    raise ValueError(
      f"train.head_weights has {len(given)} entries for {count} stages: give "
      "one per head for each stage"
    )
  size = len(given) // count
  rows = (given[size * i : size * (i + 1)] for i in range(count))
  if given and not all(any(row) for row in rows):
    raise ValueError(
      f"train.head_weights is {given}; with every weight 0 nothing is learned: "
      "give at least one a positive weight, in every stage"
    )


def detach(first: int, freeze: str) -> None:
  """Checks `train.detach`."""
  if first == 1:
    raise ValueError(
      "train.detach is 1, so no head would teach the trunk anything: give 2 or "
      "more, or train.freeze='trunk'"
    )
  if first and freeze == "trunk":
    raise ValueError(
      f"train.detach is {first}, but under train.freeze='trunk' no gradient "
      "reaches the trunk anyway: leave one of them out"
    )


def for_heads(
  n_future: int, given: tuple[float, ...], stages: int, first: int
) -> None:
  """Checks weights and `train.detach` against `model.n_future`.

  Args:
    n_future: N.
    given: `train.head_weights`.
    stages: how many they are for.
    first: `train.detach`.
  """
  if given and len(given) != n_future * stages:
    each = f" and {stages} stages" if stages > 1 else ""
    raise ValueError(
      f"train.head_weights has {len(given)} entries for model.n_future="
      f"{n_future}{each}: give one weight per head, or "
      "--config.train.head_weights=() for equal ones"
    )
  if first > n_future:
    raise ValueError(
      f"train.detach={first} but model.n_future={n_future}: no head is held "
      "back; leave it out, or name a head that the model has"
    )


def _ascending(values: tuple[float, ...]) -> bool:
  return all(a < b for a, b in zip(values, values[1:], strict=False))
