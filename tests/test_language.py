"""`experiments.evaluate` on summaries and on benchmarks of language."""

import json
import pathlib
import sys
import types

import numpy as np
import pytest

import mtp_jax
from experiments.startup import language
from mtp_jax import tokenizer
from mtp_jax.checkpoint import checkpoints
from mtp_jax.evaluate import harness, pass_at_k
from mtp_jax.interchange import folders
from mtp_jax.tasks import summaries
from mtp_jax.train import lock
from tests import parameters


@pytest.fixture
def values(tmp_path, monkeypatch):
  """Flags; the model is random, and what it writes is chosen."""
  net = parameters.random_model("unembedding", vocab=259, n_future=2, layers=1)

  cfg, codec = mtp_jax.Config(model=net.cfg), tokenizer.Bytes()

  def load(path, step=None, dtype="float32"):
    assert dtype == "float32"
    return net, cfg, codec

  def evaluate(decoder, codec, found, *, heads, max_new, rows, words):
    assert (heads, max_new, rows) == (2, 9, 4)
    texts = [pair.answer.strip() for pair in found]
    scores = dict.fromkeys(
      summaries.rouge.NAMES, summaries.rouge.Score(1, 1, 1)
    )
    return summaries.Summaries(texts, scores, 1.5)

  monkeypatch.setattr(mtp_jax, "load", load)
  monkeypatch.setattr(folders, "settings", lambda path, step: (cfg, codec))
  monkeypatch.setattr(summaries, "evaluate", evaluate)
  flags = dict(
    problems=2, max_new=9, rows=4, heads=0, seed=0, step=None, dtype="float32"
  )
  paths = dict(workdir=tmp_path, data=None, examples=None)
  drawn = dict(temperatures=["0"], samples=10, k=None, top_p=None)
  return flags | paths | drawn | {"output": tmp_path / "out"}


def results(values):
  return json.loads((values["output"] / "results.json").read_text())


def test_summaries_of_a_file(values, tmp_path, capsys):
  file = tmp_path / "xsum.jsonl"
  lines = [{"document": f"Text {i}.", "summary": f"S{i}"} for i in range(4)]
  file.write_text("\n".join(map(json.dumps, lines)))
  language.run(values | {"task": "xsum", "data": file})
  found = results(values)
  assert (found["task"], found["summaries"]) == ("xsum", 2)
  assert found["rouge"]["rougeL"]["f1"] == 1
  assert '"tokens_per_forward": 1.5' in capsys.readouterr().out
  rows = (values["output"] / "summaries.jsonl").read_text().splitlines()
  assert [json.loads(row)["summary"] for row in rows] == ["S0", "S2"]
  assert found["words"] == "words"


def test_summaries_of_another_alphabet(values, tmp_path):
  file = tmp_path / "thaisum.jsonl"
  file.write_text(json.dumps({"body": "ก ข", "summary": "ข่าว"}))
  asked = {"task": "thaisum", "data": file, "problems": None}
  language.run(values | asked)
  assert results(values)["words"] == "characters"
  with pytest.raises(ValueError, match="problems=2: there are 1"):
    language.run(values | asked | {"problems": 2})


def test_one_process_at_a_time_writes_to_a_folder(
  values, tmp_path, monkeypatch
):
  monkeypatch.setattr(lock, "_RELEASE", 0.1)
  monkeypatch.delattr(mtp_jax, "load")
  found = [summaries.pair(f"Text {i}", f"s {i}", 99) for i in range(50)]
  monkeypatch.setattr(summaries, "built_in", lambda name, size: found)
  with (
    lock.exclusive(values["output"]),
    pytest.raises(checkpoints.CheckpointError, match="in use by another run"),
  ):
    language.run(values | {"task": "man_pages"})


def test_built_in_summaries_are_held_out(values, monkeypatch):
  found = [summaries.pair(f"Text {i}", f"s {i}", 99) for i in range(50)]
  monkeypatch.setattr(summaries, "built_in", lambda name, size: found)
  language.run(values | {"task": "man_pages", "problems": None})
  held_out = summaries.split(found, 0.1)[1]
  assert results(values)["summaries"] == len(held_out) < 15


@pytest.mark.parametrize(
  "change, line",
  [
    ({"task": "xsum"}, "--task=xsum needs --data=FILE"),
    ({"task": "piqa"}, "--task=piqa needs --data=FILE"),
    ({"task": "piqa", "data": "none.jsonl"}, "no file none.jsonl"),
    ({"task": "gsm8k", "data": "none.jsonl"}, "gsm8k needs --examples=FILE"),
    ({"task": "man_pages", "data": "x"}, "man_pages is built in: leave out --"),
    ({"heads": 3}, "--heads=3: the model can draft with 2"),
    ({"seed": -5}, "seed=-5 is outside"),
    ({"output": pathlib.Path(__file__)}, "is a file; name a folder"),
    ({"task": "xsum", "data": "none.jsonl"}, "there is no file none.jsonl"),
  ],
)
def test_errors_come_before_the_model_is_read(
  values, change, line, monkeypatch
):
  monkeypatch.delattr(mtp_jax, "load")
  monkeypatch.setattr(summaries, "built_in", lambda name, size: 1 / 0)
  with pytest.raises(ValueError, match=line):
    language.run(values | {"task": "man_pages"} | change)


@pytest.mark.parametrize(
  "change, line",
  [
    ({"k": ["1", "11"]}, "--k=1,11 with --samples=10: give k's from 1 to 10"),
    ({"temperatures": ["warm"]}, "--temperatures=warm: give numbers"),
    ({"temperatures": ["0", "-1"]}, r"temperatures \(0.0, -1.0\): give some"),
    ({"temperatures": []}, r"temperatures \(\): give some"),
    ({"temperatures": ["0.8", "0.8"]}, "one is there twice"),
    ({"temperatures": ["inf"]}, "temperature=inf"),
    ({"temperatures": ["0.8"], "top_p": 7.0}, "top_p=7.0"),
    ({"temperatures": ["0"], "top_p": 0.9}, "greedy draws nothing"),
  ],
)
def test_errors_of_gsm8k_come_before_the_model_is_read(
  values, change, line, monkeypatch
):
  monkeypatch.delattr(mtp_jax, "load")
  monkeypatch.setattr(harness, "base_class", lambda: object)
  file = values["workdir"] / "gsm8k.jsonl"
  file.write_text('{"question": "2 + 2?", "answer": "#### 4"}')
  asked = {"task": "gsm8k", "data": file, "examples": file}
  with pytest.raises(ValueError, match=line):
    language.run(values | asked | change)


def test_pass_at_k_of_gsm8k(values, tmp_path, monkeypatch):
  """What the harness counts becomes pass@k, by temperature."""
  lm, counted = types.SimpleNamespace(contexts_cut=3), True
  correct = {"gsm8k_local": [1, 0, 0], "gsm8k_local_t0.8": [3, 0, 1]}
  correct["gsm8k_local_t1"] = [1, 2, 4]

  def simple_evaluate(model, tasks, task_manager, limit, log_samples):
    assert task_manager == {"include_defaults": False}
    assert (model, limit, log_samples) == (lm, 2, True)
    (task,) = tasks
    metric = "correct" if task.get("repeats") else "exact_match"
    assert task.get("repeats", 4) == 4
    metric = metric if counted else "of another name"
    rows = [{metric: count} for count in correct[task["task"]]]
    return {"results": {"t": {}}, "samples": {"t": rows}}

  module = types.SimpleNamespace(
    simple_evaluate=simple_evaluate,
    tasks=types.SimpleNamespace(TaskManager=dict),
  )
  monkeypatch.setitem(sys.modules, "lm_eval", module)
  monkeypatch.setattr(harness, "base_class", lambda: object)
  monkeypatch.setattr(harness, "adapter", lambda *a, **k: lm)
  monkeypatch.setattr(folders, "kind", lambda path: "workdir")
  file = tmp_path / "test.jsonl"
  file.write_text('{"question": "2 + 2?", "answer": "#### 4"}')
  flags = dict(temperatures=["0", "0.8", "1"], samples=4, k=["1", "2"])
  asked = {"task": "gsm8k", "data": file, "examples": file}
  language.run(values | flags | asked)
  assert results(values)["contexts_cut"] == 3
  found = results(values)["pass_at_k"]
  means = {t: {k: e["mean"] for k, e in of.items()} for t, of in found.items()}
  want = {"0": {"1": 1 / 3}}
  for t, counts in ("0.8", (3, 0, 1)), ("1", (1, 2, 4)):
    want[t] = {
      str(k): np.mean(pass_at_k.pass_at_k(4, counts, k)) for k in (1, 2)
    }
  want["oracle"] = {k: max(want["0.8"][k], want["1"][k]) for k in ("1", "2")}
  assert means == {t: pytest.approx(of) for t, of in want.items()}
  counted = False
  # Not taken for wrong.
  with pytest.raises(ValueError, match="3 of 3 answers no 'exact_match'"):
    language.run(values | flags | asked)


def test_the_scores_of_choices(values, tmp_path, monkeypatch):
  """Rows of such a task have no exact match."""

  def simple_evaluate(**settings):
    rows = [{"acc": 1.0}, {"acc": 0.0}]
    return {"results": {"t": {"acc,none": 0.5}}, "samples": {"t": rows}}

  module = types.SimpleNamespace(
    simple_evaluate=simple_evaluate,
    tasks=types.SimpleNamespace(TaskManager=dict),
  )
  monkeypatch.setitem(sys.modules, "lm_eval", module)
  monkeypatch.setattr(harness, "base_class", lambda: object)
  one = types.SimpleNamespace(contexts_cut=0)
  monkeypatch.setattr(harness, "adapter", lambda *a, **k: one)
  monkeypatch.setattr(folders, "kind", lambda path: "workdir")
  file = tmp_path / "test.jsonl"
  file.write_text('{"goal": "a", "sol1": "b", "sol2": "c", "label": 1}')
  language.run(values | {"task": "piqa", "data": file})
  assert results(values)["scores"] == {"acc,none": 0.5}
