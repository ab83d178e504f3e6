"""Writes on from a prompt with a trained model, as fast as its heads allow.

  python -m experiments.generate --workdir=runs/quickstart \\
    --prompt_file=prompt.txt

The text appears pass by pass, each pass adding 1 to k tokens. Decoding is
greedy, and the text the one that --heads=1, ordinary decoding, writes, unless
--temperature says otherwise: then it is drawn as ordinary sampling draws it.
--tree=16 drafts by the tree of 16 nodes that `experiments.tune_tree` found.
The last line counts tokens per forward pass and tokens per second, the first
compilation left out; a text that outgrows its cache compiles once more.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator

import jax
import numpy as np
from absl import app, flags

from experiments import program
from mtp_jax import tokenizer, workdir
from mtp_jax.decode import (
  accept,
  blockwise,
  network,
  prepare,
  prompts,
  sampling,
)
from mtp_jax.decode import generate as generate_lib
from mtp_jax.decode import tree as tree_lib

_WORKDIR = program.define_path("workdir", None, "Folder of a training run.")
_PROMPT_FILE = program.define_path(
  "prompt_file", None, "File whose whole text is the prompt; - for stdin."
)
_PROMPT = flags.DEFINE_string("prompt", None, "The prompt itself.")
_HEADS = flags.DEFINE_integer(
  "heads", None, "Heads k, 1 is ordinary decoding, 0 all; else the run's."
)
_MAX_NEW = flags.DEFINE_integer(
  "max_new", None, "Most tokens to write; else the run's."
)
_TREE = flags.DEFINE_integer(
  "tree", None, "Nodes of a tree of drafts from the workdir's tree.json."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0: greedy.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw from the k likeliest.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw from this share.")
_MIN_P = flags.DEFINE_float("min_p", None, "Least share of the likeliest.")
_PENALTY = flags.DEFINE_float("penalty", None, "Of repeating a token.")
_SEED = flags.DEFINE_integer("seed", 0, "Of what is drawn.")
_WINDOW = flags.DEFINE_integer(
  "sliding_window",
  None,
  "Look back over so many tokens only: texts without end.",
)
flags.mark_flag_as_required("workdir")
flags.mark_flags_as_mutual_exclusive(["prompt", "prompt_file"], required=True)
flags.mark_flags_as_mutual_exclusive(["heads", "tree"])


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  text = _prompt()
  net, cfg, codec = workdir.load(_WORKDIR.value)
  heads = cfg.decode.heads if _HEADS.value is None else _HEADS.value
  drafts = heads or cfg.model.n_future
  if _TREE.value is not None:
    drafts = _tuned_tree(_TREE.value)
  max_new = cfg.decode.max_new if _MAX_NEW.value is None else _MAX_NEW.value
  prompt = np.concatenate([[codec.bos], codec.encode(text)])
  decoder = prepare.decoder(net, codec.vocab, sliding_window=_WINDOW.value)
  rule = _rule()

  def decode():
    return stream(
      decoder,
      prompt,
      heads=drafts,
      max_new=max_new,
      stop=codec.eos,
      rule=rule,
      seed=_SEED.value,
    )

  for _ in itertools.islice(decode(), 2):
    pass  # one pass over the prompt and one after it: both are compiled now
  counts, start = [], time.perf_counter()

  def counted():
    for tokens in decode():
      counts.append(len(tokens))
      yield tokens

  for new in characters(codec, prompt, counted()):
    print(new, end="", flush=True)
  seconds = time.perf_counter() - start
  print(f"\n\n{_figures(counts, seconds)}")


def stream(
  decoder: network.Network,
  prompt: np.ndarray,
  *,
  heads: int | tree_lib.Tree,
  max_new: int,
  stop: int,
  rule=accept.GREEDY,
  seed: int = 0,
) -> Iterator[np.ndarray]:
  """The new tokens so far, after the prompt's pass and after each further one.

  Equals `generate.generate` of one prompt, told while it happens.
  """
  tree = blockwise.plan(decoder, rule, heads, max_new=max_new)
  tokens, lengths = prompts.pad([prompt], decoder.vocab)
  state = generate_lib.start(
    decoder,
    tokens,
    lengths,
    tree=tree,
    max_new=max_new,
    stop=stop,
    rule=rule,
    seed=seed,
  )
  while True:
    row, length, done = jax.device_get(
      (state.tokens[0], state.length[0], state.done[0])
    )
    yield row[len(prompt) : length]
    if done:
      return
    room = decoder.room(state.cache)
    if room is not None and length - 1 + tree.size > room:
      state = blockwise.grow(decoder, state)
    state = blockwise.advance_jit(decoder, rule, state)


def characters(
  codec, prompt: np.ndarray, passes: Iterable[np.ndarray]
) -> Iterator[str]:
  """What each pass adds to the text; half a character waits for its rest.

  Args:
    codec: the tokenizer.
    prompt: ids before the new ones: a token's bytes may depend on them.
    passes: from `stream`.
  """

  def added():
    done = 0
    for tokens in passes:
      yield tokens[done:]
      done = len(tokens)

  return tokenizer.decode_parts(codec, added(), after=prompt)


def _rule():
  filters = {
    "top_k": _TOP_K.value,
    "top_p": _TOP_P.value,
    "min_p": _MIN_P.value,
    "penalty": _PENALTY.value,
  }
  if _TEMPERATURE.value:
    return accept.Lossless(
      sampling.Sampler(temperature=_TEMPERATURE.value, **filters)
    )
  if given := [name for name, value in filters.items() if value is not None]:
    raise ValueError(
      f"--{given[0]} filters what is drawn; greedy decoding draws nothing: "
      "give a --temperature"
    )
  return accept.GREEDY


def _tuned_tree(size: int) -> tree_lib.Tree:
  path = _WORKDIR.value / "tree.json"
  trees = json.loads(path.read_text())["trees"] if path.exists() else {}
  if str(size) not in trees:
    raise ValueError(
      f"no tree of {size} nodes in {path}: python -m experiments.tune_tree "
      f"--workdir={_WORKDIR.value} --sizes={size}"
    )
  return tree_lib.from_paths(trees[str(size)]["paths"])


def _prompt() -> bytes:
  if _PROMPT.value is not None:
    return _PROMPT.value.encode("utf-8", "surrogateescape")
  if str(_PROMPT_FILE.value) == "-":
    return sys.stdin.buffer.read()
  return _PROMPT_FILE.value.read_bytes()


def _figures(counts: list[int], seconds: float) -> str:
  """One line from the tokens so far after each pass, the prompt's first."""
  passes, tokens = len(counts) - 1, counts[-1]
  speed = (
    f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens per "
    "second (with the prompt's pass)"
  )
  if not passes:
    return f"{speed}; the prompt's pass wrote them all"
  per_forward = (tokens - counts[0]) / passes
  return (
    f"{speed}; {passes} passes after the prompt's, {per_forward:.2f} tokens "
    "per forward"
  )


if __name__ == "__main__":
  program.start(main)
