"""Loss on answers alone: prompts are read, and no head learns them."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from mtp_jax import config, loss, tokenizer, tokenizer_training
from mtp_jax.data import batch as batch_lib
from mtp_jax.data import corpora, pipeline
from mtp_jax.tasks import pairs as pairs_lib
from mtp_jax.train import report
from tests import tokenizer_files

N, T, ROWS = 3, 29, 4


@pytest.fixture
def pairs():
  return [
    (f"Q{i}: {'why? ' * (i % 5)}", f"A{i}" * (1 + i % 7)) for i in range(61)
  ]


@pytest.fixture
def data(tmp_path, pairs):
  """A corpus of pairs, with one empty answer and an empty cache."""
  lines = [{"prompt": p, "answer": a} for p, a in [*pairs, ("Q?", "")]]
  path = tmp_path / "corpus.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  return config.Data(
    source="jsonl",
    path=str(path),
    cache=str(tmp_path / "c"),
    prompt="prompt",
    field="answer",
    loss_on="answer",
    held_out=0.2,
    batch=ROWS,
    seq_len=T,
  ).check()


def test_every_head_learns_the_tokens_of_answers(data, pairs):
  """Head i's target at t has the weight of token t+i: a plain loop."""
  codec, known = tokenizer.Bytes(), {f"{p}{a}": (p, a) for p, a in pairs}
  seen = set()
  for packed in pipeline.pack(data, codec):
    tokens, starts = np.asarray(packed.tokens), np.asarray(packed.starts)
    # (document, whether it is learnt) of every token
    places, answers = [], []
    for d, document in enumerate(np.split(tokens, starts[1:])):
      text = codec.decode(document)
      prompt, answer = known[text]
      seen.add(text)
      answers.append(answer)
      for j in range(len(document)):
        places.append((d, j > len(prompt)))
      assert (document[0], document[-1]) == (codec.bos, codec.eos)
    for index in range(packed.windows(T)):
      row = packed.window(index, T, N)
      rows = (row.tokens, row.segments, row.weight)
      batch = batch_lib.of(*(array[None] for array in rows))
      found = jax.tree.map(np.asarray, loss.future_targets(batch, N))
      for i, t in np.ndindex(N, T):
        here, there = index * T + t, index * T + t + 1 + i
        inside = there < len(tokens) and places[here][0] == places[there][0]
        assert found.tokens[i, 0, t] == (tokens[there] if inside else -1)
        if inside:
          assert found.weight[i, 0, t] == places[there][1]
    counted = sum(len(a) + 1 for a in answers)  # eos is learnt
    assert np.sum(packed.weight) == counted
    size = sum(map(len, answers))
    assert packed.bytes_per_token == size / counted
    assert f" {size} bytes of answers, " in report._size(packed)
  assert seen == set(known)
  assert packed.skipped == {"empty": 1}


def test_another_choice_packs_anew(data):
  codec = tokenizer.Bytes()
  answers, every, alone = (
    pipeline.pack(dataclasses.replace(data, **changed), codec)
    for changed in ({}, {"loss_on": "all"}, {"loss_on": "all", "prompt": ""})
  )
  np.testing.assert_array_equal(answers[0].tokens, every[0].tokens)
  assert every[0].weight is None and alone[0].weight is None
  prints = {packed[0].fingerprint for packed in (answers, every, alone)}
  assert len(prints) == 3
  again = pipeline.pack(data, codec)
  assert again[0].fingerprint == answers[0].fingerprint
  rows = pipeline.batch_at(
    again[0], 0, pipeline.Batching(batch=ROWS, seq_len=T, reach=N, seed=0)
  )
  assert set(rows.weight.ravel()) == {0, 1}
  for file in pathlib.Path(data.cache).glob("*/train.weight"):
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
  with pytest.warns(UserWarning, match="packing anew.*train.weight"):
    mended = pipeline.pack(data, codec)
  np.testing.assert_array_equal(mended[0].weight, again[0].weight)


@pytest.mark.parametrize("kind", ["bytes", "sp", *tokenizer_files.KINDS])
def test_no_piece_spans_a_prompt_and_its_answer(kind, tmp_path):
  """The prompt has the ids that a decoder is given."""
  if kind == "bytes":
    codec = tokenizer.Bytes()
  elif kind == "sp":
    text = tokenizer_files.TEXT * 9
    codec = tokenizer_training.train([text], tmp_path / "m", 300)
  else:
    codec = tokenizer.load(
      str(
        tokenizer_files.write(
          tmp_path,
          tokenizer_files.train(kind),
          tokenizer_config=tokenizer_files.NAMES,
        )
      )
    )
  spans = set()
  for before in ("To be", "To b", "the ", "question.\n", "é"):
    for after in (" or not", "e or not", "\nto", "ï", "that"):
      first, rest = codec.encode(before), codec.encode_after(after, before)
      joined = codec.encode(before + after)
      spans.add(list(joined[: len(first)]) != list(first))
      if list(joined[: len(first)]) == list(first):
        assert [*first, *rest] == list(joined)
        assert codec.decode(rest, after=first) == after
      else:
        assert list(rest) == list(codec.encode(after))
  assert spans == ({False} if kind == "bytes" else {True, False})


def test_what_pairs_write_is_what_data_reads(tmp_path, pairs):
  path = tmp_path / "pairs.jsonl"
  some = [
    pairs_lib.Pair(pairs_lib.conditioned(prompt, i % 2 == 0), f"{answer}é")
    for i, (prompt, answer) in enumerate(pairs)
  ]
  assert pairs_lib.write(path, some) == len(some)
  data = pairs_lib.data(path, loss_on="answer").check()
  found = [
    (d.text[: d.answer].decode(), d.text[d.answer :].decode())
    for d in corpora.read(data)
  ]
  assert found == some and found[1][0].startswith("# incorrect\nQ1")


@pytest.mark.parametrize(
  "line, reason",
  [
    ('{"answer": "a"}', "missing field: no 'prompt' among"),
    ('{"prompt": "a"}', "missing field: no 'answer' among"),
    ('{"prompt": 1, "answer": "a"}', "'prompt' is a int, not a string"),
  ],
)
def test_a_damaged_pair_is_named(data, line, reason):
  with open(data.path, "a", encoding="utf-8") as file:
    file.write(f"\n{line}\n")
  with pytest.raises(ValueError, match=rf"corpus.jsonl:63: .*{reason}"):
    list(corpora.read(data))
  skipped = corpora.Skipped()
  found = list(
    corpora.read(dataclasses.replace(data, on_error="skip"), skipped)
  )
  assert len(found) == 61 and skipped["missing field"] == 1


def test_half_an_answer_is_not_learnt(data):
  documents = list(corpora.read(data))
  size = len(documents[0].text) + len(documents[1].text)
  for more, count in ((0, 2), (1, 2), (-1, 1)):
    limited = dataclasses.replace(data, max_bytes=size + more)
    assert list(corpora.read(limited)) == documents[:count]
  limited = dataclasses.replace(data, max_bytes=3)
  with pytest.raises(ValueError, match="no room for the first prompt and"):
    list(corpora.read(limited))


def test_a_pair_is_held_out_whole(data, pairs, tmp_path):
  long = [{"prompt": "x" * 100, "answer": f"{i}" * 100} for i in range(2)]
  for count in (2, 1):
    path = tmp_path / f"{count}.jsonl"
    path.write_text("\n".join(map(json.dumps, long[:count])))
    few = dataclasses.replace(data, path=str(path), held_out=1e-9, batch=1)
    if count == 1:
      with pytest.raises(ValueError, match="one prompt with its answer"):
        pipeline.pack(few, tokenizer.Bytes())
      continue
    with pytest.warns(UserWarning, match="held out is 2.jsonl:1, 200 bytes"):
      both = pipeline.pack(few, tokenizer.Bytes())
    assert [p.documents for p in both] == [1, 1]
    assert [int(np.sum(p.weight)) for p in both] == [101, 101]


@pytest.mark.parametrize(
  "fields, line",
  [
    ({"loss_on": "answers"}, "data.loss_on is 'answers'; choose one of all, "),
    ({"prompt": ""}, "data.loss_on is 'answer', but data.prompt is empty"),
    ({"source": "text"}, "data.source is 'text', whose documents have no"),
    ({"field": "prompt"}, "data.prompt and data.field are both 'prompt'"),
  ],
)
def test_settings_that_cannot_be(data, fields, line):
  with pytest.raises(ValueError, match=line):
    dataclasses.replace(data, **fields).check()
