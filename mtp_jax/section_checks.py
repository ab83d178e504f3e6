"""Checks of fields of a config section that depend on each other.

Each raises a ValueError that names the setting, its value and the remedy.
"""

import pathlib

from mtp_jax import fields


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


def rope(model, kinds: tuple[str, ...]) -> None:
  """Checks the rotary numbers of a `sections.Model` of one of these kinds."""
  kind = f"model.rope_scaling is {model.rope_scaling!r}"
  fields.one_of("model.rope_scaling", model.rope_scaling, kinds)
  if model.rope_scaling == "none" and model.rope_factor != 1:
    raise ValueError(
      f"model.rope_factor is {model.rope_factor}, but {kind}: name a kind of "
      f"scaling, one of {', '.join(kinds[1:])}"
    )
  if model.rope_factor < 1:
    raise ValueError(
      f"model.rope_factor is {model.rope_factor}; it must be at least 1"
    )
  if model.rope_scaling not in ("none", "linear") and not model.rope_length:
    raise ValueError(
      f"{kind}, which needs model.rope_length, the tokens of the context "
      "before scaling"
    )
  if model.rope_scaling == "dynamic" and model.channels < 4:
    raise ValueError(f"{kind}, which needs at least 4 channels per head")
  between = model.rope_scaling in ("llama3", "yarn")
  if between and model.rope_slow >= model.rope_fast:
    raise ValueError(
      f"model.rope_slow {model.rope_slow} is not below model.rope_fast "
      f"{model.rope_fast}"
    )


def prompt(data) -> None:
  """Checks that a `sections.Data` has a prompt if it needs one."""
  if data.loss_on == "answer" and not data.prompt:
    raise ValueError(
      "data.loss_on is 'answer', but data.prompt is empty: name the JSONL "
      "field of the prompts, or set data.loss_on to 'all'"
    )
  if data.prompt and data.source != "jsonl":
    raise ValueError(
      f"data.prompt is {data.prompt!r}, but data.source is {data.source!r}, "
      "whose documents have no fields: set data.source to 'jsonl'"
    )
  if data.prompt and data.prompt == data.field:
    raise ValueError(
      f"data.prompt and data.field are both {data.field!r}: name the field "
      "of the answer in data.field"
    )


def paths(data) -> None:
  """Checks the paths of a `sections.Data`; they may begin with `~`."""
  for name in ("tokenizer", "cache"):
    if not getattr(data, name):
      raise ValueError(f"data.{name} is empty; leave it out for its default")
  for name in ("path", "tokenizer", "cache"):
    value = getattr(data, name)
    try:
      pathlib.Path(value).expanduser()
    except RuntimeError as error:  # ~nobody
      raise ValueError(f"data.{name} is {value!r}: {error}") from error


def _ascending(values: tuple[float, ...]) -> bool:
  return all(a < b for a, b in zip(values, values[1:], strict=False))
