"""Texts that a trained model continues, written as they come."""

import dataclasses
import functools
import itertools
import pathlib
import platform
import re
import signal
import sys
import time

import jax
import numpy as np

from experiments.measure import study
from experiments.startup import interrupts, terminal
from mtp_jax import config, tokenizer
from mtp_jax.checkpoint import storage
from mtp_jax.decode import (
  accept,
  checks,
  interface,
  layout,
  sampling,
  stream,
  tree_file,
)
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.interchange import folders
from mtp_jax.model import model
from mtp_jax.tokenizer import chat
from mtp_jax.train import report


@dataclasses.dataclass(frozen=True)
class Request:
  """What to continue, and how: the flags of `experiments.generate`."""

  workdir: pathlib.Path  # any folder that `mtp_jax.load` reads
  step: int | None
  dtype: str | None  # None: the model's own
  prompt: str | None
  prompt_file: pathlib.Path | None
  interactive: bool | None
  heads: int | None
  tree: int | None
  max_new: int | None
  chat: bool
  system: str | None
  stop: list[str]
  stop_id: list[int]
  temperature: float
  top_k: int | None
  top_p: float | None
  min_p: float | None
  penalty: float | None
  seed: int
  num_samples: int
  sliding_window: int | None


def run(request: Request) -> None:
  """Writes the texts to standard output, all else to standard error.

  Raises:
    ValueError: what the request asks for cannot be done. It is raised before
      the model is read.
  """
  rule = _rule(request)
  stops = [_unescaped(text) for text in request.stop]
  tree = None if request.tree is None else _tuned_tree(request)
  given = request.prompt is not None or request.prompt_file is not None
  if not given and sys.stdin is None:
    raise ValueError("no prompt, and standard input is closed: give --prompt")
  interactive = request.interactive or (not given and sys.stdin.isatty())
  cfg, codec = folders.settings(request.workdir, request.step)
  settings = _settings(request, cfg, codec, rule, tree)
  ids = _Prompts(codec, request)
  prompt = None if interactive else ids.of(_prompt(request))
  window = request.sliding_window or cfg.model.sliding_window
  if prompt is not None and not window:
    _note_length(len(prompt) + settings["max_new"], request.workdir, cfg)

  dtype = request.dtype or cfg.model.dtype
  decoder, size, step = _decoder(request, dtype, codec.vocab)
  drafts = settings["heads"]
  kind = "chain" if drafts.is_chain else "tree"
  at = "" if step is None else f" at step {step}"
  terminal.note(
    f"{request.workdir}{at}: {report.short(size)}parameters on "
    f"{study.device()}; drafts: {kind} of {drafts.size}\n"
  )
  end = "\n" if interactive or sys.stdout.isatty() else ""
  if request.num_samples > 1 and not sys.stdout.isatty():
    end = "\0"  # any line may be part of a text
  writer = _Writer(decoder, codec, settings, stops, end)
  if interactive:
    _continue_lines(writer, ids, request.seed)
  else:
    writer.write(prompt, request.seed)


def _note_length(tokens: int, path: pathlib.Path, cfg: config.Config) -> None:
  """Says that a text may become longer than those the model was made for."""
  shape = cfg.model
  if shape.rope_scaling == "llama3":
    return  # Llama 3.1 is made for twice its rope_length times rope_factor
  most = int(shape.rope_length * shape.rope_factor)
  most = most or folders.trained_length(folders.kind(path), path, cfg)
  if most and most < tokens:
    terminal.note(
      f"the prompt and --max_new reach {tokens} tokens, more than the {most} "
      "that the model is made for: what it writes there may be worse\n"
    )


def _decoder(
  request: Request, dtype: str, vocab: int
) -> tuple[decoder_lib.Transformer, int, int | None]:
  """The decoder, the number of parameters and the step of the request's model.

  The model itself is freed on return: the decoder holds copies of its layers.
  """
  net, _, _, step = folders.load_step(
    request.workdir, request.step, dtype=dtype
  )
  size = sum(a.size for a in jax.tree.leaves(net))
  decoder = layout.lay_out(net, vocab, sliding_window=request.sliding_window)
  return decoder, size, step


def keep_compiled_programs() -> None:
  """Keeps what JAX compiles for the next start, unless it is told where."""
  if not jax.config.jax_compilation_cache_dir:
    # Of this host: others may have another processor.
    where = storage.local("~/.cache/mtp_jax/programs") / platform.node()
    jax.config.update("jax_compilation_cache_dir", str(where))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@dataclasses.dataclass(frozen=True)
class _Writer:
  """Writes the texts of a prompt as they come, `end` after each of them."""

  decoder: interface.Decoder
  codec: tokenizer.Tokenizer
  settings: dict  # of `stream.stream`
  stops: list[str]
  end: str

  def write(self, prompt: np.ndarray, seed: int) -> str:
    """Continues `prompt`, ids [P]; returns the first text."""
    begin, count = time.perf_counter(), stream.Count()
    passes = count.watch(
      stream.stream(self.decoder, prompt, seed=seed, **self.settings)
    )
    terminal.note("compiling, and reading the prompt ...")
    try:
      compiled = list(itertools.islice(passes, 2))
    finally:
      terminal.note("\r\x1b[K" if sys.stderr.isatty() else "\n")
    to_terminal, samples = sys.stdout.isatty(), self.settings["samples"]
    texts = itertools.tee(itertools.chain(compiled, passes), samples)
    written = []
    for i, own in enumerate(texts):
      if samples > 1:
        terminal.note(f"--- sample {i + 1} of {samples} ---\n")
      parts = tokenizer.decode_parts(
        self.codec, stream.sample(own, i), after=prompt
      )
      for new in stream.until(parts, self.stops):
        written += [new] if i == 0 else []
        shown = terminal.escaped(new) if to_terminal else new
        print(shown, end="", flush=True)
      print(end=self.end, flush=True)
    seconds = time.perf_counter() - begin
    terminal.note(f"{_figures(count)}; {seconds:.1f} s in all\n")
    return "".join(written)


class _Prompts:
  """Makes prompts of texts; with --chat, of the messages of a conversation.

  Raises:
    ValueError: a --system without --chat, or no chat template takes it.
  """

  def __init__(self, codec: tokenizer.Tokenizer, request: Request):
    self._codec, self._chat, self._messages = codec, request.chat, []
    if request.system is not None:
      self._messages.append({"role": "system", "content": request.system})
    if request.chat:
      self.of(b"")
    elif request.system is not None:
      raise ValueError("--system is the system message of a chat: give --chat")

  def of(self, text: bytes) -> np.ndarray:
    """Ids [P] of a text that is continued, or of a user's message."""
    if self._chat:
      return chat.encode(self._codec, [*self._messages, _user(text)])
    prefix = np.array(self._codec.prefix, np.int32)
    ids = np.concatenate([prefix, self._codec.encode(text)])
    return ids if ids.size else np.array([self._codec.bos])

  def answered(self, text: bytes, answer: str) -> None:
    """Adds a turn to the conversation, if there is one."""
    if self._chat:
      answer = {"role": "assistant", "content": answer}
      self._messages += [_user(text), answer]


def _user(text: bytes) -> dict[str, str]:
  return {"role": "user", "content": tokenizer.utf8(text).decode("utf-8")}


def _continue_lines(writer: _Writer, prompts: _Prompts, seed: int) -> None:
  """Continues each line that is typed; Ctrl-C stops a text, or ends here."""
  signal.signal(signal.SIGINT, interrupts.stop_text)
  for turn in itertools.count():
    try:
      line = terminal.read_line()
    except (EOFError, KeyboardInterrupt):
      terminal.note("\n")
      return
    try:
      answer = writer.write(prompts.of(line), (seed + turn) % 2**32)
      prompts.answered(line, answer)
    except KeyboardInterrupt:
      terminal.note("\n(stopped)\n")
    except ValueError as error:  # of this line: the next may be better
      terminal.note(f"error: {error}\n")


def _settings(request: Request, cfg, codec, rule, tree) -> dict:
  """Arguments of `stream.stream`, checked against a decoder without weights."""
  make = functools.partial(
    layout.lay_out,
    vocab=codec.vocab,
    sliding_window=request.sliding_window,
  )
  decoder = jax.eval_shape(
    lambda key: make(model.Model(cfg.model, key)), jax.random.key(0)
  )
  heads = cfg.decode.heads if request.heads is None else request.heads
  max_new = cfg.decode.max_new if request.max_new is None else request.max_new
  tree = tree or heads or cfg.model.drafting
  samples = checks.integer("num_samples", request.num_samples, 1)
  checks.stop_ids(request.stop_id, decoder.vocab, "stop_id")
  settings = {
    "max_new": max_new,
    "stop": [*codec.ends, *request.stop_id],
    "rule": rule,
  }
  checked = interface.check_settings(
    decoder, heads=tree, seed=request.seed, **settings
  )
  if samples > 1 and rule is accept.GREEDY:
    raise ValueError(
      f"--num_samples={samples}: greedy decoding writes the same text "
      "each time; give a --temperature"
    )
  return settings | {"heads": checked.tree, "samples": samples}


def _rule(request: Request) -> accept.Greedy | accept.SpeculativeSampling:
  names = "top_k", "top_p", "min_p", "penalty"
  filters = {name: getattr(request, name) for name in names}
  if request.temperature:
    sampler = sampling.Sampler(temperature=request.temperature, **filters)
    sampler.check()
    return accept.SpeculativeSampling(sampler)
  if given := [name for name, value in filters.items() if value is not None]:
    raise ValueError(
      f"--{given[0]} filters what is drawn; greedy decoding draws nothing: "
      "give a --temperature"
    )
  return accept.GREEDY


def _tuned_tree(request: Request):
  try:
    return tree_file.read(request.workdir / "tree.json", request.tree)
  except ValueError as error:
    raise ValueError(
      f"{error}: python -m experiments.tune_tree "
      f"--workdir={request.workdir} --sizes={request.tree}"
    ) from error


def _unescaped(stop: str) -> str:
  if not stop:
    raise ValueError("--stop is empty: every text would end at once")
  escapes = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
  return re.sub(r"\\[nt\\]", lambda found: escapes[found[0]], stop)


def _prompt(request: Request) -> bytes:
  if request.prompt is not None:
    return request.prompt.encode("utf-8", "surrogateescape")
  if request.prompt_file is None or str(request.prompt_file) == "-":
    return sys.stdin.buffer.read()
  try:
    return request.prompt_file.read_bytes()
  except OSError as error:
    raise ValueError(
      f"--prompt_file={request.prompt_file}: {error.strerror}"
    ) from error


def _figures(count: stream.Count) -> str:
  text = f"{count.tokens} tokens"
  if count.passes:
    text += f", {count.written / count.passes:.2f} tokens per forward pass"
  if not count.seconds:
    return f"{text}; too few passes to time"
  return (
    f"{text}; {count.timed / count.seconds:.1f} tokens per second, the first "
    "pass of each program left out"
  )
