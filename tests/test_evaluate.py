"""`experiments.evaluate`, on a tiny model of bytes."""

import dataclasses
import json
import pathlib

import pytest

import mtp_jax
from experiments.startup import evaluation
from mtp_jax import tokenizer
from mtp_jax.checkpoint import checkpoints
from mtp_jax.evaluate import sandbox
from mtp_jax.interchange import folders
from mtp_jax.tasks import functions, judging, samples
from mtp_jax.train import lock, provenance
from tests import parameters


@pytest.fixture(scope="module")
def request_(tmp_path_factory):
  home = tmp_path_factory.mktemp("evaluate")
  net = parameters.random_model(vocab=259, n_future=1)
  mtp_jax.save(net, home / "llama", codec=tokenizer.Bytes())
  return evaluation.Request(
    workdir=home / "llama",
    step=None,
    dtype=None,
    task="functions",
    data=None,
    output=home / "found",
    group=None,
    problems=3,
    temperatures=["0", "0.8"],
    samples=2,
    k=["1", "2"],
    top_p=None,
    max_new=6,
    rows=4,
    heads=0,
    seed=3,
    allow_unsandboxed_execution=False,
  )


@pytest.fixture(scope="module")
def finished(request_):
  """(folder, what is right in it): some answers were there before."""
  try:
    sandbox.find()
  except ValueError as error:
    pytest.skip(str(error))
  problems, codec = functions.problems(3), tokenizer.Bytes()
  known = []
  for t, sample, text in (0.0, 0, 0), (0.8, 0, 0), (0.8, 1, 1), (0.8, 0, 2):
    problem = problems[text]
    known.append(
      {
        **{"task_id": problem.name, "temperature": t, "sample": sample},
        **{"seed": 3, "max_new": 6, "top_p": None, "ended": True},
        "model": provenance.fingerprint(folders.load(request_.workdir)[0]),
        **{"heads": 1, "prompt": samples.prompt_digest(codec, problem)},
        "completion": problem.solution if text != 2 else "  return '<b>'",
        **{"tokens": [1], "logprobs": [-0.5], "passes": 0, "near_ties": 0},
      }
    )
  request_.output.mkdir()
  lines = [json.dumps(row) + "\n" for row in known]
  (request_.output / "samples.jsonl").write_text("".join(lines))
  evaluation.run(request_)
  return request_.output, known


def test_the_results(finished, request_, capsys):
  folder, known = finished
  result = json.loads((folder / "results.json").read_text())
  rows = samples.read(folder / "samples.jsonl")
  assert len(rows) == result["samples"] == 3 * (1 + 2)
  assert all(row in rows for row in known)
  assert result["problems"] == 3 and result["left_out"] == []
  verdicts = samples.read(folder / "verdicts.jsonl")
  assert sum(v["passed"] for v in verdicts) == 3  # the random model wrote none
  found = result["pass_at_k"]
  assert found["0"]["1"]["mean"] == pytest.approx(1 / 3)
  assert found["0.8"]["1"]["mean"] == pytest.approx((1 / 2 + 1 / 2) / 3)
  assert found["0.8"]["2"]["mean"] == pytest.approx(2 / 3)
  assert found["oracle"]["2"]["temperature"] == 0.8
  assert result["cut_at_max_new"] == sum(not row["ended"] for row in rows) > 0
  page = (folder / "report.html").read_text()
  assert page.count("<h2>") == 3 and page.count("class=right") == 3
  assert "return &#x27;&lt;b&gt;&#x27;" in page and "<b>" not in page
  assert evaluation.show(result) is None
  out = capsys.readouterr().out
  assert "9 answers: 0 empty" in out and "without" not in out.lower()
  evaluation.show(result | {"sandbox": "none"})
  assert "the answers ran WITHOUT a sandbox" in capsys.readouterr().out
  assert result["out_of_time"] == result["without_a_verdict"] == 0
  evaluation.show(result | {"out_of_time": 2})
  assert "2 answers out of time and 0 without" in capsys.readouterr().out


def test_again_nothing_is_drawn(finished, request_, monkeypatch):
  folder, _ = finished
  before = [
    (folder / f"{n}.jsonl").read_text() for n in ("samples", "verdicts")
  ]
  monkeypatch.delattr(samples.serve, "generate_all")
  monkeypatch.setattr(judging, "check_solutions", lambda _, some: (some, []))
  evaluation.run(request_)
  after = [(folder / f"{n}.jsonl").read_text() for n in ("samples", "verdicts")]
  assert after == before


@pytest.mark.parametrize(
  "change, words",
  [
    ({"task": "mbpp"}, "--data is required: the file of mbpp"),
    ({"group": "easy"}, "functions is built in: leave out --data"),
    ({"k": ["1", "3"]}, "--k=1,3 with --samples=2: give k's from 1 to 2, or m"),
    ({"k": ["0"]}, "--k=0 with --samples=2: give k's from 1"),
    ({"k": []}, "--k= with --samples=2: give k's from 1"),
    ({"k": ["x"]}, "--k=x: give numbers"),
    ({"temperatures": ["hot"]}, "--temperatures=hot: give numbers"),
    ({"temperatures": ["-1"]}, "from 0 on"),
    ({"temperatures": ["nan"]}, "temperature=nan has to be"),
    ({"top_p": 2.0}, "top_p=2.0 has to be"),
    ({"seed": -5}, "seed=-5 is outside"),
    ({"max_new": 2**30 + 1}, "max_new=1073741825 is too many; give at most"),
    ({"heads": 9}, "--heads=9: the model can draft with 1"),
    ({"output": pathlib.Path(__file__)}, "is a file; name a folder"),
  ],
)
def test_errors_come_before_the_model_is_read(
  request_, change, words, monkeypatch
):
  monkeypatch.setattr(sandbox, "find", lambda **_: "none")
  monkeypatch.delattr(folders, "load")
  monkeypatch.delattr(judging, "check_solutions")
  with pytest.raises(ValueError, match=words):
    evaluation.run(dataclasses.replace(request_, **change))


def test_the_ks_that_are_not_given_fit_the_samples():
  assert evaluation.read_ks(None, 200) == [1, 10]
  assert evaluation.read_ks(None, 9) == [1]
  assert evaluation.read_ks(["2", "100"], 100) == [2, 100]


def test_one_process_at_a_time_writes_to_a_folder(request_, monkeypatch):
  monkeypatch.setattr(lock, "_RELEASE", 0.1)
  monkeypatch.setattr(sandbox, "find", lambda **_: "none")
  monkeypatch.delattr(folders, "load")
  monkeypatch.delattr(judging, "check_solutions")
  with (
    lock.exclusive(request_.output),
    pytest.raises(checkpoints.CheckpointError, match="in use by another run"),
  ):
    evaluation.run(request_)


def test_some_problems_of_a_file(tmp_path, request_):
  row = {"prompt": "def f(): ", "entry_point": "f", "canonical_solution": "0"}
  lines = [
    json.dumps(row | {"task_id": str(i), "test": "def check(f): assert f()"})
    for i in range(7)
  ]
  file = tmp_path / "p.jsonl"
  file.write_text("\n".join([*lines, '{"task_id": "7"}']))
  some = dataclasses.replace(request_, task="humaneval", data=file, problems=3)
  found = evaluation.read(some)
  assert [p.name for p in found.problems] == ["0", "2", "4"]
  assert found.bad == ["line 8 (7): the field 'prompt' is missing"]
  with pytest.raises(ValueError, match="problems=8: there are 7; ask for few"):
    evaluation.read(dataclasses.replace(some, problems=8))


def test_the_model_is_held_in_the_dtype_asked_for(
  request_, tmp_path, monkeypatch
):
  monkeypatch.setattr(sandbox, "find", lambda **_: "none")
  evaluation.run(
    dataclasses.replace(
      request_,
      output=tmp_path,
      dtype="bfloat16",
      temperatures=["0"],
      problems=1,
      max_new=1,
    )
  )
  row = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
  net = folders.load(request_.workdir, dtype="bfloat16")[0]
  assert row["model"] == f"{provenance.fingerprint(net)} in bfloat16"
  results = json.loads((tmp_path / "results.json").read_text())
  assert results["dtype"] == "bfloat16"


@pytest.mark.parametrize(
  "task, more, line",
  [
    ("humaneval", [], "--data is required: the file of humaneval"),
    ("functions", ["--samples=20"], "--samples does nothing at temperature 0"),
    ("humaneval", ["--seed=3"], "--seed does nothing at temperature 0"),
    ("xsum", ["--seed=3"], "--seed does nothing for --task=xsum"),
    ("gsm8k", ["--k=1"], "--k does nothing at temperature 0, which has one an"),
    ("man_pages", ["--samples=3"], "--samples does nothing for --task=man_pag"),
    ("functions", ["--examples=x"], "--examples does nothing for --task=func"),
    ("arc_challenge", ["--max_new=9"], "--max_new does nothing for --task=arc"),
    ("gsm8k", ["--data=x"], "--task=gsm8k needs --examples=FILE, its training"),
  ],
)
def test_the_program_says_what_is_wrong(call, task, more, line):
  code, _, err = call(
    "--model=nowhere",
    f"--task={task}",
    "--output=x",
    *more,
    module="experiments.evaluate",
  )
  assert (code, err.count("\n")) == (1, 1)
  assert f"error: {line}" in err
