"""One prompt's texts while they are written, and where strings end them."""

import bisect
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mtp_jax import tokenizer
from mtp_jax.decode import generate, interface, loop, prompts


@dataclasses.dataclass(frozen=True)
class Pass:
  """What one forward pass added to the texts."""

  tokens: list[np.ndarray]  # new ones of each sample
  done: np.ndarray  # [samples] bool: the text is whole
  first: bool  # the first pass of its program: compiling may be part of it


def stream(
  decoder: interface.Decoder,
  prompt: Sequence[int],
  *,
  samples: int = 1,
  **settings: Any,
) -> Iterator[Pass]:
  """The prompt's pass, then each further one, as it is finished.

  The texts equal those of `generate.generate` of the prompt `samples` times;
  the prompt is read once.

  Example, with the run that the example of `mtp_jax.fit` trains:
    >>> import mtp_jax
    >>> from mtp_jax.decode import stream
    >>> net, _, codec = mtp_jax.load("runs/tiny")
    >>> decoder = mtp_jax.lay_out(net, codec.vocab)
    >>> prompt = [codec.bos, *codec.encode("To be")]
    >>> passes = stream.stream(decoder, prompt, heads=4, max_new=9)
    >>> sum(len(each.tokens[0]) for each in passes)
    9

  Args:
    decoder: from `mtp_jax.lay_out(model)`.
    prompt: token ids.
    samples: texts to write.
    **settings: of `interface.check_settings`: heads and max_new; if wanted
      stop, rule and seed.

  Raises:
    ValueError: as `generate.generate`, in the first step; samples below 1.
      In the step in which it happens: logits that are not finite.
  """
  checked = interface.check_settings(decoder, **settings)
  tokens, lengths = prompts.pad([prompt], decoder.vocab)
  state = generate.start(decoder, tokens, lengths, checked, samples=samples)
  begin, first, passes = [len(prompt)] * samples, True, 0
  while True:
    texts = generate.collect(state, begin)
    generate.finite(enumerate(texts))
    done = np.asarray(state.done)
    yield Pass([t.tokens for t in texts], done, first)
    if done.all():
      return
    begin = [b + len(t.tokens) for b, t in zip(begin, texts, strict=True)]
    roomy = loop.make_room(decoder, state)
    first = not passes or roomy is not state
    state = loop.advance_jit(decoder, checked.rule, roomy)
    passes += 1


@dataclasses.dataclass
class Count:
  """What texts took: all passes, and those behind their program's first."""

  tokens: int = 0
  passes: int = 0  # after the prompt's, of each text that was not whole
  written: int = 0  # tokens by these passes
  timed: int = 0  # tokens by passes that compiled nothing
  seconds: float = 0.0  # of these

  def watch(self, passes: Iterable[Pass]) -> Iterator[Pass]:
    """`passes` as they are, counted; time between them is not."""
    begin, live = time.perf_counter(), None
    for each in passes:
      new = sum(map(len, each.tokens))
      self.tokens += new
      if live is not None:
        self.passes += int(live.sum())
        self.written += new
      if not each.first:
        self.timed += new
        self.seconds += time.perf_counter() - begin
      live = ~each.done
      yield each
      begin = time.perf_counter()


def sample(passes: Iterable[Pass], i: int) -> Iterator[np.ndarray]:
  """What each pass added to text i, up to its end."""
  for each in passes:
    yield each.tokens[i]
    if each.done[i]:
      return


def until(parts: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
  """The text of `parts` up to the first of the strings, that left out.

  The first is the one that ends first. What may be the beginning of one waits
  for the next part.
  """
  text = ""
  for part in parts:
    text += part
    if (end := first(text, *stops)) is not None:
      yield text[:end]
      return
    waits = max((_overlap(text, s) for s in stops), default=0)
    yield text[: len(text) - waits]
    text = text[len(text) - waits :]
  yield text


def ends(
  codec: tokenizer.Tokenizer,
  prompts: Sequence[Sequence[int]],
  find: Callable[[int, str], int | None],
) -> Callable[[int, np.ndarray], int | None]:
  """The argument `end` of `serve.generate_all`, where strings end texts.

  Args:
    codec: of the prompts and the texts.
    prompts: those of the call.
    find: takes a prompt's place and the text after it; returns where the text
      ends, in characters, or None.

  Example:
    >>> from mtp_jax import tokenizer
    >>> from mtp_jax.decode import stream
    >>> codec = tokenizer.Bytes()
    >>> end = stream.ends(
    ...   codec, [codec.encode("a")], lambda _, text: stream.first(text, "d")
    ... )
    >>> end(0, codec.encode("bcde"))
    3
  """

  def kept(place, tokens):
    def ended(count):
      text = codec.decode(tokens[:count], after=prompts[place])
      return find(place, text) is not None

    counts = range(1, len(tokens) + 1)
    if not counts or not ended(counts[-1]):
      return None
    return counts[bisect.bisect_left(counts, True, key=ended)]

  return kept


def first(text: str, *stops: str) -> int | None:
  """Where the first of the strings begins, by its end; None: nowhere."""
  places = [(text.find(s) + len(s), text.find(s)) for s in stops if s in text]
  return min(places)[1] if places else None


def _overlap(text: str, stop: str) -> int:
  """Characters at the end of `text` with which `stop` may begin."""
  sizes = range(min(len(text), len(stop) - 1), 0, -1)
  return next((n for n in sizes if text.endswith(stop[:n])), 0)
