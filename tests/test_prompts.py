"""Prompts: padded as they are, or refused with the number that is wrong."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from mtp_jax.decode import prompts

VOCAB = 13


@st.composite
def cases(draw):
  """Prompts, the cache, and what must not pass: None or words of the error."""
  ids = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=41)
  rows = draw(st.lists(ids, min_size=1, max_size=5))
  cache_len = draw(st.none() | st.integers(1, 79))
  reserve = draw(st.integers(0, 23))
  wrong = draw(st.sampled_from(["", "", "empty", "id"]))
  i = draw(st.integers(0, len(rows) - 1))
  if wrong == "empty":
    rows[i] = []
    return rows, cache_len, reserve, f"prompt {i} is empty"
  if wrong == "id":
    bad = draw(
      st.sampled_from([-1, VOCAB, -(2**31), 2**31, 2**40])
      | st.integers(VOCAB, 10**6)
    )
    rows[i][draw(st.integers(0, len(rows[i]) - 1))] = bad
    return rows, cache_len, reserve, f"prompt {i} holds id {bad}, outside"
  if cache_len is not None:
    for i, row in enumerate(rows):
      if len(row) + reserve > cache_len:
        words = f"prompt {i} has {len(row)} tokens; with {reserve} positions"
        return rows, cache_len, reserve, words
  return rows, cache_len, reserve, ""


@hypothesis.settings(max_examples=1000, deadline=None)
@hypothesis.given(cases())
@hypothesis.example(
  ([[1, VOCAB]], None, 0, f"prompt 0 holds id {VOCAB}, outside")
)
def test_prompts_are_padded_as_they_are_or_refused_by_name(case):
  rows, cache_len, reserve, error = case
  if error:
    with pytest.raises(ValueError, match=error):
      prompts.pad(rows, VOCAB, cache_len=cache_len, reserve=reserve)
    return
  tokens, lengths = prompts.pad(
    rows, VOCAB, cache_len=cache_len, reserve=reserve
  )
  assert tokens.dtype == lengths.dtype == np.int32
  assert lengths.tolist() == [len(row) for row in rows]
  assert all(tokens[i, : len(r)].tolist() == r for i, r in enumerate(rows))
  assert not any(tokens[i, len(r) :].any() for i, r in enumerate(rows))
  if cache_len is not None:
    assert tokens.shape[1] + reserve <= cache_len


@pytest.mark.parametrize(
  "longest, width", [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64)]
)
def test_widths_are_powers_of_two(longest, width):
  tokens, _ = prompts.pad([[1] * longest, [2]], VOCAB)
  assert tokens.shape == (2, width)


def test_width_gives_way_to_the_cache():
  tokens, _ = prompts.pad([[1] * 17], VOCAB, cache_len=29, reserve=7)
  assert tokens.shape == (1, 22)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_arrays_of_any_integer_serve(dtype):
  tokens, lengths = prompts.pad([np.array([1, 2], dtype)], VOCAB)
  assert tokens[0, :2].tolist() == [1, 2] and lengths.tolist() == [2]


@pytest.mark.parametrize(
  "wrong, words",
  [
    ([], "no prompts"),
    ([[1], [0.5]], "prompt 1 holds float64"),
    ([[True]], "prompt 0 holds bool"),
    ([1, 2], "prompt 0 is 1, not a sequence"),
    (["text"], "prompt 0 is 'text', not a sequence"),
    ([[[1, 2]]], "not a sequence of token ids"),
    ([[2**63]], f"prompt 0 holds id {2**63}, outside"),
  ],
)
def test_what_is_no_list_of_ids_is_refused(wrong, words):
  with pytest.raises(ValueError, match=words):
    prompts.pad(wrong, VOCAB)
