"""Stage 4: a byte model is trained for the minutes left, and decodes."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np

from experiments.engineering.accelerator import exactness, record, scales
from experiments.measure import compare, limits, steps, study
from mtp_jax import config, sharding, tokenizer
from mtp_jax.data import pipeline
from mtp_jax.decode import autotune, layout
from mtp_jax.decode import tree as tree_lib
from mtp_jax.model import cost, model
from mtp_jax.train import loop, workdir
from mtp_jax.train import step as step_lib

PROMPT = 64  # tokens of a prompt, fewer where the model's windows are short
TOKENS_PER_PARAMETER = 20  # that a model of the size chosen is trained on
CAUTION = 0.5  # of the FLOP/s of stage 3: smaller products are slower
FILLED = 0.7  # of the time left to train in: fit also evaluates and saves


def run(stage: record.Stage, scale: scales.Scale) -> None:
  """Trains, then decodes batch after batch."""
  folder = stage.folder / "scratch"
  cfg = scale.byte_run.replace(data={"cache": str(folder / "corpus")})
  path = folder / f"run_{stage.section['call']}"  # not an earlier call's
  found = {}

  def pack():
    train, found["held"] = pipeline.pack(cfg.data, tokenizer.Bytes())
    return {"bytes": len(train.tokens), "held_out": len(found["held"].tokens)}

  def prepared():
    """The corpus, while a step is compiled and timed."""
    done = record.together({"corpus": pack, "step": lambda: pace(cfg)})
    for each in done.values():
      if isinstance(each, Exception):
        raise each
    found["step"] = done["step"]
    return done["corpus"] | done["step"]

  cfg = dataclasses.replace(
    cfg,
    model=choose_model(
      scale.byte_models, flop_rate(stage), training_seconds(stage, scale)
    ),
  )
  cfg = cfg.replace(
    model={"attention": exactness.working_attention(stage, scale)},
    # Wider models take lower rates.
    optim={"peak": cfg.optim.peak * min(1, 256 / cfg.model.width)},
  )
  stage.attempt("corpus", prepared, kind="corpus", estimate=20)
  if "step" not in found:
    return
  seconds = training_seconds(stage, scale)
  training = seconds - found["step"]["seconds_to_compile"]
  wanted = int(FILLED * training / found["step"]["seconds_of_a_step"])
  count = max(min(wanted, scale.most_steps), 2)
  cfg = cfg.replace(
    optim={"warmup": min(cfg.optim.warmup, count // 2)},
    train={
      "steps": count,
      "eval_every": count,
      "save_every": count,
      "log_every": max(count // 50, 1),
    },
  )
  stage.attempt(
    "training",
    functools.partial(train, cfg, path, seconds),
    kind="training",
    estimate=scale.reserve / 2,
  )
  if stage.recorded("byte model", "training"):
    decode(stage, scale, path, found["held"])


def training_seconds(stage: record.Stage, scale: scales.Scale) -> float:
  """All that is left but `scale.reserve`, and at least a third of it.

  Drafts of a model that has hardly been trained say nothing.
  """
  return max(stage.left - scale.reserve, stage.left / 3)


def pace(cfg: config.Config) -> dict[str, float]:
  """Compiles and times a training step, on random tokens."""
  mesh, n = sharding.make_mesh(config.Mesh()), cfg.model.n_future
  begin = time.perf_counter()
  step, _ = steps.compiled(cfg, mesh)
  compiling = time.perf_counter() - begin
  flops = cost.flops_per_token(cfg.model, cfg.data.seq_len)
  program = steps.Program(cfg, step, {"n": n, "model_flops": flops})
  states = {n: jax.device_get(step_lib.init_state(cfg, mesh))}
  setup = steps.Setup(rounds=1, steps=10)
  for _ in steps.turns([program], states, setup, mesh):
    pass
  return {
    "seconds_to_compile": compiling,
    "seconds_of_a_step": program.row["seconds"],
  }


def flop_rate(stage: record.Stage) -> float:
  """Model FLOP/s that a small model's training may reach, from stage 3.

  Without stage 3, a fifth of the device's peak; where that is not known
  either, a guess that is low for any accelerator.
  """
  results = stage.whole["stages"].get("training", {}).get("results", {})
  rates = [
    row["tokens_per_second"] * row["model_flops"]
    for result in results.values()
    for row in result.get("rows", [])
    if "tokens_per_second" in row
  ]
  return CAUTION * max(rates) if rates else (cost.peak_flops() or 50e12) / 5


def choose_model(
  models: tuple[config.Model, ...], rate: float, seconds: float
) -> config.Model:
  """The largest model with time for `TOKENS_PER_PARAMETER`; else the first."""
  fitting = [m for m in models if needed_flops(m) <= rate * seconds]
  return max(fitting or models[:1], key=needed_flops)


@functools.cache
def needed_flops(cfg: config.Model) -> float:
  """FLOPs of a run over `TOKENS_PER_PARAMETER`, in windows of 512 tokens."""
  count = model.count_parameters(cfg)["total"]
  return TOKENS_PER_PARAMETER * count * cost.flops_per_token(cfg, 512)


def train(cfg: config.Config, folder: pathlib.Path, seconds: float) -> dict:
  """`loop.fit`, told to stop when `seconds` are over; its last log row."""
  begin = time.monotonic()
  with stopped_after(seconds):
    state = loop.fit(cfg, folder)
  # Without any, where the time was over before the first.
  rows = study.read_csv(folder / "train.csv")
  return {
    "parameters": sum(a.size for a in jax.tree.leaves(state.model)),
    "config": dataclasses.asdict(cfg),
    "steps": int(state.step),
    "of": cfg.train.steps,
    "seconds": time.monotonic() - begin,
    "last_row": rows[-1] if rows else None,
  }


@contextlib.contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
  """SIGTERM after some seconds, once `loop.fit` takes it as a wish to save."""
  over = threading.Event()

  def watch():
    if over.wait(max(seconds, 0)):
      return
    while signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
      if over.wait(0.2):  # not compiled yet: there is nothing to save
        return
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=watch, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def decode(
  stage: record.Stage, scale: scales.Scale, folder: pathlib.Path, held
) -> None:
  """`decode_speed`'s comparison, one batch size after another."""
  bandwidth = stage.recorded("decoding", "device").get("bytes_per_second")
  bandwidth = bandwidth or limits.bandwidth(scale.decoding.megabytes)
  loaded = {}

  def load():
    net, cfg, codec = workdir.load(folder)
    decoder = layout.lay_out(net, codec.vocab)
    length = min(PROMPT, cfg.data.seq_len // 2)
    new = cfg.data.seq_len - length
    count = max(scale.batches)
    every = held.excerpts(2 * count, length, cfg.data.seq_len, per_document=8)
    order = np.random.default_rng(0).permutation(2 * count)
    tuning, prompts = np.split(np.array(every)[order], 2)
    acceptance = autotune.measure_acceptance(decoder, tuning[:8], max_new=new)
    trees = [tree_lib.chain(k) for k in (1, 2, 4, 8) if k <= decoder.n_future]
    trees += [tree_lib.build(acceptance, size) for size in (16, 64)]
    trees = list(dict.fromkeys(trees))  # small chances give small trees
    loaded.update(decoder=decoder, prompts=prompts, new=new, trees=trees)
    return {"acceptance": acceptance.tolist(), "prompt_len": length, "new": new}

  stage.attempt("acceptance", load, kind="acceptance", estimate=10)
  if not loaded:
    return

  def one(batch):
    """Compiles all topologies side by side; what fails there, fails later."""
    decoder, new = loaded["decoder"], loaded["new"]
    prompts = loaded["prompts"][: max(batch, min(4, max(scale.batches)))]
    record.together(
      {
        tree: functools.partial(
          compare.decode, decoder, tree, [prompts[:batch]], new
        )
        for tree in loaded["trees"]
      }
    )
    return compare.one_batch(
      decoder,
      loaded["trees"],
      compare.Work(prompts, batch, new),
      bandwidth=bandwidth,
    )

  for batch in scale.batches:
    stage.attempt(
      f"batch {batch}", functools.partial(one, batch), kind="batch", estimate=20
    )
