"""Continues a prompt with a trained model, as fast as its heads allow.

  python -m experiments.generate --workdir=runs/quickstart \\
    --prompt_file=prompt.txt

The prompt is --prompt, --prompt_file, or standard input; in a terminal without
any of them, line after line is read and continued (--interactive). There
Ctrl-C stops a text. At an empty line Ctrl-C and Ctrl-D end the program, and so
does a second Ctrl-C within three seconds, even while a program is compiled.

The text appears pass by pass, and each pass adds 1 to k tokens. Decoding is
greedy, and writes the text of --heads=1, ordinary decoding. With --temperature
it samples, from the distribution of ordinary sampling. --tree=16 drafts with
the tree of 16 nodes that `experiments.tune_tree` found.

Standard output holds the text without the prompt. A file gets it unchanged; a
terminal gets control characters as escapes such as \\x1b. In a file, each of
several samples ends with a NUL byte. All else goes to standard error. The speed
on its last line leaves out the first pass of each program, which compiles.
Texts end before a --stop string, after a --stop_id, and at the tokenizer's end
token.
"""

import itertools
import json
import platform
import re
import signal
import sys
import time
import unicodedata

import jax
import numpy as np
from absl import flags

from experiments.measure import study
from experiments.startup import interrupts, program
from mtp_jax import tokenizer
from mtp_jax.checkpoint import storage
from mtp_jax.decode import accept, blockwise, checks, prepare, sampling
from mtp_jax.decode import stream as stream_lib
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import model
from mtp_jax.train import report, workdir

_WORKDIR = program.define_path("workdir", None, "Folder of a training run.")
_STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; else the last.")
_PROMPT_FILE = program.define_path(
  "prompt_file", None, "File whose whole text is the prompt; - for stdin."
)
_PROMPT = flags.DEFINE_string("prompt", None, "The prompt itself.")
_INTERACTIVE = flags.DEFINE_bool(
  "interactive", None, "Continue each line of standard input by itself."
)
_HEADS = flags.DEFINE_integer(
  "heads", None, "Heads k, 1 is ordinary decoding, 0 all; else the run's."
)
_MAX_NEW = flags.DEFINE_integer(
  "max_new", None, "Most tokens to write; else the run's."
)
_STOP = flags.DEFINE_multi_string(
  "stop",
  [],
  r"The text ends before this string, of which \n, \t and \\ are escapes.",
)
_STOP_ID = flags.DEFINE_multi_integer(
  "stop_id", [], "The text ends behind this token."
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
_NUM_SAMPLES = flags.DEFINE_integer(
  "num_samples",
  1,
  "Texts to draw. In a file or pipe each of several ends with a NUL byte.",
)
_WINDOW = flags.DEFINE_integer(
  "sliding_window",
  None,
  "Look back over so many tokens only: texts without end.",
)
flags.mark_flag_as_required("workdir")
flags.mark_flags_as_mutual_exclusive(["prompt", "prompt_file", "interactive"])
flags.mark_flags_as_mutual_exclusive(["heads", "tree"])


def main(_: list[str]) -> None:
  """Writes the texts to standard output, all else to standard error."""
  # What may be wrong is found before the model is read.
  rule, stops = _rule(), [_unescaped(text) for text in _STOP.value]
  tree = None if _TREE.value is None else _tuned_tree(_TREE.value)
  given = _PROMPT.value is not None or _PROMPT_FILE.value is not None
  if not given and sys.stdin is None:
    raise ValueError("no prompt, and standard input is closed: give --prompt")
  interactive = _INTERACTIVE.value or (not given and sys.stdin.isatty())
  cfg, codec = workdir.settings(_WORKDIR.value, _STEP.value)
  settings = _settings(cfg, codec, rule, tree)
  prompt = None if interactive else _ids(codec, _prompt())

  net, _, _, step = workdir.load_step(_WORKDIR.value, _STEP.value)
  decoder = prepare.decoder(net, codec.vocab, sliding_window=_WINDOW.value)
  drafts, size = settings["heads"], sum(a.size for a in jax.tree.leaves(net))
  kind = "chain" if drafts.is_chain else "tree"
  _note(
    f"{_WORKDIR.value} at step {step}: {report.short(size)}parameters on "
    f"{study.device()}; drafts: {kind} of {drafts.size}\n"
  )

  end = "\n" if interactive or sys.stdout.isatty() else ""
  if settings["samples"] > 1 and not sys.stdout.isatty():
    end = "\0"  # any line may be part of a text

  def write(prompt, seed):
    _write(decoder, codec, prompt, stops, end, settings | {"seed": seed})

  if not interactive:
    write(prompt, _SEED.value)
    return
  signal.signal(signal.SIGINT, interrupts.stop_text)
  for turn in itertools.count():
    try:
      line = _line()
    except (EOFError, KeyboardInterrupt):
      _note("\n")
      return
    try:
      write(_ids(codec, line), (_SEED.value + turn) % 2**32)
    except KeyboardInterrupt:
      _note("\n(stopped)\n")
    except ValueError as error:  # of this line: the next may be better
      _note(f"error: {error}\n")


def _settings(cfg, codec, rule, tree) -> dict:
  """Arguments of `stream.stream`, checked against a decoder without weights."""
  decoder = jax.eval_shape(
    lambda key: prepare.decoder(
      model.Model(cfg.model, key), codec.vocab, sliding_window=_WINDOW.value
    ),
    jax.random.key(0),
  )
  heads = cfg.decode.heads if _HEADS.value is None else _HEADS.value
  max_new = cfg.decode.max_new if _MAX_NEW.value is None else _MAX_NEW.value
  tree = tree or heads or cfg.model.n_future
  found = {
    "heads": blockwise.plan(decoder, rule, tree, max_new=max_new),
    "max_new": max_new,
    "stop": [codec.eos, *_STOP_ID.value],
    "rule": rule,
    "samples": checks.integer("num_samples", _NUM_SAMPLES.value, 1),
  }
  checks.seed(_SEED.value)
  checks.stop_ids(found["stop"], codec.vocab)
  if found["samples"] > 1 and rule is accept.GREEDY:
    raise ValueError(
      f"--num_samples={found['samples']}: greedy decoding writes the same text "
      "each time; give a --temperature"
    )
  return found


def _figures(count: stream_lib.Count) -> str:
  text = f"{count.tokens} tokens"
  if count.passes:
    text += f", {count.written / count.passes:.2f} tokens per forward pass"
  if not count.seconds:
    return f"{text}; too few passes to time"
  return (
    f"{text}; {count.timed / count.seconds:.1f} tokens per second, the first "
    "pass of each program left out"
  )


def _write(decoder, codec, prompt, stops, end, settings) -> None:
  """Writes the texts of one prompt as they come, `end` after each of them."""
  begin, count = time.perf_counter(), stream_lib.Count()
  passes = count.watch(stream_lib.stream(decoder, prompt, **settings))
  _note("compiling, and reading the prompt ...")
  try:
    compiled = list(itertools.islice(passes, 2))
  finally:
    _note("\r\x1b[K" if sys.stderr.isatty() else "\n")
  terminal, samples = sys.stdout.isatty(), settings["samples"]
  texts = itertools.tee(itertools.chain(compiled, passes), samples)
  for i, own in enumerate(texts):
    if samples > 1:
      _note(f"--- sample {i + 1} of {samples} ---\n")
    parts = tokenizer.decode_parts(
      codec, stream_lib.sample(own, i), after=prompt
    )
    for new in stream_lib.until(parts, stops):
      print(_shown(new) if terminal else new, end="", flush=True)
    print(end=end, flush=True)
  _note(f"{_figures(count)}; {time.perf_counter() - begin:.1f} s in all\n")


def _shown(text: str) -> str:
  """Control characters, which could take over a terminal, as escapes."""
  return "".join(
    c.encode("unicode_escape").decode()
    if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf")
    else c
    for c in text
  )


def _note(text: str) -> None:
  print(text, end="", file=sys.stderr, flush=True)


def _line() -> bytes:
  """A line of standard input, to be continued."""
  _note("> ")
  line = sys.stdin.buffer.readline()
  if not line:
    raise EOFError
  return line.removesuffix(b"\n").removesuffix(b"\r")


def _prompt() -> bytes:
  if _PROMPT.value is not None:
    return _PROMPT.value.encode("utf-8", "surrogateescape")
  if _PROMPT_FILE.value is None or str(_PROMPT_FILE.value) == "-":
    return sys.stdin.buffer.read()
  try:
    return _PROMPT_FILE.value.read_bytes()
  except OSError as error:
    raise ValueError(
      f"--prompt_file={_PROMPT_FILE.value}: {error.strerror}"
    ) from error


def _ids(codec, text: bytes) -> np.ndarray:
  return np.concatenate([[codec.bos], codec.encode(text)])


def _unescaped(stop: str) -> str:
  if not stop:
    raise ValueError("--stop is empty: every text would end at once")
  escapes = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
  return re.sub(r"\\[nt\\]", lambda found: escapes[found[0]], stop)


def _rule():
  filters = {
    "top_k": _TOP_K.value,
    "top_p": _TOP_P.value,
    "min_p": _MIN_P.value,
    "penalty": _PENALTY.value,
  }
  if _TEMPERATURE.value:
    sampler = sampling.Sampler(temperature=_TEMPERATURE.value, **filters)
    sampler.check()
    return accept.Lossless(sampler)
  if given := [name for name, value in filters.items() if value is not None]:
    raise ValueError(
      f"--{given[0]} filters what is drawn; greedy decoding draws nothing: "
      "give a --temperature"
    )
  return accept.GREEDY


def _tuned_tree(size: int) -> tree_lib.Tree:
  path = _WORKDIR.value / "tree.json"
  command = (
    f"python -m experiments.tune_tree --workdir={_WORKDIR.value} --sizes={size}"
  )
  try:
    trees = (
      json.loads(path.read_text(encoding="utf-8"))["trees"]
      if path.exists()
      else {}
    )
    if str(size) in trees:
      return tree_lib.from_paths(trees[str(size)]["paths"])
  except (ValueError, TypeError, LookupError) as error:
    raise ValueError(f"{path} is damaged ({error}): {command}") from error
  raise ValueError(f"no tree of {size} nodes in {path}: {command}")


if __name__ == "__main__":
  if not jax.config.jax_compilation_cache_dir:
    # Compiled programs of this host: others may have another processor.
    where = storage.local("~/.cache/mtp_jax/programs") / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
  program.start(main)
