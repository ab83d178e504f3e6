"""Problem files: read as they are published, and never silently wrong."""

import gzip
import json
import zlib

import pytest

from mtp_jax.tasks import code, pairs, problem_files

HUMANEVAL = {
  "task_id": "Ours/0",
  "prompt": 'def twice(x):\n  """Returns 2 x."""\n',
  "entry_point": "twice",
  "canonical_solution": "  return 2 * x\n",
  "test": "def check(candidate):\n  assert candidate(3) == 6\n",
}
MBPP = {
  "task_id": 11,
  "text": "Write a function that doubles.",
  "code": "def twice(x):\r\n  return 2 * x",
  "test_list": ["assert twice(1) == 2", "assert twice(0) == 0"],
  "test_setup_code": "import math",
  "challenge_test_list": [],
}
APPS = {
  "problem_id": 7,
  "question": "Double the number.",
  "starter_code": "",
  "difficulty": "introductory",
  "solutions": json.dumps(["print(2 * int(input()))", "worse"]),
  "input_output": json.dumps({"inputs": ["1\n", "2\n"], "outputs": ["2", "4"]}),
}
CALLED = APPS | {
  "problem_id": 8,
  "starter_code": "class Solution:\n  def twice(self, x):",
  "difficulty": "interview",
  "solutions": json.dumps(
    ["class Solution:\n  def twice(self, x): return (2 * x, x)"]
  ),
  "input_output": json.dumps(
    {"fn_name": "twice", "inputs": [[1], [3]], "outputs": [[2, 1], [[6, 3]]]}
  ),
}
CONTESTS = {
  "name": "7_A. Doubles",
  "description": "Double it.\n",
  "public_tests": {"input": ["1\n"], "output": ["2\n"]},
  "private_tests": {"input": ["2\n"], "output": ["4\n"]},
  "generated_tests": {"input": [], "output": []},
  "solutions": {
    "language": [2, 3, 3],
    "solution": ["C++", "print(2*int(input()))", "print(2)"],
  },
}


def write(path, *rows):
  lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
  data = b"\n".join(lines) + b"\n"
  path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
  return path


def one(tmp_path, task, *rows):
  found = problem_files.read(task, write(tmp_path / "p.jsonl", *rows))
  assert not found.bad
  return found.problems


def test_humaneval(tmp_path):
  found = problem_files.read(
    "humaneval", write(tmp_path / "p.jsonl.gz", HUMANEVAL)
  )
  (problem,) = found.problems
  assert problem.prompt == HUMANEVAL["prompt"].rstrip()
  assert problem.tests.endswith("\ncheck(twice)\n")
  space = {}
  exec(problem.program(problem.solution) + problem.tests, space)
  assert space["twice"](4) == 8


def test_mbpp_has_solved_problems_first(tmp_path):
  shots = [MBPP | {"task_id": i, "text": f"Shot {i}."} for i in range(1, 6)]
  (problem,) = one(tmp_path, "mbpp", *shots, MBPP, MBPP | {"task_id": 511})
  assert problem.name == "11" and problem.tests.startswith("import math\n")
  for i in (2, 3, 4):
    assert f"here is your task: Shot {i}. Your code" in problem.prompt
  assert "Shot 1." not in problem.prompt and "Shot 5." not in problem.prompt
  assert problem.prompt.count("[DONE]") == 3
  assert problem.prompt.endswith(
    "You are an expert Python programmer, and here is your task: Write a "
    "function that doubles. Your code should pass these tests:\n\n"
    "assert twice(1) == 2\nassert twice(0) == 0\n[BEGIN]\n"
  )
  exec(problem.program(problem.solution) + "\n" + problem.tests, {})


@pytest.mark.parametrize(
  "change, words",
  [
    ({"code": ...}, "the field 'code' is missing"),
    ({"code": None}, 'can only concatenate str (not "NoneType") to str'),
    ({"text": ...}, "the field 'prompt' is missing"),
    ({"test_list": None}, "can only join an iterable"),
  ],
)
def test_a_bad_solved_problem_is_named(tmp_path, change, words):
  shots = [MBPP | {"task_id": i} for i in (2, 3, 4)]
  shots[1] = {k: v for k, v in (shots[1] | change).items() if v is not ...}
  rows = [*shots, MBPP, MBPP | {"task_id": [2]}]
  found = problem_files.read("mbpp", write(tmp_path / "p.jsonl", *rows))
  assert found.bad[0] == f"task 3, a solved problem to show: {words}"
  assert found.problems[0].prompt.count("[DONE]") == 2


def test_a_builtin_that_the_solution_defines_is_the_answers(tmp_path):
  row = MBPP | {"code": "import abc\ndef sum(a, b):\n  len = 2\n  return a + b"}
  (problem,) = one(tmp_path, "mbpp", row)
  assert problem.job("x") == ("x", problem.tests, ("sum",))
  (problem,) = one(tmp_path, "mbpp", MBPP | {"code": "print 'Python 2'"})
  assert problem.job("x")[2] == ()


def test_mbpp_without_the_published_numbers(tmp_path):
  problems = one(tmp_path, "mbpp", MBPP | {"task_id": 1})
  assert len(problems) == 1 and "[DONE]" not in problems[0].prompt


def test_apps_by_standard_input(tmp_path):
  (problem,) = one(tmp_path, "apps", APPS)
  assert problem.tests == (("1\n", "2"), ("2\n", "4"))
  assert problem.prompt == (
    "\nQUESTION:\nDouble the number.\nUse Standard Input format\nANSWER:\n"
  )
  assert problem.solution == "print(2 * int(input()))"
  assert problem.others == ("worse",)
  many = APPS | {"solutions": json.dumps([str(i) for i in range(9)])}
  (problem,) = one(tmp_path, "apps", many)
  assert (problem.solution, *problem.others) == tuple("01234")


def test_apps_by_call(tmp_path):
  path = write(tmp_path / "p.jsonl", APPS, CALLED)
  (problem,) = problem_files.read("apps", path, "interview").problems
  assert "class Solution:\n  def twice" in problem.prompt
  assert "Use Call-Based format" in problem.prompt
  for program in problem.solution, "def twice(x): return [2 * x, x]":
    exec(program + "\n" + problem.tests, {})
  with pytest.raises(AssertionError):
    exec("def twice(x): return x\n" + problem.tests, {})
  with pytest.raises(ValueError, match="no problem of 'easy'; it has .'inter"):
    problem_files.read("apps", path, "easy")


def test_codecontests(tmp_path):
  (problem,) = one(tmp_path, "codecontests", CONTESTS)
  assert problem.tests == (("1\n", "2\n"), ("2\n", "4\n"))
  # As a model is finetuned (appendix F).
  asked = '"""\nDouble it.\n"""\n'
  assert problem.prompt == pairs.conditioned(asked, correct=True)
  assert problem.solution == "print(2*int(input()))"
  assert problem.others == ("print(2)",)


def test_solutions_to_finetune_on_say_which_are_right(tmp_path):
  """The prompt is the one that asks for a correct solution in the test."""
  wrong = {"language": [1, 3], "solution": ["print 1", "print(0)\n\n"]}
  row = CONTESTS | {"incorrect_solutions": wrong}
  path = write(tmp_path / "p.jsonl", row)
  found = [*problem_files.solutions(path)]
  (problem,) = problem_files.read("codecontests", path).problems
  assert found == [
    pairs.Pair(problem.prompt, "print(2*int(input()))\n"),
    pairs.Pair(problem.prompt, "print(2)\n"),
    pairs.Pair(problem.prompt.replace("correct", "incorrect"), "print(0)\n"),
  ]
  file = tmp_path / "train.jsonl"
  assert pairs.write(file, problem_files.solutions(path)) == 3
  line = "p.jsonl, line 2: the field 'incorrect_solutions' is missing: mend or"
  write(path, row, CONTESTS)
  with pytest.raises(ValueError, match=line):
    pairs.write(file, problem_files.solutions(path))
  assert len(file.read_text().splitlines()) == 3  # the old file is kept


def without(row, name):
  return {k: v for k, v in row.items() if k != name}


@pytest.mark.parametrize(
  "task, row, words",
  [
    ("humaneval", without(HUMANEVAL, "test"), "the field 'test' is missing"),
    ("humaneval", without(HUMANEVAL, "task_id"), "line 2: the field 'task_id'"),
    ("humaneval", HUMANEVAL | {"test": "def ("}, "its tests do not compile"),
    ("humaneval", HUMANEVAL | {"prompt": " \n"}, r"'prompt' is ' \\n', not"),
    (
      "humaneval",
      HUMANEVAL | {"prompt": None},
      r"line 2 \(Ours/0\): the field 'prompt' is None, not a text",
    ),
    (
      "humaneval",
      HUMANEVAL | {"entry_point": None},
      "the field 'entry_point' is None, not a text",
    ),
    ("mbpp", MBPP | {"text": None}, "the field 'text' is None, not a text"),
    ("apps", APPS | {"question": 3}, "the field 'question' is 3, not a text"),
    ("humaneval", b'{"task_id": "\xff"}', "line 2: 'utf-8' codec can't decode"),
    ("humaneval", b'{"task_id": "x', "line 2: Unterminated string"),
    ("humaneval", b"[1]", "line 2: not an object"),
    (
      "humaneval",
      HUMANEVAL | {"task_id": "good"},
      "name is that of an earlier",
    ),
    (
      "humaneval",
      HUMANEVAL | {"canonical_solution": None},
      "the field 'canonical_solution' is None, not a text",
    ),
    ("mbpp", MBPP | {"code": " "}, "the field 'code' is ' ', not a text"),
    ("mbpp", MBPP | {"test_list": []}, "it has no tests"),
    ("mbpp", without(MBPP, "text"), "the field 'prompt' is missing"),
    ("apps", APPS | {"input_output": "{}"}, "the field 'inputs' is missing"),
    ("apps", APPS | {"input_output": ""}, "Expecting value"),
    (
      "apps",
      APPS | {"input_output": '{"inputs": ["1"], "outputs": []}'},
      "shorter",
    ),
    (
      "apps",
      APPS | {"input_output": '{"inputs": [], "outputs": []}'},
      "no tests",
    ),
    (
      "codecontests",
      CONTESTS | {"public_tests": {"input": [1], "output": [2]}},
      "an input or output is not a text",
    ),
  ],
)
def test_a_bad_problem_is_named_and_left_out(tmp_path, task, row, words):
  first = {
    "humaneval": HUMANEVAL | {"task_id": "good"},
    "mbpp": MBPP | {"task_id": 12},
    "apps": APPS | {"problem_id": "good"},
    "codecontests": CONTESTS | {"name": "good"},
  }[task]
  found = problem_files.read(task, write(tmp_path / "p.jsonl", first, row))
  assert len(found.problems) == len(found.bad) == 1
  with pytest.raises(AssertionError, match=words):
    raise AssertionError(found.bad[0])


def test_an_array_is_a_file_too(tmp_path):
  """As MBPP's sanitised problems are published."""
  path = tmp_path / "sanitized.json"
  path.write_text(json.dumps([MBPP | {"task_id": 11}, without(MBPP, "code")]))
  found = problem_files.read("mbpp", path)
  assert [p.name for p in found.problems] == ["11"]
  assert found.bad == [
    f"entry 2 ({MBPP['task_id']}): the field 'code' is missing"
  ]


def test_blank_lines_count(tmp_path):
  path = write(tmp_path / "p.jsonl", HUMANEVAL, b"", without(HUMANEVAL, "test"))
  (bad,) = problem_files.read("humaneval", path).bad
  assert bad.startswith("line 3 ")


def test_a_file_without_any_sound_problem(tmp_path):
  path = write(tmp_path / "p.jsonl", without(HUMANEVAL, "test"))
  with pytest.raises(ValueError, match="no sound problem of humaneval; line 1"):
    problem_files.read("humaneval", path)
  with pytest.raises(ValueError, match="choose one of humaneval, mbpp"):
    problem_files.read("humanevil", path)
  with pytest.raises(ValueError, match="cannot be read: .*No such file"):
    problem_files.read("humaneval", tmp_path / "none.jsonl")
  (tmp_path / "x.gz").write_bytes(b"not gzip")
  with pytest.raises(ValueError, match="cannot be read: Not a gzipped file"):
    problem_files.read("humaneval", tmp_path / "x.gz")


@pytest.mark.parametrize(
  "source, then, inside",
  [
    ('"""a', "\ndef", True),
    ('"""a"""', "\ndef", False),
    ("'''a\\'''", "\ndef", True),
    ("x = 'a", "\ndef", False),  # the line's end closes it
    ("x = 'a", "[DONE]", True),
    ("x = 'a' # it's", "[DONE]", False),
    ("x = '\\''", "[DONE]", False),
    ("x = \"'''\"", "\ndef", False),
    ("# '''", "\ndef", False),
    ("x = ''", "[DONE]", False),
    ('f"""{x}"', "\nif", True),
    ("", "", False),
  ],
)
def test_inside_string(source, then, inside):
  assert code.inside_string(source, then) is inside


PROBLEM = code.Problem(
  "p", 'def f():\n  """Doc.', 'def f():\n  """Doc.', ("\ndef", "\nprint"), "f()"
)


@pytest.mark.parametrize(
  "kept, rest",  # the answer, and what follows it
  [
    ('"""\n  return 1\n', None),
    ('"""\n  return 1', "\ndef g"),
    ("\ndef in the docstring", None),  # it is open in the prompt
    ('\ndef in it"""\n  pass', "\nprint("),
    ('"""\n  x = """\nprint\n"""\n  return x\n', "\nprint(1)"),
    ('"""\n  return 1', "<|end|>\ndef"),
    ("", "<|end|>"),  # even in a string
    ("", None),
  ],
)
def test_where_an_answer_ends(kept, rest):
  end = None if rest is None else len(kept)
  assert PROBLEM.end(kept + (rest or ""), ["<|end|>"]) == end


def test_a_stop_sequence_of_the_prompt_ends_nothing():
  problem = code.Problem("p", "x\ndef f", "x\ndef f", ("\ndef",), "f()")
  assert problem.end("(): pass\n") is None


def test_what_a_sample_draws_by_is_its_own():
  other = code.Problem("q", "", "", (), "f()")
  numbers = [p.number(i) for p in (PROBLEM, other) for i in range(500)]
  assert len(set(numbers)) == 1000 and 0 <= min(numbers) <= max(numbers) < 2**31
  assert PROBLEM.number(3) == zlib.crc32(b"p/3") % 2**31
