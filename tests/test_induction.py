"""Induction: the stories, the names in them, and the measure."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest

from configs.paper import base
from configs.paper import induction as paper
from experiments.claims.induction import corpora, report, scales, training
from experiments.measure import device_loop, sweep, tidy
from mtp_jax import tokenizer
from mtp_jax.tasks import induction, stories
from tests import parameters


@pytest.fixture(scope="module")
def pools():
  names = stories.names(np.random.default_rng(0), 3600)
  return names[:1000], names[1000:]


@pytest.fixture(scope="module")
def written(pools):
  return stories.write(np.random.default_rng(1), 300, pools[0])


def test_names_are_two_tokens(pools):
  words = stories.vocabulary()
  assert len(set(words)) == len(words)
  every = np.concatenate(pools)
  assert len(np.unique(every, axis=0)) == 3600
  texts = {stories.read(pair) for pair in every}
  assert len(texts) == 3600 and not any(" " in text for text in texts)
  with pytest.raises(ValueError, match="3601 names: there are 3600"):
    stories.names(np.random.default_rng(0), 3601)


def test_mentions_are_those_of_names_met_before(written):
  """Found again by looking for pairs of halves of names."""
  ending = len(stories.vocabulary()) - len(stories.ENDINGS)
  beginning = ending - len(stories.BEGINNINGS)
  for tokens, length, mentions in zip(
    written.tokens, written.lengths, written.mentions, strict=True
  ):
    text = tokens[:length].tolist()
    assert text[0] == stories.BOS and text[-1] == stories.EOS
    assert not tokens[length:].any()
    seen, again = set(), []
    for i in range(length - 1):
      if beginning <= text[i] < ending:
        assert text[i + 1] >= ending
        pair = (text[i], text[i + 1])
        again += [i] * (pair in seen)
        seen.add(pair)
    assert mentions[mentions >= 0].tolist() == again
    assert 2 <= len(seen) <= 3
    assert all(again.count(i) == 1 for i in again)


def test_a_name_is_known_only_by_looking_back(written, pools):
  """The commonest ending of a beginning in training is mostly wrong."""
  train = stories.write(np.random.default_rng(2), 2000, pools[0])
  test = stories.write(np.random.default_rng(3), 200, pools[1])
  assert (np.unique(train.tokens).size) > 250  # words of all kinds occur

  def pairs(some):
    rows, columns = np.nonzero(some.mentions >= 0)
    places = some.mentions[rows, columns]
    return some.tokens[rows, places], some.tokens[rows, places + 1]

  counts = collections.defaultdict(collections.Counter)
  for first, second in zip(*pairs(train), strict=True):
    counts[first][second] += 1
  right = [
    counts[first].most_common(1)[0][0] == second
    for first, second in zip(*pairs(test), strict=True)
    if first in counts
  ]
  assert len(right) > 1500 and np.mean(right) < 0.02


def test_accuracy_counts_second_tokens(written):
  words = len(stories.vocabulary())
  net = parameters.random_model("unembedding", vocab=words, layers=1)
  some = stories.Stories(
    written.tokens[:5].copy(), written.lengths[:5], written.mentions[:5]
  )
  rows, columns = np.nonzero(some.mentions >= 0)
  places = some.mentions[rows, columns]
  assert induction.accuracy(net, some, rows=2) == 0  # a model of no training
  # Every third mention ends as the model would end it.
  read = jax.jit(lambda net, tokens: net(tokens))
  picked = np.arange(len(rows)) % 3 == 0
  for i in np.flatnonzero(picked):
    row, place = rows[i], places[i]
    logits = read(net, some.tokens[row : row + 1])[0, 0, place]
    some.tokens[row, place + 1] = logits.argmax()
  assert induction.accuracy(net, some, rows=2) == picked.mean()
  none = stories.Stories(some.tokens, some.lengths, some.mentions[:, :0])
  with pytest.raises(ValueError, match="no name comes twice"):
    induction.accuracy(net, none)


TALE = (
  'One day Lily met Tom. "Hello, Tom!" said Lily. The day was warm. '
  "Lily and Tom liked the Day of the Cat. A cat saw Tom."
)


def test_characters_of_a_text():
  assert induction.characters(TALE) == ["Lily", "Tom"]


def test_a_story_of_a_corpus_is_renamed():
  codec = tokenizer.Bytes()
  before = len(codec.encode("and"))
  # Of bytes " X" is two tokens: a space, and a letter.
  with pytest.raises(ValueError, match="0 names are two tokens"):
    induction.two_token_names(codec, np.random.default_rng(0), 1)
  names = ["Q", "Z"]
  assert all(len(codec.encode(f"and {n}")) == before + 2 for n in names)
  found = induction.renamed(
    ["nobody.", TALE], codec, names, np.random.default_rng(0), count=1
  )
  (text,) = [codec.decode(found.tokens[0, : found.lengths[0]])]
  assert not any(name in text for name in ("Lily", "Tom"))
  spaced = [text.count(f" {n}") for n in names]
  assert sum(spaced) == 7 and len(found.mentions[0]) == 7 - 2
  for place in found.mentions[0]:
    assert codec.decode(found.tokens[0, place : place + 2])[1] in "QZ"
  with pytest.raises(ValueError, match="1 stories have characters"):
    induction.renamed([TALE], codec, names, np.random.default_rng(0), count=2)


def test_a_corpus_by_its_path(tmp_path, monkeypatch):
  letters = [*"ABCDEFGHIJ"]  # behind a space, two bytes
  monkeypatch.setattr(induction, "two_token_names", lambda *_: letters)
  path = tmp_path / "tales.jsonl"
  tales = [f"{TALE} It was day {i}." for i in range(400)]
  path.write_text("".join(json.dumps({"text": t}) + "\n" for t in tales))
  monkeypatch.setenv("HOME", str(tmp_path))
  corpus = corpora.loaded(path, "bytes", 3, 128, 2)
  assert corpus.vocab == 259 and corpus.rows.tokens.shape[1] == 130
  assert corpus.rows.weight[0].all() and len(corpus.test) == 3
  assert (corpus.test.mentions >= 0).any()
  for row, mentions in zip(
    corpus.test.tokens, corpus.test.mentions, strict=True
  ):
    for place in mentions[mentions >= 0]:
      assert bytes(row[place : place + 2].tolist()).decode()[1] in letters


def test_a_corpus_of_stories_and_books():
  corpus = corpora.written(20_000, 10, 100, 0.5, 512, 2)
  assert corpus.rows.tokens.shape[1] == 514 and corpus.test.lengths.min() > 50
  share = corpus.rows.weight.sum() / 20_000
  assert 0.8 < share < 1.4  # as many tokens as were asked for, about
  # No row has a name of the tests.
  tested = {
    tuple(pair)
    for row, mentions in zip(
      corpus.test.tokens, corpus.test.mentions, strict=True
    )
    for pair in [row[i : i + 2].tolist() for i in mentions if i >= 0]
  }
  rows = corpus.rows.tokens
  trained = set(zip(rows[:, :-1].flat, rows[:, 1:].flat, strict=True))
  assert tested and not (tested & trained)


def test_the_sweep(tmp_path, monkeypatch):
  """Its figures, of a model that nothing trains: no program compiles."""

  def train(cfg, rows, *, steps_per_call, folder, depends_on):
    assert folder.is_dir() and depends_on["n"] == cfg.model.n_future
    net = parameters.model_of(cfg.model)
    for call in range(cfg.train.steps // steps_per_call):
      shape = rows(call).tokens.shape
      assert shape == (steps_per_call * 2, 256 + cfg.model.n_future)
      step, nats = (call + 1) * steps_per_call, np.ones(cfg.model.n_future)
      yield device_loop.Progress(step, net, nats, float(call), 512 * call)

  monkeypatch.setattr(device_loop, "train", train)
  runs = training.runs(scales.SCALES["test"])
  assert [one.name for one in runs] == [
    *("tiny n=1", "tiny n=2", "tiny n=1 books=0.9", "tiny n=2 books=0.9")
  ]
  assert not sweep.run(runs[1:2], tmp_path).failed
  rows = tidy.read(tmp_path)
  curve = [r.value for r in rows if r.metric == "accuracy"]
  assert len(curve) == 2
  assert [line.points for line in report.best(rows)] == [{"tiny": [max(curve)]}]
  assert "| n=2 |" in report.section(rows, tmp_path / tidy.FILE)
  assert (tmp_path / "sweep.png").exists()


def test_when_a_run_knew_half_of_the_names():
  rows = [
    tidy.Row(
      "induction",
      f"1M n={n}",
      {"n": n, "size": "1M", "books": 0},
      seed,
      step,
      "accuracy",
      step / 100 / n,
      *("",) * 4,
    )
    for n in (1, 2, 9)
    for seed in (0, 1)
    for step in (40, 50, 60, 100)
  ]
  found = report.steps_to(rows, 0.5)
  assert [(line.name, line.points) for line in found] == [
    ("n=1", {"1M": [50, 50]}),
    ("n=2", {"1M": [100, 100]}),
  ]


@pytest.mark.parametrize("books, end", [(0.0, ""), (0.9, "-books")])
def test_the_papers_scale_is_its_config(books, end):
  cfg = scales.SCALES["paper"].config("3M", 2, 1, 311, books)
  theirs = paper.get_config(f"3M-n2{end}")
  theirs = theirs.replace(model={"vocab": 311}, train={"seed": 1})
  assert cfg == base.one_row_per_chip(theirs, 1)


@pytest.mark.slow
def test_a_run_resumes_where_it_was_killed(tmp_path, monkeypatch):
  """Its figures are those of a run that was not, and none is there twice."""
  monkeypatch.setattr(device_loop, "SAVE_S", 0)
  scale = dataclasses.replace(scales.SCALES["test"], steps=8, evaluations=4)
  (one,) = training.runs(scale)[1:2]

  def killed(folder):
    for figure in one.measure(folder):
      if figure.step == 8:  # what was saved last is step 4
        raise KeyboardInterrupt
      yield figure

  assert sweep.run([one], tmp_path / "whole").done
  cut = tmp_path / "cut"
  with pytest.raises(KeyboardInterrupt):
    sweep.run([dataclasses.replace(one, measure=killed)], cut)
  assert sweep.run([one], cut).done

  def figures(folder):
    return [
      (row.step, row.metric, row.value)
      for row in tidy.read(folder)
      if row.metric not in ("seconds", "tokens_per_second")
    ]

  assert figures(cut) == figures(tmp_path / "whole")
  (cut / tidy.FILE).unlink()  # but not what is saved
  again = training.runs(scale)[1:2]
  (why,) = sweep.run(again, cut).failed.values()
  assert "has no figure of that step: remove" in why


def test_a_corpus_that_is_missing_is_said_before_the_first_run(tmp_path):
  for path, codec, why in (
    (tmp_path / "none.jsonl", "bytes", "none.jsonl' does not exist"),
    (tmp_path, "none.model", "tokenizer 'none.model' is neither"),
  ):
    runs = training.runs(scales.SCALES["test"], path, codec)
    assert "names" not in runs[0].overrides
    with pytest.raises(ValueError, match=why):
      sweep.run(runs, tmp_path / "out")
  assert [p.name for p in (tmp_path / "out").iterdir()] == ["lock"]
