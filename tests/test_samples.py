"""Answers that are drawn: the same whatever was drawn before, then judged."""

import dataclasses
import json

import numpy as np
import pytest

from mtp_jax import tokenizer
from mtp_jax.decode import generate, layout, serve, tree
from mtp_jax.evaluate import sandbox
from mtp_jax.tasks import code, judging, samples
from tests import parameters

CODEC = tokenizer.Bytes()
PROBLEMS = [
  code.Problem(
    name,
    f"def {name}(): ",
    f"def {name}(): ",
    ("e", "\x80"),
    f"assert {name}() == 1",
  )
  for name in ("f", "g", "h")
]
SETTINGS = samples.SampleSettings(
  (0.0, 1.3), 4, max_new=24, rows=3, heads=2, seed=5
)


@pytest.fixture(scope="module")
def decoder():
  return layout.lay_out(parameters.random_model(vocab=259, deviation=0.3))


@pytest.fixture(scope="module")
def drawn(decoder, tmp_path_factory):
  """(file, answers) of one unbroken call."""
  path = tmp_path_factory.mktemp("samples") / "samples.jsonl"
  return path, samples.draw(decoder, CODEC, PROBLEMS, SETTINGS, path)


def test_what_is_kept_of_an_answer(drawn):
  path, rows = drawn
  assert len(rows) == 3 * (1 + 4)
  assert sorted(map(str, samples.read(path))) == sorted(map(str, rows))
  ended = 0
  for row in rows:
    text = CODEC.decode(row["tokens"])
    assert len(row["tokens"]) == len(row["logprobs"]) <= 24
    assert row["completion"] == text[: code.Problem.end(PROBLEMS[0], text)]
    assert not {"e", "\x80"} & set(row["completion"])
    by_itself = "e" in text or "\x80" in text or CODEC.eos in row["tokens"]
    assert row["ended"] == by_itself
    ended += by_itself
    if "e" in text:  # nothing is kept behind the stop
      assert text.index("e") == len(text) - 1
    assert by_itself or len(row["tokens"]) == 24
  assert 0 < ended < len(rows)


def test_log_probabilities_are_head_1s(decoder, drawn):
  _, rows = drawn
  net = parameters.random_model(vocab=259, deviation=0.3)
  prompt = [*CODEC.prefix, *CODEC.encode(PROBLEMS[0].prompt)]
  for row in rows[:2]:
    text = np.array([*prompt, *row["tokens"]])
    logits = np.asarray(net(text[None])[0, 0], np.float64)
    total = np.log(np.exp(logits).sum(-1))
    places = np.arange(len(prompt) - 1, len(text) - 1)
    want = logits[places, text[places + 1]] - total[places]
    np.testing.assert_allclose(row["logprobs"], want, atol=3e-5)


def test_nothing_is_drawn_twice_and_all_is_the_same(
  decoder, drawn, monkeypatch
):
  """A file that a kill cut anywhere ends as it would have."""
  path, rows = drawn
  lines = path.read_text().splitlines(keepends=True)
  cut = path.with_name("cut.jsonl")
  cut.write_text("".join(lines[:4]) + lines[9] + lines[7][:31])
  asked, generate_all = [], serve.generate_all

  def counted(decoder, prompts, **settings):
    asked.extend(n for numbers in settings["samples"] for n in numbers)
    return generate_all(decoder, prompts, **settings)

  monkeypatch.setattr(serve, "generate_all", counted)
  again = samples.draw(decoder, CODEC, PROBLEMS, SETTINGS, cut)
  assert len(asked) == len(rows) - 5
  assert again == rows
  samples.draw(decoder, CODEC, PROBLEMS, SETTINGS, cut)
  assert len(asked) == len(rows) - 5  # all were there


def test_other_problems_and_counts_change_no_answer(decoder, drawn, tmp_path):
  _, rows = drawn
  few = samples.SampleSettings((1.3,), 2, max_new=24, rows=3, heads=2, seed=5)
  got = samples.draw(decoder, CODEC, PROBLEMS[::-1], few, tmp_path / "x.jsonl")
  wanted = [row for row in rows if row["temperature"] and row["sample"] < 2]
  assert [r["completion"] for r in got] == [r["completion"] for r in wanted]


def test_answers_of_other_settings_are_not_mixed(decoder, drawn):
  path, _ = drawn
  other = samples.SampleSettings((0.0,), 1, max_new=25, seed=5)
  with pytest.raises(
    ValueError, match="samples of max_new=24, and 25 is asked"
  ):
    samples.draw(decoder, CODEC, PROBLEMS, other, path)
  other = dataclasses.replace(SETTINGS, model="another")
  with pytest.raises(ValueError, match="samples of model=, and another is ask"):
    samples.draw(decoder, CODEC, PROBLEMS, other, path)
  other = dataclasses.replace(SETTINGS, heads=tree.chain(2))
  with pytest.raises(ValueError, match="samples of heads=2, and tree .* is as"):
    samples.draw(decoder, CODEC, PROBLEMS, other, path)
  for change in {"prompt": "def f(x): "}, {"stops": ("e",)}:
    changed = [dataclasses.replace(PROBLEMS[0], **change), *PROBLEMS[1:]]
    with pytest.raises(ValueError, match="samples of prompt="):
      samples.draw(decoder, CODEC, changed, SETTINGS, path)


KEY = {"task_id": "f", "temperature": 0.0, "sample": 0}


@pytest.mark.parametrize(
  "rows, words",
  [
    (
      [KEY | {"completion": None}],
      "jsonl:1 is damaged .'completion' is None, n",
    ),
    ([KEY], "jsonl:1 is damaged .'completion' is None, not a str.: mend or"),
  ],
)
def test_an_answer_that_is_no_text_is_named(tmp_path, rows, words):
  path = tmp_path / "samples.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  with pytest.raises(ValueError, match=words):
    samples.read(path, completion=str)
  path.write_text(json.dumps(KEY | {"passed": "maybe", "error": ""}) + "\n")
  with pytest.raises(ValueError, match="'passed' is 'maybe', not a bool"):
    samples.read(path, passed=bool, error=str)


def test_a_file_cut_at_any_byte_has_its_whole_lines(tmp_path):
  path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
  row = KEY | {"completion": "x = {}\n{'é': [1]}"}
  whole = json.dumps(row, ensure_ascii=False).encode() + b"\n"
  path.write_bytes(whole * 2)
  assert samples.read(path) == [row, row]
  for size in range(len(whole) - 1):  # the line's end may be missing
    cut.write_bytes(whole + whole[:size])
    assert samples.read(cut) == [row], size


@pytest.mark.parametrize(
  "damaged", [b'{"task_', b"[1]", b'{"a": "\xff"}', b"{}", b'{"task_id": "f"}']
)
def test_a_line_that_no_kill_cut_is_not_dropped(tmp_path, damaged):
  path = tmp_path / "samples.jsonl"
  sound = json.dumps(KEY).encode()
  lines = [sound, damaged, sound]
  for some in lines, lines[:2]:
    path.write_bytes(b"".join(line + b"\n" for line in some))
    with pytest.raises(ValueError, match="samples.jsonl:2 is damaged .*: mend"):
      samples.read(path)
  path.write_bytes(b"\n".join(lines[:2]))
  assert samples.read(path) == [KEY]


@pytest.mark.parametrize(
  "settings, words",
  [
    (samples.SampleSettings((), 1), "give some"),
    (samples.SampleSettings((-1.0,), 1), "from 0 on"),
    (samples.SampleSettings((0.2, 0.2), 1), "one is there twice"),
    (samples.SampleSettings((0.2,), 0), "0 samples"),
    (samples.SampleSettings((0.0,), 1, top_p=0.5), "greedy draws nothing"),
  ],
)
def test_bad_settings(settings, words):
  with pytest.raises(ValueError, match=words):
    settings.check()


@pytest.fixture(scope="module")
def executor():
  try:
    return sandbox.Sandbox(sandbox.find(), sandbox.Limits(cpu=1, wall=2.0))
  except ValueError as error:
    pytest.skip(str(error))


def answers(*texts):
  return [
    {"task_id": "f", "temperature": 0.8, "sample": i, "completion": text}
    for i, text in enumerate(texts)
  ]


def test_judged_once_and_an_empty_one_never_passes(
  executor, tmp_path, monkeypatch
):
  path = tmp_path / "verdicts.jsonl"
  rows = answers("return 1", " \n", "return 2", "return 1", "return (")
  first = judging.judge(executor, PROBLEMS, rows[:2], path)
  with path.open("a") as file:
    file.write('{"task_id": "f", "temp')  # a kill
  run, check_all = [], sandbox.Sandbox.check_all
  monkeypatch.setattr(
    sandbox.Sandbox,
    "check_all",
    lambda self, jobs: run.extend(jobs) or check_all(self, jobs),
  )
  got = judging.judge(executor, PROBLEMS, rows, path)
  assert [v["passed"] for v in got] == [True, False, False, True, False]
  assert got[:2] == first and got[1]["error"] == judging.EMPTY
  assert got[4]["error"].startswith("SyntaxError")
  assert len(run) == 3  # of the three that were left
  assert judging.judge(executor, PROBLEMS, rows, path) == got and len(run) == 3
  assert got[0]["sandbox"] == executor.backend
  # Of other tests, a verdict says nothing.
  harder = [
    dataclasses.replace(p, tests=f"{p.tests}\nassert False") for p in PROBLEMS
  ]
  again = judging.judge(executor, harder, rows, path)
  assert len(run) > 3 and not any(v["passed"] for v in again)


def test_a_sandbox_that_failed_is_asked_again(tmp_path, monkeypatch):
  """What it says then is returned, to be counted, and not kept."""
  path, rows = tmp_path / "verdicts.jsonl", answers("return 1", "return 2")
  lost = sandbox.Verdict(False, f"{sandbox.NO_VERDICT}: Killed")
  found = [lost, sandbox.Verdict(False, sandbox.OUT_OF_TIME)]
  monkeypatch.setattr(sandbox.Sandbox, "check_all", lambda *_: found)
  executor = sandbox.Sandbox("none")
  got = judging.judge(executor, PROBLEMS, rows, path)
  assert [v["error"] for v in got] == [v.error for v in found]
  assert [v["sample"] for v in samples.read(path)] == [1]
  found[:] = [sandbox.Verdict(True)]
  again = judging.judge(executor, PROBLEMS, rows, path)
  assert [v["passed"] for v in again] == [True, False]
  assert len(samples.read(path)) == 2


def test_a_solution_that_fails_is_no_problem(executor):
  def problem(name, solution, tests="assert f() == 1"):
    return code.Problem(name, "p", "def f(): ", (), tests, solution)

  problems = [
    problem("good", "return 1"),
    problem("wrong", "return 2"),
    problem("unknown", None),
    code.Problem("easy", "p", "def f(): return 1", (), "assert f() == 1", ""),
  ]
  several = ("third", "return 2", "return 3", "return 1"), ("none", "x", "pass")
  for name, first, *others in several:
    problems.append(
      dataclasses.replace(problem(name, first), others=tuple(others))
    )
  sound, lines = judging.check_solutions(executor, problems)
  assert [p.name for p in sound] == ["good", "unknown", "third"]
  assert [p.solution for p in sound] == ["return 1", None, "return 1"]
  assert lines == [
    "wrong: no known solution passes: AssertionError: ",
    "none: no known solution passes: AssertionError: ",
    "easy: an empty answer passes",
  ]


@pytest.fixture
def write_text(monkeypatch):
  """Has the server write the given bytes, as far as the text's end."""

  def fake(text):
    text = np.array([*text])

    def generate_all(decoder, prompts, *, on_text, end, **_):
      kept = end(0, text)
      scores = np.zeros(kept)
      passes = np.ones(kept - 1)
      on_text(0, generate.Text(text[:kept], passes, scores, scores + 1, 0, 0))

    monkeypatch.setattr(serve, "generate_all", generate_all)

  return fake


def test_the_name_of_a_special_token_never_reaches_the_program(
  write_text, tmp_path
):
  class Named(tokenizer.Bytes):
    special_names = ["<|endoftext|>"]

  write_text(b" 1<|endoftext|>import os")
  problem = code.Problem("f", "def f(): return", "def f(): return", (), "f()")
  settings = samples.SampleSettings((0.0,), 1)
  (row,) = samples.draw(
    None, Named(), [problem], settings, tmp_path / "x.jsonl"
  )
  assert row["completion"] == " 1" and row["ended"]
  assert bytes(row["tokens"]) == b" 1<|endoftext|>"


def test_the_space_before_an_answer_stays(write_text, tmp_path):
  """Tokenizers that add a space to every text strip the first one."""

  class Spaced(tokenizer.Bytes):
    _adds_space = True
    _pieces = [bytes([i]) for i in range(256)] + [b""] * 3

    def decode_bytes(self, ids, after=()):
      return tokenizer.Tokenizer.decode_bytes(self, ids, after)

  write_text(b" 1\ne")
  settings = samples.SampleSettings((0.0,), 1)
  problem = code.Problem(
    "f", "def f(): return", "def f(): return", ("\n",), "f()"
  )
  (row,) = samples.draw(
    None, Spaced(), [problem], settings, tmp_path / "x.jsonl"
  )
  assert row["completion"] == " 1"
  assert problem.program(row["completion"]) == "def f(): return 1"
  assert json.loads((tmp_path / "x.jsonl").read_text()) == row
