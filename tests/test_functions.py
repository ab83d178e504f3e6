"""Generated functions: sound, disjoint, and testable."""

import pytest

from mtp_jax.evaluate import sandbox
from mtp_jax.tasks import functions


def test_what_a_function_looks_like():
  function = functions.Function(
    ("adds 3", "multiplies by 2"), ("x + 3", "x * 2"), ("1", "5", "-3", "0")
  )
  pair = function.pair()
  text = functions.__doc__.partition("\n\n  def")[2]
  shown = ("def" + text).replace('\\"', '"').replace("\n  ", "\n").strip()
  # Written out there, they would be run as an example.
  calls = "(two calls with their values, as doctest shows them: f(1) is 8)"
  assert calls in shown
  shown = shown.replace(calls, ">>> f(1)\n  8\n  >>> f(5)\n  16")
  assert (pair.prompt + pair.answer).strip() == shown
  problem = function.problem()
  assert problem.tests == "assert f(-3) == 0\nassert f(0) == 6\n"


def test_documents_and_problems_are_disjoint():
  problems = functions.problems(300)
  names = {p.name for p in problems}
  assert len(names) == 300
  words = {p.prompt.split('"""')[1].split(".")[0].lower() for p in problems}
  learned = {
    pair.prompt.split('"""')[1].split(".")[0].lower()
    for pair in functions.documents(3000)
  }
  assert len(words) == 300 and not words & learned
  assert len(learned) > 1500


def test_a_solution_passes_and_a_neighbours_does_not():
  problems = functions.problems(200, seed=3)
  passed = 0
  for problem, other in zip(problems, problems[1:] + problems[:1], strict=True):
    space = {}
    exec(problem.program(problem.solution) + problem.tests, space)
    try:
      exec(problem.program(other.solution) + problem.tests, {})
      passed += 1
    except Exception:
      pass
    assert problem.end(problem.solution + "\n\ndef f(x):") == len(
      problem.solution + "\n"
    )
  assert passed < 4  # such as of two that leave nothing


def test_the_examples_do_not_tell_the_hidden_values():
  for problem in functions.problems(50):
    shown = {x.split(")\n")[0] for x in problem.prompt.split(">>> f(")[1:]}
    hidden = {x.split(") == ")[0] for x in problem.tests.split("assert f(")[1:]}
    assert len(shown) == 2 and len(hidden) == 6 and not shown & hidden


def test_no_constant_solves_a_problem():
  for problem in functions.problems(100):
    answers = {line.split(" == ")[1] for line in problem.tests.splitlines()}
    assert len(answers) > 1, problem.name


def test_the_same_seed_gives_the_same():
  assert list(functions.documents(20, 7)) == list(functions.documents(20, 7))
  assert functions.problems(5, 1) != functions.problems(5, 2)
  with pytest.raises(ValueError, match="2001 problems: give 1 to 2000"):
    functions.problems(2001)


def test_they_run_in_a_sandbox():
  try:
    executor = sandbox.Sandbox(sandbox.find())
  except ValueError as error:
    pytest.skip(str(error))
  found = executor.check_all(
    [(p.program(p.solution), p.tests) for p in functions.problems(4)]
    + [(p.program("  return 0"), p.tests) for p in functions.problems(4)]
  )
  assert [v.passed for v in found] == [True] * 4 + [False] * 4
