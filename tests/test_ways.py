"""Claims that train in two stages: what is trained, from what, and measured.

The training itself is replaced: `test_init.py` and `test_frozen.py` test it.
"""

import json

import numpy as np
import pytest

from experiments.claims.finetuning import report as finetuning_report
from experiments.claims.finetuning import scales as finetuning_scales
from experiments.claims.finetuning import solving
from experiments.claims.self_speculation import report as drafts_report
from experiments.claims.self_speculation import scales as drafts_scales
from experiments.claims.self_speculation import ways as drafts
from experiments.claims.summarisation import report as summarisation_report
from experiments.claims.summarisation import writing
from experiments.measure import sweep, tidy
from mtp_jax.evaluate import sandbox
from mtp_jax.tasks import functions, summaries
from tests import parameters

NAMES = summaries.rouge.NAMES


@pytest.fixture
def trained(monkeypatch):
  """Configs and folders that are trained; the models are random."""
  found = []

  def train(cfg, folder, init=None):
    assert folder.name == "model"
    found.append((cfg, folder.parent))
    if init is None:
      return parameters.model_of(cfg.model, 0.3)
    net, _ = init()
    assert net.cfg == cfg.model
    return net

  monkeypatch.setattr(sweep, "train", train)
  return found


def test_heads_added_or_pretrained_have_one_shape(
  trained, tmp_path, monkeypatch
):
  measured = []

  def figures(net, cfg, scale):
    measured.append((net.cfg, cfg.train.steps))
    yield sweep.Figure(cfg.train.steps, "x", 1.0)

  monkeypatch.setattr(drafts, "figures", figures)
  scale = drafts_scales.SCALES["test"]
  runs = drafts.runs(scale, tmp_path, 2)
  assert len({(r.name, r.seed) for r in runs}) == len(runs) == 6
  for run in runs[3:]:
    assert list(run.measure(tmp_path / run.folder)) == [(4, "x", 1.0)]
  assert measured == [(scale.cfg.model, 4)] * 3
  stages = [
    (cfg.model.n_future, cfg.train.steps, cfg.train.freeze, folder.name)
    for cfg, folder in trained
  ]
  assert stages == [
    (4, 4, "none", "pretrained-seed1"),
    (4, 2, "trunk", "frozen-seed1"),
    (1, 2, "none", "next-token-seed1"),
    (4, 2, "none", "joint-seed1"),
    (1, 2, "none", "next-token-seed1"),
  ]
  assert {cfg.train.seed for cfg, _ in trained} == {1}
  # Added heads read other batches than the model that they are added to.
  assert [cfg.data.seed for cfg, _ in trained] == [1, 1001, 1, 1001, 1]
  trunks = {cfg.model.trunk_layers for cfg, _ in trained}
  assert trunks == {scale.cfg.model.trunk_layers}


@pytest.mark.parametrize("scale", ["cpu", "gpu", "paper"])
def test_scales_are_configs(scale):
  found = drafts_scales.SCALES[scale]
  cfg = found.cfg.check()
  drafts.next_token(cfg, cfg.train.steps - found.added).check()
  cfg.replace(train={"steps": found.added}).check()
  if scale != "paper":
    found = finetuning_scales.SCALES[scale]
    found.after(found.before.check().data).check()


def test_three_ways_to_finetune(trained, tmp_path, monkeypatch):
  """Heads of both stages; verdicts become pass@k."""
  scale = finetuning_scales.SCALES["test"]
  solved = functions.problems(scale.problems)[0].name

  def draw(decoder, codec, problems, settings, path):
    assert decoder.n_future in (1, 4)
    return problems

  def judge(executor, problems, rows, path):
    return [
      {"task_id": p.name, "temperature": 0.8, "passed": p.name == solved and i}
      for p in problems
      for i in range(2)
    ]

  monkeypatch.setattr(solving.samples, "draw", draw)
  monkeypatch.setattr(solving.judging, "judge", judge)
  monkeypatch.setattr(sandbox, "find", lambda: "none")
  outcome = sweep.run(solving.runs(scale, tmp_path, 1), tmp_path)
  assert not outcome.failed and len(outcome.done) == 3
  stages = [
    (cfg.model.n_future, cfg.data.source, folder.name)
    for cfg, folder in trained
  ]
  assert stages == [
    (1, "jsonl", "-1--1--seed0"),
    (1, "python", "pretrained-n1-seed0"),
    (4, "jsonl", "-4--4--seed0"),
    (4, "python", "pretrained-n4-seed0"),
    (1, "jsonl", "-4--1--seed0"),
    (4, "python", "pretrained-n4-seed0"),
  ]
  assert {c.data.loss_on for c, _ in trained} == {"answer", "all"}
  rows = tidy.read(tmp_path)
  (line, *_) = finetuning_report.lines(rows, "oracle")
  assert line.name == "(1, 1)" and line.points == {1: [0.25], 2: [0.5]}
  assert "| (4, 1) | 25.0% | 50.0% |" in finetuning_report.tables(rows)


@pytest.mark.slow
def test_figures_of_drafts():
  """What is measured of a model, on a small corpus of this machine."""
  scale = drafts_scales.SCALES["test"]
  # Heads without layers compile soonest.
  cfg = scale.cfg.replace(model={"head": "unembedding", "layers": 1}).check()
  net = parameters.model_of(cfg.model, 0.3)
  found = list(drafts.figures(net, cfg, scale))
  values = {figure.metric: figure.value for figure in found}
  assert {figure.step for figure in found} == {4}
  assert 1 <= values["tokens per forward"] <= 4
  assert np.isclose(
    values["tokens per forward"],
    1 + sum(values[f"accepted {i}"] for i in (2, 3, 4)),
    atol=0.5,  # a text's last pass writes fewer tokens than it accepts
  )
  rows = [tidy.Row("c", "frozen", {}, 0, *f, *("",) * 4) for f in found]
  assert "| frozen |" in drafts_report.tables(rows)


def test_summaries_are_of_pairs_that_finetuning_holds_out(
  trained, tmp_path, monkeypatch
):
  """And the table has their ROUGE, by task and way."""
  found = [summaries.pair(f"text {i}", f"word {i}", 160) for i in range(60)]
  found.append(summaries.pair("too long to be learnt", "x" * 81, 160))
  monkeypatch.setattr(summaries, "built_in", lambda name, size: found)
  asked = []

  def evaluate(decoder, codec, held_out, **settings):
    asked.append((decoder.n_future, held_out))
    half = summaries.rouge.Score(0.5, 0.5, len(asked) / 10)
    return summaries.Summaries([], dict.fromkeys(NAMES, half), 1.0)

  monkeypatch.setattr(summaries, "evaluate", evaluate)
  scale = finetuning_scales.SCALES["test"]
  runs = writing.runs(scale, tmp_path, 1, ["docstrings"])
  outcome = sweep.run(runs, tmp_path)
  assert (len(outcome.done), outcome.failed) == (3, {})
  learnt = [json.loads(x) for x in (tmp_path / "docstrings.jsonl").open()]
  assert len(learnt) == 60
  held_out = summaries.split(found[:-1], 0.1)[1]
  assert [n for n, _ in asked] == [1, 4, 1]
  for _, pairs in asked:
    assert len(pairs) == 2 and set(pairs) <= set(held_out)
  for cfg, folder in trained:
    if "docstrings" in folder.name:
      data = cfg.data
      assert (data.loss_on, data.held_out) == ("answer", 0.1)
      assert data.path == str(tmp_path / "docstrings.jsonl")
  rows = tidy.finished(tidy.read(tmp_path), writing.CLAIM)
  text = summarisation_report.section(rows, tmp_path / tidy.FILE)
  assert f"| docstrings, (n, n') | {' | '.join(NAMES)} |" in text
  for way, f1 in ("(1, 1)", 0.1), ("(4, 4)", 0.2), ("(4, 1)", 0.3):
    assert f"| {way} |{f' {f1:.1%} |' * 5}" in text
  assert (tmp_path / "sweep.png").stat().st_size > 1000
