"""ROUGE and the tasks of summaries, against definitions and by hand."""

import gzip
import json
import sys

import numpy as np
import pytest

from mtp_jax import tokenizer
from mtp_jax.data import pipeline
from mtp_jax.evaluate import rouge
from mtp_jax.tasks import man_pages, subset, summaries
from mtp_jax.tasks import pairs as pairs_lib
from tests import rouge_reference
from tests.mocks import Mock, mock_text


def test_rouge_equals_its_definition():
  pairs = rouge_reference.pairs()
  assert {len(reference) > 0 for reference, _ in pairs} == {True, False}
  for pair in pairs:
    found, want = rouge.score(*pair), rouge_reference.score(*pair)
    assert tuple(found) == rouge.NAMES == tuple(want)
    for name in rouge.NAMES:
      np.testing.assert_allclose(found[name], want[name], atol=1e-12)
  some = [pair for pair in pairs if rouge.words(pair[0])]
  means = rouge.mean(some)
  f1 = [rouge.score(*pair)["rougeLsum"].f1 for pair in some]
  assert means["rougeLsum"].f1 == pytest.approx(np.mean(f1))


def test_rouge_by_hand():
  found = rouge.score("the cat sat\non the mat", "the mat\nthe cat ran")
  assert found["rouge1"] == pytest.approx(
    (4 / 5, 4 / 6, 8 / 11)
  )  # the, the, cat, mat
  assert found["rouge2"] == pytest.approx((2 / 4, 2 / 5, 4 / 9))
  assert found["rouge3"] == (0, 0, 0)
  assert found["rougeL"] == pytest.approx((2 / 5, 2 / 6, 4 / 11))
  assert found["rougeLsum"] == pytest.approx((4 / 5, 4 / 6, 8 / 11))
  thai = rouge.score("กข คง", "กข จ", words=rouge.unicode_words)
  assert thai["rouge1"].f1 == 0.5
  # Words of three letters and fewer are left as they are.
  pair = "Cats are sitting", "a cat sits as"
  assert rouge.stems(pair[0]) == ["cat", "are", "sit"]
  assert rouge.score(*pair)["rouge2"].f1 == 0
  assert rouge.score(*pair, rouge.stems)["rougeL"][:2] == (2 / 4, 2 / 3)


def test_words_of_other_alphabets():
  assert rouge.unicode_words("L'ÉTÉ_12e,\n ok") == ["l", "été", "12e", "ok"]
  assert rouge.unicode_words("e\u0301") == ["é"]  # the same word, written apart
  assert rouge.unicode_words("می\u200cشود.") == ["می", "شود"]
  assert rouge.characters("ที่กำ Ab 12!") == [*("ที่", "ก", "ำ"), *"ab12"]
  assert rouge.unicode_words("—…") == rouge.characters("—…") == []


def test_each_set_is_scored_in_its_alphabet():
  for name, text in (
    ("orangesum", "À"),
    ("pn_summary", "خبر"),
    ("wikisummary", "خبر"),
    ("thaisum", "ข่าว"),
    ("xsum", "News"),
  ):
    rouge.check([text], summaries.SETS[name].words)
  assert summaries.SETS["samsum"].words is rouge.words


def test_rouge_needs_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
  for scored in (lambda: rouge.check(["a"]), lambda: rouge.score("a", "a")):
    with pytest.raises(ValueError, match="needs rouge-score .*pip install rou"):
      scored()


@pytest.mark.parametrize(
  "pairs, line",
  [
    ([], "there is no summary to score"),
    ([("a", "a"), ("กข", "กข")], "reference 1 has no word: 'กข'; leave it"),
  ],
)
def test_references_that_nothing_matches_are_refused(pairs, line):
  with pytest.raises(ValueError, match=line):
    rouge.mean(pairs)


MAN = r"""'\" t
.\" a comment
.TH LS "1"
.SH "NAME"
ls, \fBdir\fR \- list \(lqdirectory\(rq contents\&.
.SH SYNOPSIS
.B ls
.SH DESCRIPTION
.PP
List \fIthings\fR about
.BR ls (1),
\e and \(aqso\(aq on.  Sort.
.TP
.SH BUGS
none
"""
MDOC = ".Dd x\n.Sh NAME\n.Nm nc\n.Nd arbitrary TCP\n.Sh DESCRIPTION\nThe\n.Nm nc\nutility.\n"  # noqa: E501


def test_a_manual_page_is_read(tmp_path):
  page = man_pages.parse(MAN)
  assert page.names == "ls, dir"
  assert page.summary == 'list "directory" contents.'
  assert page.description == "List things about ls(1), \\ and 'so' on. Sort."
  assert man_pages.parse(MDOC) == ("nc", "arbitrary TCP", "The nc utility.")
  for less in (MAN.replace("DESCRIPTION", "OPTIONS"), ".so man1/ls.1", ""):
    assert man_pages.parse(less) is None
  assert len(man_pages.parse(MAN, size=3).description) < 30

  with pytest.raises(ValueError, match="no manual pages in .*install man-db"):
    list(man_pages.read(tmp_path))
  folder = tmp_path / "man1"
  folder.mkdir()
  (folder / "ls.1.gz").write_bytes(gzip.compress(MAN.encode()))
  (folder / "dir.1.gz").symlink_to(folder / "ls.1.gz")
  (folder / "nc.1").write_text(MDOC)
  (folder / "cut.1.gz").write_bytes(gzip.compress(MAN.encode())[:-9])
  assert [p.names for p in man_pages.read(tmp_path)] == ["ls, dir", "nc"]


@pytest.mark.parametrize(
  "source, want",
  [
    ('# (c) me\n\n"""Adds\n numbers.\n\nMore."""\nx = 1\n', "Adds numbers."),
    ("r'''Raw \\d.'''\nx = 1\n", "Raw \\d."),
    ("x = 1\n", None),
    ('"""Alone."""\n', None),
    ('"""Not closed\n', None),
    ('b"""Bytes."""\nx = 1\n', None),
    ('"a" % b\nx = 1\n', None),
    ("", None),
    ('""\nx = 1\n', None),
  ],
)
def test_a_docstring_and_its_source(source, want):
  found = summaries.docstring(source)
  assert found == (want and ("x = 1", want))


def test_the_tasks_that_a_machine_has(monkeypatch):
  from mtp_jax.data import corpora

  documents = [corpora.Document(f"{i}.py", b'"""One."""\nx = 1\n')
               for i in range(2)]  # fmt: skip
  monkeypatch.setattr(corpora, "read", lambda data: iter(documents))
  assert summaries.built_in("docstrings", 3) == [("x =\n\nSummary:", " One.")]
  pages = [man_pages.Page("ls", "list", "List all.")]
  monkeypatch.setattr(man_pages, "read", lambda size: iter(pages))
  assert summaries.built_in("man_pages", 5) == [("List\n\nSummary:", " list")]
  with pytest.raises(ValueError, match="no task 'man'; choose one of man_page"):
    summaries.built_in("man", 5)


@pytest.mark.parametrize("name", summaries.SETS)
def test_a_set_is_read_by_its_fields(name, tmp_path):
  fields, path = summaries.SETS[name], tmp_path / "test.jsonl"
  rows = [{fields.text: f"Text {i}.", fields.summary: f"{i} é"} for i in (1, 2)]
  path.write_text("\n".join(map(json.dumps, rows)))
  found = list(summaries.read(path, fields, 6))
  assert found == [(f"Text {i}\n\nSummary:", f" {i} é") for i in (1, 2)]
  for more, line in (
    ({fields.text: "x"}, f"test.jsonl:3: missing field: no '{fields.summary}'"),
    ({fields.text: " ", fields.summary: "x"}, "test.jsonl:3: .* is empty: rem"),
  ):
    path.write_text("\n".join(map(json.dumps, [*rows, more])))
    with pytest.raises(ValueError, match=line):
      list(summaries.read(path, fields, 6))
  with pytest.raises(ValueError, match="there is no file .*none.jsonl"):
    list(summaries.read(tmp_path / "none.jsonl", fields, 6))


def test_pairs_are_held_out_as_the_corpus_is(tmp_path):
  found = [summaries.pair(f"Text {i}", f"sum {i}", 99) for i in range(50)]
  train, test = summaries.split(found, 0.3)
  assert sorted(train + test) == sorted(found) and 5 < len(test) < 25
  pairs_lib.write(tmp_path / "p.jsonl", found)
  data = pairs_lib.data(
    tmp_path / "p.jsonl", cache=str(tmp_path), held_out=0.3, batch=1
  )
  codec = tokenizer.Bytes()
  packed = pipeline.pack(data, codec)[1]
  texts = np.split(np.asarray(packed.tokens), packed.starts[1:])
  assert [codec.decode(t) for t in texts] == [p + a for p, a in test]


def test_some_are_taken_in_equal_steps():
  assert subset.evenly(range(164), 4) == [0, 41, 82, 123]
  assert subset.evenly(range(19), 10) == [0, 1, 3, 5, 7, 9, 11, 13, 15, 17]
  assert subset.evenly("abc", 3) == ["a", "b", "c"]
  with pytest.raises(ValueError, match="problems=4: there are 3; ask for few"):
    subset.evenly("abc", 4)


def test_summaries_are_scored_against_their_answers():
  """A decoder with a text that is known; two prompts, one of them twice."""

  class Codec(tokenizer.Bytes):
    prefix, ends = (3,), (4,)

    def encode(self, text):
      return np.frombuffer(text.encode(), np.uint8).astype(np.int32) % 13

    def decode(self, ids, after=()):
      return " " + " ".join(f"w{i}" for i in ids) + " "

  mock = Mock(np.full((1, 99), 3), 13, 3)
  codec, prompts = Codec(), ("ab", "abcd")
  written = [mock_text([3, *codec.encode(p)], 13, 9, stop=4) for p in prompts]
  texts = [" ".join(f"w{i}" for i in ids) for ids in written]
  pairs = [
    pairs_lib.Pair(p, a)
    for p, a in zip(prompts, (f" {texts[0]}", " other words"), strict=True)
  ]
  found = summaries.evaluate(mock, codec, pairs, heads=3, max_new=9, rows=2)
  assert found.texts == texts
  assert found.rouge["rougeL"] == (0.5, 0.5, 0.5)
  assert found.tokens_per_forward > 1
  with pytest.raises(ValueError, match="reference 0 has no word"):
    summaries.evaluate(mock, codec, [pairs_lib.Pair("a", " .")])
  by_character = summaries.evaluate(
    mock, codec, pairs, heads=1, max_new=9, rows=2, words=rouge.characters
  )
  assert by_character.texts == texts
  assert by_character.rouge["rouge1"].f1 > 0.5  # the second has a w, too
