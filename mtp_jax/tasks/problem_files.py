"""The public files of programming problems, read.

Each file is JSONL or a JSON array, plain or .gz, with the fields of its
publication. What a problem lacks or has wrong is reported by line; such a
problem is left out, and counted.

HumanEval (Chen et al. 2021): the model reads `prompt`, without white space at
its end, whose tokens would cut a word in two (our decision). Texts end before
the stop sequences of that paper.
MBPP (Austin et al. 2021): three solved problems come first, tasks 2 to 4, and
tasks 11 to 510 are tested. Where a file has none of these, none come first and
all are tested (our decision).
APPS (Hendrycks et al. 2021): question and answer in that paper's form. Which
form Gloeckle et al. used is not known.
CodeContests (Li et al. 2022), which is published as protocol buffers: a JSONL
of the same fields. The description stands in a docstring; before it,
`pairs.conditioned` asks for a correct solution, after appendix F of the paper
(both our decisions).
"""

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from mtp_jax.tasks import code, json_rows, pairs


@dataclasses.dataclass(frozen=True)
class File:
  """A file's sound problems, and what is wrong with the others."""

  problems: list[code.Problem]
  bad: list[str]  # a line each, which names the problem


def read(task: str, path: str | pathlib.Path, group: str | None = None) -> File:
  """Reads a task's file.

  Args:
    task: of `TASKS`.
    path: JSONL or a JSON array, or .gz of it.
    group: keep only these problems, such as 'introductory' of APPS.

  Raises:
    ValueError: an unknown task; the file cannot be read; no problem is sound,
      or none is of this group.
  """
  if task not in TASKS:
    raise ValueError(f"task {task!r}: choose one of {', '.join(TASKS)}")
  problems, seen = [], set()
  rows = list(json_rows.read(pathlib.Path(path)))
  bad = [f"{row.place}: {row.fault}" for row in rows if row.fault]
  rows = [row for row in rows if not row.fault]
  make, shots = TASKS[task], None
  if task == "mbpp":
    shots, faults = _shots([row.fields for row in rows])
    bad += faults
  for row in rows:
    name = row.place
    try:
      name = f"{name} ({_name(task, row.fields)})"
      problem = make(row.fields, shots)
      if problem is None:
        continue
      _check(problem, seen)
    except json_rows.FAULTS as error:
      bad.append(f"{name}: {json_rows.fault(error)}")
    else:
      problems.append(problem)
  if group is not None:
    groups = sorted({p.group for p in problems})
    problems = [p for p in problems if p.group == group]
    if not problems:
      raise ValueError(f"{path} has no problem of {group!r}; it has {groups}")
  if not problems:
    first = f"; {bad[0]}" if bad else ""
    raise ValueError(f"{path} has no sound problem of {task}{first}")
  return File(problems, bad)


def solutions(path: str | pathlib.Path) -> Iterator[pairs.Pair]:
  """The Python solutions of CodeContests, to finetune on; see `pairs.write`.

  Correct and incorrect ones, each after the problem and a line that says which
  it is (`pairs.conditioned`): reward conditioning, appendix F of the paper.

  Args:
    path: the file of the train split, as of `read`.

  Raises:
    ValueError: a line is damaged or lacks a field; names file and line.
  """
  kinds = (True, "solutions"), (False, "incorrect_solutions")
  for row in json_rows.read(pathlib.Path(path)):
    try:
      if row.fault:
        raise ValueError(row.fault)
      found = [
        pairs.Pair(_contest(row.fields, correct), f"{text.strip()}\n")
        for correct, field in kinds
        for text in _python(row.fields[field])
      ]
    except json_rows.FAULTS as error:
      raise ValueError(
        f"{path}, {row.place}: {json_rows.fault(error)}: mend or remove it"
      ) from error
    yield from found


_KNOWN = 5  # solutions of a problem that are read, at most


def _check(problem: code.Problem, seen: set[str]) -> None:
  """Raises ValueError where a problem could never be solved, or is double."""
  if problem.name in seen:
    raise ValueError("the name is that of an earlier problem")
  if not problem.prompt.strip():
    raise ValueError("the prompt is empty")
  if not problem.tests:
    raise ValueError("it has no tests")
  if isinstance(problem.tests, str):
    try:
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile(problem.tests, "tests", "exec")
    except (SyntaxError, ValueError) as error:
      raise ValueError(f"its tests do not compile: {error}") from error
  elif not all(isinstance(x, str) for pair in problem.tests for x in pair):
    raise ValueError("an input or output is not a text")
  seen.add(problem.name)


def _name(task: str, row: dict) -> str:
  field = {"apps": "problem_id", "codecontests": "name"}.get(task, "task_id")
  if field not in row:
    raise KeyError(field)
  return str(row[field])


def _humaneval(row: dict, shots: str) -> code.Problem:
  return code.Problem(
    name=_name("humaneval", row),
    prompt=json_rows.text(row, "prompt").rstrip(),
    before=row["prompt"],
    stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    tests=f"{json_rows.text(row, 'test')}\n"
    f"check({json_rows.text(row, 'entry_point')})\n",
    solution=json_rows.text(row, "canonical_solution"),
  )


_SHOTS, _TESTED = range(2, 5), range(11, 511)


def _shots(rows: list[dict]) -> tuple[str | None, list[str]]:
  """The solved problems before every prompt, and what is wrong with others.

  None: the file lacks them, or has nothing else, and all problems are tested.
  """
  known = {repr(row.get("task_id")): row for row in rows}
  some = [i for i in _SHOTS if repr(i) in known]
  if not some or not any(repr(i) in known for i in _TESTED):
    return None, []
  texts, faults = [], []
  for i in some:
    row = known[repr(i)]
    try:
      texts.append(_mbpp_question(row) + row["code"] + "\n[DONE]\n\n")
    except json_rows.FAULTS as error:
      fault = json_rows.fault(error)
      faults.append(f"task {i}, a solved problem to show: {fault}")
  return "".join(texts), faults


def _mbpp_question(row: dict) -> str:
  text = json_rows.text(row, "text" if "text" in row else "prompt")
  tests = "\n".join(row["test_list"])
  return (
    f"You are an expert Python programmer, and here is your task: {text} "
    f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
  )


def _mbpp(row: dict, shots: str | None) -> code.Problem | None:
  if shots is not None and row["task_id"] not in _TESTED:
    return None
  # The sanitised file has its imports in a list.
  before = [row.get("test_setup_code", ""), *row.get("test_imports", [])]
  return code.Problem(
    name=_name("mbpp", row),
    prompt=f"{shots or ''}{_mbpp_question(row)}",
    before="",
    stops=("[DONE]",),
    tests="\n".join([*filter(None, before), *row["test_list"]]) + "\n"
    if row["test_list"]
    else "",
    solution=json_rows.text(row, "code"),
  )


# A method of class Solution, or a function. APPS wraps some outputs in a list.
_CALL = """
try: _call = Solution().{name}
except NameError: _call = {name}
def _plain(x):
  return [_plain(y) for y in x] if isinstance(x, (list, tuple)) else x
"""


def _apps(row: dict, shots: str | None) -> code.Problem:
  cases, solutions = json.loads(row["input_output"]), row["solutions"]
  solutions = json.loads(solutions) if solutions else []
  name, starter = cases.get("fn_name"), row.get("starter_code")
  starter = f"\n{starter}" if starter else ""
  examples = list(zip(cases["inputs"], cases["outputs"], strict=True))
  if name:
    asserts = (
      f"_got = _plain(_call(*{args!r}))\n"
      f"assert _got == {out!r} or [_got] == {out!r}\n"
      for args, out in examples
    )
    tests = _CALL.format(name=name) + "".join(asserts) if examples else ""
  else:
    tests = tuple((_text(a), _text(b)) for a, b in examples)
  kind = "Call-Based" if name else "Standard Input"
  return code.Problem(
    name=_name("apps", row),
    prompt=f"\nQUESTION:\n{json_rows.text(row, 'question')}{starter}\n"
    f"Use {kind} format\nANSWER:\n",
    before="",
    stops=("\nQUESTION:", "\nANSWER:"),
    tests=tests,
    solution=solutions[0] if solutions else None,
    others=tuple(solutions[1:_KNOWN]),
    group=row.get("difficulty", ""),
  )


def _text(value: str | list[str]) -> str:
  """A file's text, which APPS sometimes keeps as a list of lines."""
  return "\n".join(value) if isinstance(value, list) else value


_PYTHON_3 = 3  # of the enumeration of languages in CodeContests


def _contest(row: dict, correct: bool) -> str:
  """What stands before a solution that is `correct` or not."""
  prompt = f'"""\n{json_rows.text(row, "description").strip()}\n"""\n'
  return pairs.conditioned(prompt, correct)


def _python(known: dict) -> list[str]:
  """The solutions in Python 3 of one of a problem's lists of solutions."""
  both = zip(known["language"], known["solution"], strict=True)
  return [text for kind, text in both if kind in (_PYTHON_3, "PYTHON3")]


def _codecontests(row: dict, shots: str | None) -> code.Problem:
  tests = []
  for kind in ("public_tests", "private_tests", "generated_tests"):
    if kind == "public_tests" or kind in row:
      tests += zip(row[kind]["input"], row[kind]["output"], strict=True)
  known = _python(row.get("solutions", {"language": [], "solution": []}))
  return code.Problem(
    name=_name("codecontests", row),
    prompt=_contest(row, correct=True),
    before="",
    stops=('\n"""\n',),
    tests=tuple(tests),
    solution=known[0] if known else None,
    others=tuple(known[1:_KNOWN]),
  )


TASKS: dict[str, Callable[[dict, Any], code.Problem | None]] = {
  "humaneval": _humaneval,
  "mbpp": _mbpp,
  "apps": _apps,
  "codecontests": _codecontests,
}
