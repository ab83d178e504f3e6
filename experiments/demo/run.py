"""Trains a byte-level model on this machine's Python files and decodes it.

  python -m experiments.demo.run --config=configs/quickstart.py \\
    --workdir=runs/demo

Continues held-out files with 1 to N heads, in turn and several times over,
and prints bits per byte of every head, tokens per forward pass, speed, and
whether all texts are the same. Leaves report.html, demo.png and demo.json in
the workdir, beside the checkpoint. Started again it goes on where it was.
"""

import functools
import shlex
import sys
import time

import numpy as np
import rich.console
import rich.table
import rich.text
from absl import flags

from experiments.demo import report
from experiments.measure import compare, study, timing
from experiments.startup import options, program, terminal
from mtp_jax import tokenizer
from mtp_jax.data import pipeline
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import generate as generate_lib
from mtp_jax.evaluate import heads as head_measures
from mtp_jax.train import loop, workdir

_CONFIG = options.define_config()
_WORKDIR = options.define_path("workdir", "runs/demo", "Takes the results.")
_PROMPTS = flags.DEFINE_integer("prompts", 8, "Held-out files to continue.")
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Tokens of a prompt.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timings of each, in turn.")
_BATCHES = flags.DEFINE_integer("batches", 128, "Held-out batches to score.")


def main(_: list[str]) -> None:
  """Trains, scores, decodes both ways, and writes the report to the workdir."""
  begin, folder = time.time(), _WORKDIR.value
  state = loop.fit(_CONFIG.value.check(), folder)
  if int(state.step) < _CONFIG.value.train.steps:
    sys.exit(f"stopped at step {int(state.step)}; run it again to go on")
  net, cfg, codec = workdir.load(folder)
  _, held = pipeline.pack(cfg.data, codec)
  result = study.provenance(cfg.train.seed) | {
    "scores": score(net, cfg, held),
  }
  # A prompt and what follows fill a window: the model knows no other places.
  new = cfg.data.seq_len - _PROMPT_LEN.value
  prompts = held.excerpts(_PROMPTS.value, _PROMPT_LEN.value, cfg.data.seq_len)
  result["prompts"] = [p.tolist() for p in prompts]
  result["decoding"] = decode(net, codec, result["prompts"], new)
  texts = [codec.decode(t) for t in result["decoding"][0]["tokens"]]
  result["texts"] = texts
  result["most_repeats"] = {
    words: max(report.most_repeats(text, words) for text in texts)
    for words in (1, 2, 3)
  }
  result["seconds"] = round(time.time() - begin)
  study.write_json(folder / "demo.json", result)
  report.write(folder, result, codec)
  show(result, codec)
  margins = [d["margin"] for e in result["decoding"] for d in e["differences"]]
  if max(margins, default=0) > compare.EPSILON:
    sys.exit("error: speculative and ordinary decoding differ")
  print(f"report: {folder / 'report.html'}   checkpoint: {folder}/checkpoints")
  python = shlex.quote(sys.executable)  # no environment need be active
  print(program.next_commands(folder, cfg.model.n_future, python), end="")


def score(net, cfg, held) -> dict:
  """Held-out measures of every head, as plain lists."""
  shape = dict(
    batch=cfg.data.batch,
    seq_len=cfg.data.seq_len,
    n_future=cfg.model.n_future,
    seed=1,
  )
  found = head_measures.measure(
    net, (pipeline.batch_at(held, i, **shape) for i in range(_BATCHES.value))
  )
  bits = found["nats"] / np.log(2) / held.bytes_per_token
  return {
    "bits_per_byte": bits.tolist(),
    "accuracy": found["accuracy"].tolist(),
    "predicted_tokens_per_forward": float(found["greedy"]),
    "tokens": _BATCHES.value * cfg.data.batch * cfg.data.seq_len,
  }


def decode(net, codec, prompts, new: int) -> list[dict]:
  """One entry per number of heads: tokens, passes, seconds, agreement."""
  decoder = decoder_lib.lay_out(net, codec.vocab)
  counts = range(1, net.cfg.n_future + 1)

  def generate(heads):
    return [
      generate_lib.generate(
        decoder, [prompt], heads=heads, max_new=new, stop=codec.eos
      )
      for prompt in prompts
    ]

  calls = {k: functools.partial(generate, k) for k in counts}
  texts = {k: call() for k, call in calls.items()}  # compiles
  seconds = timing.seconds_in_turns(calls, _REPEATS.value)
  entries = []
  for k in counts:
    rows = texts[k]
    per_pass = np.concatenate([r.per_pass[0] for r in rows])
    entries.append(
      {
        "heads": k,
        "tokens": [r.tokens[0].tolist() for r in rows],
        "per_pass": [r.per_pass[0].tolist() for r in rows],
        "tokens_per_forward": float(per_pass.mean()),
        "accepted": [float((per_pass > j).mean()) for j in range(k)],
        "seconds": seconds[k],
        "tokens_per_second": sum(len(r.tokens[0]) for r in rows)
        / float(np.median(seconds[k])),
        "speedup": timing.median_ratio(seconds[1], seconds[k]),
        "differences": differences(net, prompts, texts[1], rows),
      }
    )
  return entries


def differences(net, prompts, ordinary, other) -> list[dict]:
  """Where texts part, with the top-two margin of head 1 at that place."""
  found = []
  for i, (prompt, a, b) in enumerate(
    zip(prompts, ordinary, other, strict=True)
  ):
    a, b = a.tokens[0], b.tokens[0]
    if np.array_equal(a, b):
      continue
    size = min(len(a), len(b))
    place = int(np.argmax(np.append(a[:size] != b[:size], True)))
    before = np.array([[*prompt, *a[:place]]], np.int32)
    best = np.sort(np.asarray(net(before)[0, 0, -1]))
    found.append(
      {"prompt": i, "token": place, "margin": float(best[-1] - best[-2])}
    )
  return found


def show(result: dict, codec) -> None:
  """Completions of two files side by side, and the README's two tables."""
  console = rich.console.Console()
  first, last = result["decoding"][0], result["decoding"][-1]
  table = rich.table.Table(title="Held-out files, continued", show_lines=True)
  for name in (
    "ordinary, one head",
    f"self-speculative, {last['heads']} heads",
  ):
    table.add_column(name, ratio=1)
  for i, prompt in enumerate(result["prompts"][:2]):
    cells = []
    for entry in (first, last):
      written = report.passes(entry["tokens"][i], entry["per_pass"][i])
      given, *new = tokenizer.decode_parts(codec, [prompt, *written])
      text = rich.text.Text(given, style="dim")
      for turn, part in enumerate(new):
        text.append(part, style=("green", "yellow")[turn % 2])
      cells.append(text)
    table.add_row(*cells)
  console.print(table)
  if console.is_terminal:
    console.print("A change of colour is a new forward pass.\n")
  scores = result["scores"]
  rows = zip(
    scores["bits_per_byte"], scores["accuracy"], last["accepted"], strict=True
  )
  terminal.show_table(
    "Heads, on held-out files",
    ("head", "bits per byte", "accuracy", "drafts accepted"),
    (
      (f"{i}", f"{bits:.3f}", f"{right:.1%}", f"{used:.1%}" if i > 1 else "-")
      for i, (bits, right, used) in enumerate(rows, 1)
    ),
  )
  terminal.show_table(
    "Decoding held-out files, one at a time",
    (
      "heads used",
      "tokens per forward",
      "tokens per second",
      "speedup",
      "same text",
    ),
    (
      (
        f"{entry['heads']}",
        f"{entry['tokens_per_forward']:.2f}",
        f"{entry['tokens_per_second']:,.0f}",
        f"{entry['speedup']:.2f}",
        agreement(entry),
      )
      for entry in result["decoding"]
    ),
  )
  predicted = scores["predicted_tokens_per_forward"]
  repeats = result["most_repeats"]
  console.print(
    f"predicted on the files themselves: {predicted:.2f} tokens per forward\n"
    "most often in a row in the texts: the same word "
    f"{repeats[1]} times, two words {repeats[2]} times, three words "
    f"{repeats[3]} times\n{result['seconds']} s since the command began",
    highlight=False,
  )


def agreement(entry: dict) -> str:
  """'identical', or how many texts part and on what margin."""
  parts = entry["differences"]
  if not parts:
    return "identical"
  margin = max(d["margin"] for d in parts)
  name = "near-ties" if margin <= compare.EPSILON else "DIFFERENT"
  return f"{name}: {len(parts)} part at a margin of {margin:.1e} or less"


if __name__ == "__main__":
  program.start(main)
