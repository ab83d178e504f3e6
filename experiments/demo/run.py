"""Trains a byte-level model on this machine's Python files and decodes it.

  python -m experiments.demo.run --config=configs/quickstart.py \\
    --workdir=runs/demo

Continues held-out files with 1, 2, 4, ... N heads, in turn, several times over,
and prints bits per byte of every head, tokens per forward pass, speed, and
whether all texts are the same. Leaves report.html, demo.png and demo.json in
the workdir, beside the checkpoint. Started again it goes on where it was.
"""

import shlex
import sys
import time

from absl import flags

import mtp_jax
from experiments.demo import figures, noise, report, tables
from experiments.measure import compare, study
from experiments.startup import options, program
from mtp_jax.data import pipeline
from mtp_jax.train import loop, workdir

_CONFIG = options.define_config()
_WORKDIR = options.define_path("workdir", "runs/demo", "Takes the results.")
_PROMPTS = flags.DEFINE_integer("prompts", 8, "Held-out files to continue.")
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Tokens of a prompt.")
_TEMPERATURE = flags.DEFINE_float(
  "temperature", 0.5, "Of the texts; 0: greedy, which repeats itself."
)
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
    "scores": figures.score(net, cfg, held, _BATCHES.value),
  }
  # A prompt and what follows fill a window: the model knows no other places.
  new = cfg.data.seq_len - _PROMPT_LEN.value
  prompts = held.excerpts(_PROMPTS.value, _PROMPT_LEN.value, cfg.data.seq_len)
  result["prompts"] = [p.tolist() for p in prompts]
  result["temperature"] = _TEMPERATURE.value
  decoders = noise.decoders(
    mtp_jax.lay_out(net, codec.vocab),
    len(prompts),
    size=cfg.data.seq_len + cfg.model.reach,
    temperature=_TEMPERATURE.value,
  )
  result["decoding"] = figures.decode(
    decoders,
    codec,
    result["prompts"],
    heads=cfg.model.drafting,
    new=new,
    repeats=_REPEATS.value,
  )
  texts = [codec.decode(t) for t in result["decoding"][0]["tokens"]]
  result["texts"] = texts
  result["most_repeats"] = report.most_repeats_of(texts)
  result["seconds"] = round(time.time() - begin)
  study.write_json(folder / "demo.json", result)
  report.write(folder, result, codec)
  tables.show(result, codec)
  margins = [d["margin"] for e in result["decoding"] for d in e["differences"]]
  if max(margins, default=0) > compare.EPSILON:
    sys.exit("error: speculative and ordinary decoding differ")
  print(f"report: {folder / 'report.html'}   checkpoint: {folder}/checkpoints")
  python = shlex.quote(sys.executable)  # no environment need be active
  print(program.next_commands(folder, cfg.model.n_future, python), end="")


if __name__ == "__main__":
  program.start(main)
