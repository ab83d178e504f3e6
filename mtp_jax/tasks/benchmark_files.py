"""The files of language benchmarks, checked before they are scored.

They are JSONL with the fields of the Hugging Face data sets.

lm-evaluation-harness reads these files itself. Where a line lacks a field, it
ends with a traceback, or counts the line as if it were sound.
"""

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

from mtp_jax.tasks import json_rows

Fields = dict[str, Any]


def check(task: str, path: str | os.PathLike) -> None:
  """Refuses a file with a line that cannot be scored.

  Args:
    task: of `CHECKS`.
    path: the task's file.

  Raises:
    ValueError: the file cannot be read or has no line; or names the first bad
      line, and says how many there are.
  """
  rows, bad = list(json_rows.read(pathlib.Path(path))), []
  if not rows:
    raise ValueError(f"{path} has no line")
  for row in rows:
    fault = row.fault
    if not fault:
      try:
        CHECKS[task](row.fields)
      except json_rows.FAULTS as error:
        fault = json_rows.fault(error)
    if fault:
      bad.append(f"{row.place}: {fault}")
  if bad:
    raise ValueError(
      f"{path}, {bad[0]}; bad lines: {len(bad)} of {len(rows)}. Mend or remove "
      "them"
    )


def _texts(*names: str) -> Callable[[Fields], None]:
  def check(fields):
    for name in names:
      json_rows.text(fields, name)

  return check


def _object(fields: Fields, name: str) -> Fields:
  if not isinstance(fields[name], dict):
    raise ValueError(f"the field {name!r} is {fields[name]!r:.40}, no object")
  return fields[name]


def _list(values: Any, name: str) -> list[str]:
  """A field that has to hold texts, with more than white space."""
  if not isinstance(values, list) or not values:
    raise ValueError(f"the field {name!r} is {values!r:.40}, not a list")
  for value in values:
    json_rows.text({name: value}, name)
  return values


def _answers(values: Any, name: str) -> None:
  """Accepted answers, of which published files leave some blank."""
  if isinstance(values, list) and any(values):
    values = [v for v in values if v != ""]
  _list(values, name)


def _label(fields: Fields, first: int, count: int) -> None:
  """The number of the right choice, which may be written as a text."""
  label = fields["label"]
  is_number = isinstance(label, int | str) and not isinstance(label, bool)
  if not is_number or str(label) not in map(str, range(first, first + count)):
    raise ValueError(
      f"the field 'label' is {label!r:.40}, not {first} to {first + count - 1}"
    )


def _labelled(
  names: tuple[str, ...], choices: tuple[str, ...], first: int
) -> Callable[[Fields], None]:
  """Texts, choices, and the right choice's number, counted from `first`."""

  def check(fields):
    _texts(*names, *choices)(fields)
    _label(fields, first, len(choices))

  return check


def _copa(fields: Fields) -> None:
  _labelled(("premise",), ("choice1", "choice2"), 0)(fields)
  if fields["question"] not in ("cause", "effect"):
    raise ValueError(
      f"the field 'question' is {fields['question']!r:.40}, not 'cause' or "
      "'effect'"
    )


def _arc(fields: Fields) -> None:
  json_rows.text(fields, "question")
  choices = _object(fields, "choices")
  texts = _list(choices["text"], "choices.text")
  labels = _list(choices["label"], "choices.label")
  if len(texts) != len(labels):
    raise ValueError(f"{len(texts)} choices have {len(labels)} labels")
  if fields["answerKey"] not in labels:
    raise ValueError(
      f"the field 'answerKey' is {fields['answerKey']!r:.40}, not one of "
      f"{', '.join(labels)}"
    )


def _hellaswag(fields: Fields) -> None:
  _texts("activity_label", "ctx")(fields)
  _label(fields, 0, len(_list(fields["endings"], "endings")))


def _nq(fields: Fields) -> None:
  json_rows.text(fields, "question")
  _answers(fields["answer"], "answer")


def _triviaqa(fields: Fields) -> None:
  json_rows.text(fields, "question")
  _answers(_object(fields, "answer")["aliases"], "answer.aliases")


def _gsm8k(fields: Fields) -> None:
  json_rows.text(fields, "question")
  if not re.search("#### -?[0-9.,]+", json_rows.text(fields, "answer")):
    raise ValueError("the field 'answer' has no '#### ' before a number")


CHECKS: dict[str, Callable[[Fields], None]] = {
  "arc_challenge": _arc,
  "copa": _copa,
  "gsm8k": _gsm8k,
  "hellaswag": _hellaswag,
  "nq": _nq,
  "piqa": _labelled(("goal",), ("sol1", "sol2"), 0),
  "siqa": _labelled(
    ("context", "question"), ("answerA", "answerB", "answerC"), 1
  ),
  "triviaqa": _triviaqa,
}
