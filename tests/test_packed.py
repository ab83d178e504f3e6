"""Windows and excerpts of packed documents: every pair of tokens once."""

import dataclasses

import numpy as np
import pytest

from mtp_jax.data import pipeline


def in_memory(lengths):
  """Documents of these lengths; every token is its own position."""
  total = sum(lengths)
  return pipeline.Packed(
    tokens=np.arange(total, dtype=np.uint32),
    starts=np.cumsum([0, *lengths[:-1]], dtype=np.int64),
    bytes_per_token=1.0,
    fingerprint="",
    documents=len(lengths),
    skipped={},
  )


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("seq_len", [2, 3, 5, 7, 13, 101])
def test_every_pair_inside_a_document_is_in_one_window_once(n, seq_len):
  lengths = np.random.default_rng(n).integers(1, 12, 29).tolist()
  packed = in_memory(lengths)
  wanted, start = [], 0
  for length in lengths:
    inside = range(start, start + length)
    pairs = [(p, p + i) for p in inside for i in range(1, n + 1)]
    wanted += [(p, q) for p, q in pairs if q in inside]
    start += length
  found = []
  for w in range(packed.windows(seq_len)):
    window = packed.window(w, seq_len, n)
    tokens, segments = window.tokens, window.segments
    assert tokens.dtype == segments.dtype == np.int32
    assert tokens.shape == segments.shape == (seq_len + n,)
    found += [
      (int(tokens[t]), int(tokens[t + i]))
      for t in range(seq_len)
      for i in range(1, n + 1)
      if segments[t] == segments[t + i] != 0
    ]
  assert sorted(found) == sorted(wanted)


def test_segments_count_documents_and_mark_the_padding():
  packed = in_memory([3, 1, 4])
  window = packed.window(1, 5, 7)
  assert window.tokens.tolist() == [5, 6, 7] + [0] * 9
  assert window.segments.tolist() == [3] * 3 + [0] * 9
  assert window.weight.tolist() == [1] * 3 + [0] * 9
  assert packed.window(0, 5, 0).segments.tolist() == [1, 1, 1, 2, 3]
  for index in (-1, 2):
    with pytest.raises(IndexError, match=f"window {index} of 2"):
      packed.window(index, 5, 1)


def test_a_window_has_the_weights_of_its_tokens():
  weight = np.array([1, 0, 0.5, 1, 0, 0, 1, 1], np.float32)
  packed = dataclasses.replace(in_memory([3, 1, 4]), weight=weight)
  for index, seq_len, n in ((0, 5, 2), (1, 5, 2), (1, 3, 0)):
    window = packed.window(index, seq_len, n)
    assert window.weight.dtype == np.float32
    inside = window.segments > 0
    np.testing.assert_array_equal(
      window.weight, np.where(inside, weight[window.tokens], 0)
    )
  batching = pipeline.Batching(batch=2, seq_len=4, reach=1, seed=0)
  rows = pipeline.batch_at(packed, 0, batching)
  assert sorted(rows.weight.tolist()) == [[0, 0, 1, 1, 0], [1, 0, 0.5, 1, 0]]
  with pytest.raises(ValueError, match="7 weights for 8 tokens"):
    dataclasses.replace(packed, weight=weight[:7])
  for wrong in (-1, np.nan, np.inf):
    weight[6] = wrong
    packed.window(0, 5, 1)
    with pytest.raises(ValueError, match=f"token 6 is {float(wrong)}: "):
      packed.window(1, 5, 1)


def test_excerpts_lie_in_one_document_each():
  sizes = np.array([7, 23, 3, 11, 40])
  starts = np.cumsum(sizes) - sizes
  packed = pipeline.Packed(
    np.arange(sizes.sum()), starts, 1.0, "", len(sizes), {}
  )
  first = [0, 7, 33, 44]  # of the documents of 7 tokens and more
  pieces = [0, 7, 14, 33, 44, 51]  # at most two of each
  for per_document, want in ((1, first), (2, pieces)):
    got = packed.excerpts(len(want), 5, 7, per_document)
    assert [g.tolist() for g in got] == [list(range(s, s + 5)) for s in want]
    few = packed.excerpts(3, 5, 7, per_document)
    places = [0, (len(want) - 1) // 2, len(want) - 1]
    assert [g[0] for g in few] == [want[i] for i in places]
  with pytest.raises(
    ValueError,
    match="only 10 pieces .* 7 tokens, but 11 .*at most 10, or hold out more",
  ):
    packed.excerpts(11, 5, 7)
  with pytest.raises(ValueError, match="but 1 were asked for: hold out more"):
    packed.excerpts(1, 5, 41)


def test_a_document_gives_more_excerpts_where_others_are_lacking():
  """One long document, as one text file has, among short ones."""
  starts = np.array([0, 3, 6, 76])
  packed = pipeline.Packed(np.arange(79), starts, 1.0, "", 4, {})
  for per_document in (1, 8):
    got = packed.excerpts(10, 5, 7, per_document)
    assert [g[0] for g in got] == list(range(6, 76, 7))
