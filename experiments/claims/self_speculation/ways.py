"""Three ways to get heads 2..N, at equal tokens and of equal shape.

pretrained   trunk and N heads from the start, for all steps
frozen       a next-token model, then heads 2..N on a frozen trunk
joint        the same, then the whole model with its new heads

The two stages of the others together take as many steps as the first. Added
heads begin as copies of head 1. The optimiser starts afresh with them. They
read the corpus in an order of their own: batches depend on the seed and the
step, so the same seed would give them the first batches once more.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator

import jax

from configs.paper import base
from experiments.claims import byte_sweeps
from experiments.claims.self_speculation import scales
from experiments.measure import python_models, sweep
from mtp_jax import config, tokenizer
from mtp_jax.data import pipeline
from mtp_jax.decode import layout, serve
from mtp_jax.evaluate import heads as head_measures
from mtp_jax.model import model, surgery

CLAIM = "self_speculation"
WAYS = ("pretrained", "frozen", "joint")
_NEW_ORDER = 1000  # what added heads add to the seed of the data


def runs(
  scale: scales.Scale, folder: pathlib.Path, seeds: int
) -> list[sweep.Run]:
  """The runs of the claim, seed after seed."""
  return [
    sweep.Run(
      CLAIM,
      way,
      {
        "width": scale.cfg.model.width,
        "heads": scale.cfg.model.n_future,
        "tokens": scale.cfg.train.steps
        * scale.cfg.data.batch
        * scale.cfg.data.seq_len,
        "added": 0 if way == "pretrained" else scale.added,
        "peak": scale.added_peak,
      }
      | ({} if way == "pretrained" else {"data_seed": seed + _NEW_ORDER}),
      seed,
      _measure(way, scale, folder, seed),
      check=functools.partial(_check, scale),
    )
    for seed in range(seeds)
    for way in WAYS
  ]


def _check(scale):
  if scale.paper:
    byte_sweeps.check("configs/paper/code_7b.py", scale.cfg)


def _measure(way, scale, folder, seed):
  cfg = scale.cfg.replace(train={"seed": seed}, data={"seed": seed}).check()

  def measure(place):
    nonlocal cfg
    if scale.paper:
      cfg = base.one_row_per_chip(cfg, jax.device_count())
    net = _trained(way, cfg, scale, folder / f"next-token-seed{seed}", place)
    yield from figures(net, cfg, scale)

  return measure


def _trained(way, cfg, scale, base, place) -> model.Model:
  """The model of one way, trained in `place`; the next-token model in `base`,
  once for both ways that begin with it."""
  if way == "pretrained":
    return sweep.train(cfg, place / "model")
  first = next_token(cfg, cfg.train.steps - scale.added)
  later = cfg.replace(
    data={"seed": cfg.data.seed + _NEW_ORDER},
    train={
      "steps": scale.added,
      "freeze": "trunk" if way == "frozen" else "none",
      "eval_every": scale.added,
    },
    optim={"peak": scale.added_peak},
  )

  def init():
    net = sweep.train(first, base / "model")
    return surgery.add_heads(net, cfg.model.n_future), {}

  return sweep.train(later, place / "model", init)


def next_token(cfg: config.Config, steps: int) -> config.Config:
  """The config of head 1 on the same trunk."""
  section = dataclasses.asdict(cfg.model.with_heads(1))
  return cfg.replace(model=section, train={"steps": steps, "eval_every": steps})


def figures(
  net: model.Model, cfg: config.Config, scale: scales.Scale
) -> Iterator[sweep.Figure]:
  """What the heads are worth: on held-out text, and in greedy decoding."""
  codec, step = tokenizer.load(cfg.data.tokenizer), cfg.train.steps
  held = pipeline.pack(cfg.data, codec)[1]
  rows, kernel = python_models.held_out(cfg)
  found = head_measures.measure(net, rows, kernel=kernel)
  for i in range(cfg.model.n_future):
    yield sweep.Figure(step, f"nats {i + 1}", found["nats"][i])
    yield sweep.Figure(step, f"accuracy {i + 1}", found["accuracy"][i])
  yield sweep.Figure(step, "predicted tokens per forward", found["greedy"])
  size = scale.prompt_len + scale.new
  prompts = held.excerpts(scale.prompts, scale.prompt_len, size, per_document=8)
  written = serve.generate_all(
    layout.lay_out(net, codec.vocab),
    prompts,
    rows=min(16, scale.prompts),
    heads=cfg.model.n_future,
    max_new=scale.new,
  )
  for i, share in enumerate(written.accepted[1:], 2):
    yield sweep.Figure(step, f"accepted {i}", share)
  yield sweep.Figure(step, "tokens per forward", written.tokens_per_forward)
