"""What lm-evaluation-harness asks of a model: likelihoods and texts.

`adapter` makes the object that `lm_eval.simple_evaluate(model=...)` takes. The
package is an extra: `pip install lm_eval`. Task files for the paper's
benchmarks, over local data, are in configs/harness.
"""

import collections
from collections.abc import Sequence
from typing import Any, Protocol

from mtp_jax import tokenizer
from mtp_jax.decode import accept, interface, sampling, serve, stream
from mtp_jax.decode import tree as tree_lib
from mtp_jax.evaluate import likelihood

# Of a request to generate; others are refused, but for those that say nothing
# here: greedy decoding has no temperature.
_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class Request(Protocol):
  """A request of the harness: an `lm_eval.api.instance.Instance`."""

  args: tuple


class Served:
  """Answers requests: the methods that a model of lm-evaluation-harness has.

  Args:
    decoder: from `mtp_jax.lay_out(model, codec.vocab)`.
    codec: the model's.
    length: tokens that the model reads at once, as far as it was trained. Of a
      longer context the end is kept.
    rows: texts at once.
    heads: to draft with in greedy texts, or a tree of drafts.
    seed: of texts that are drawn.

  Attributes:
    contexts_cut: requests so far of whose context the beginning was left out.
      Each choice of a question is a request. Whole texts
      (`loglikelihood_rolling`) are read in windows and not counted.
  """

  def __init__(
    self,
    decoder: interface.Decoder,
    codec: tokenizer.Tokenizer,
    *,
    length: int = 2048,
    rows: int = 8,
    heads: int | tree_lib.Tree = 1,
    seed: int = 0,
  ):
    super().__init__()
    self._decoder, self._codec = decoder, codec
    self._length, self._rows = length, rows
    self._heads, self._seed = heads, seed
    self.contexts_cut = 0

  def loglikelihood(
    self, requests: Sequence[Request], **unused: Any
  ) -> list[tuple[float, bool]]:
    """(log-probability, greedy) of (context, continuation) pairs of texts."""
    items = [self._item(*request.args) for request in requests]
    found = likelihood.score(self._decoder, items, rows=self._rows)
    return [tuple(score) for score in found]

  def loglikelihood_rolling(
    self, requests: Sequence[Request], **unused: Any
  ) -> list[float]:
    """The log-probability of whole texts, each after the tokenizer's bos."""
    texts = [self._codec.encode(request.args[0]) for request in requests]
    return likelihood.rolling(
      self._decoder,
      texts,
      prefix=self._codec.bos,
      length=self._length,
      rows=self._rows,
    )

  def generate_until(
    self, requests: Sequence[Request], **unused: Any
  ) -> list[str]:
    """Texts after contexts, up to the first of the strings `until`.

    A context that occurs several times is read once.

    Raises:
      ValueError: an unknown setting, or no room for the context.
    """
    alike = collections.defaultdict(list)
    for i, request in enumerate(requests):
      alike[self._settings(request.args[1])].append(i)
    texts = [""] * len(requests)
    for settings, numbers in alike.items():
      contexts = collections.defaultdict(list)
      for i in numbers:
        contexts[requests[i].args[0]].append(i)
      for i, text in self._texts(contexts, *settings):
        texts[i] = text
    return texts

  def _item(self, context: str, continuation: str) -> likelihood.Item:
    """The texts as ids, as many as the model reads."""
    texts = self._codec, context, continuation
    item = likelihood.of_texts(*texts)
    if len(item.context) + len(item.continuation) <= self._length + 1:
      return item
    self.contexts_cut += 1
    return likelihood.of_texts(*texts, length=self._length)

  def _settings(self, given: dict) -> tuple:
    """(until, tokens, temperature, top_k, top_p); temperature 0 is greedy."""
    unknown = sorted(set(given) - _KNOWN)
    if unknown:
      raise ValueError(
        f"the task's generation_kwargs name {', '.join(unknown)}; supported "
        f"are {', '.join(sorted(_KNOWN))}"
      )
    until = given.get("until", ())
    until = (until,) if isinstance(until, str) else tuple(until or ())
    tokens = int(given.get("max_gen_toks", 256))
    if not tokens < self._length:
      raise ValueError(
        f"max_gen_toks {tokens} leaves no room for a context in the "
        f"{self._length} tokens that the model reads"
      )
    temperature = float(given.get("temperature") or 0.0)
    if not given.get("do_sample", temperature > 0):
      temperature = 0.0
    top_k, top_p = given.get("top_k"), given.get("top_p")
    drawn = (top_k or None, top_p) if temperature else (None, None)
    return until, tokens, temperature, *drawn

  def _texts(self, contexts, until, tokens, temperature, top_k, top_p):
    """Yields (number, text) of contexts -> numbers of their requests."""
    codec, context_len = self._codec, self._length - tokens
    prompts = []
    for context, numbers in contexts.items():
      ids = [*codec.prefix, *codec.encode(context)] or [codec.bos]
      self.contexts_cut += len(numbers) * (len(ids) > context_len)
      prompts.append([int(i) for i in ids[-context_len:]])
    rule, heads = accept.GREEDY, self._heads
    if temperature:
      sampler = sampling.Sampler(
        temperature=temperature, top_k=top_k, top_p=top_p
      )
      rule = accept.SpeculativeSampling(sampler)
    until = tuple(filter(None, until))

    def find(place, text):
      return stream.first(text, *until)

    written = serve.generate_all(
      self._decoder,
      prompts,
      rows=self._rows,
      samples=list(contexts.values()),
      heads=heads,
      max_new=tokens,
      stop=codec.ends,
      rule=rule,
      seed=self._seed,
      end=stream.ends(codec, prompts, find) if until else None,
    )
    places = [
      (i, prompt)
      for prompt, numbers in zip(prompts, contexts.values(), strict=True)
      for i in numbers
    ]
    for (i, prompt), ids in zip(places, written.tokens, strict=True):
      text = codec.decode(ids, after=prompt)
      yield i, text[: stream.first(text, *until)] if until else text


def adapter(
  decoder: interface.Decoder, codec: tokenizer.Tokenizer, **settings: Any
):
  """A model for lm-evaluation-harness: a `Served` that is an `lm_eval` LM.

  `lm_eval.simple_evaluate(model=harness.adapter(decoder, codec),
  tasks=[configs.harness.load("piqa", "piqa.jsonl")])` measures it on a file.

  Args:
    decoder: as of `Served`.
    codec: the model's.
    **settings: others of `Served`.

  Raises:
    ValueError: the package is missing.
  """

  class Adapter(Served, base_class()):
    """See `Served`."""

  return Adapter(decoder, codec, **settings)


def base_class() -> type:
  """The class of which lm-evaluation-harness's models are.

  Raises:
    ValueError: the package is missing.
  """
  try:
    from lm_eval.api import model
  except ImportError as error:
    raise ValueError(
      f"lm-evaluation-harness cannot be imported ({error}): pip install lm_eval"
    ) from error
  return model.LM
