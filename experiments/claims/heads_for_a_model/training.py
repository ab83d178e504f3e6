"""Heads 2..N on a frozen trunk, whose outputs are computed once.

The trunk runs over every window once; its outputs stay in memory, and the
training step reads them (`Batch.z`). The unembedding is cut to the commonest
ids of the corpus: it stays as it is, and a smaller one makes a step on a CPU
several times cheaper. Other ids are no targets.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.claims.heads_for_a_model import scales
from mtp_jax import config, sharding
from mtp_jax.data import batch as batch_lib
from mtp_jax.data import pipeline
from mtp_jax.model import model, surgery, vocabulary
from mtp_jax.train import step as step_lib


def windows(
  net: model.Model, packed: pipeline.Packed, count: int, scale: scales.Scale
) -> list[batch_lib.Batch]:
  """`count` batches of a corpus, with the trunk's outputs in bfloat16."""

  @jax.jit
  def trunk(net, batch):
    z = net.read(batch.tokens, batch.segments).z
    return z.astype(jnp.bfloat16)

  batching = pipeline.Batching(
    scale.batch, scale.seq_len, net.cfg.reach, seed=0
  )
  batches = []
  for i in range(count):
    batch = pipeline.batch_at(packed, i, batching)
    z = np.asarray(trunk(net, batch))
    batches.append(dataclasses.replace(batch, z=z))
    if i % 20 == 0:
      logging.info("trunk: %d of %d batches", i, count)
  return batches


def count(tokens: int, scale: scales.Scale) -> int:
  """Batches of so many tokens."""
  return max(1, tokens // (scale.batch * scale.seq_len))


def commonest(batches: list[batch_lib.Batch], size: int) -> np.ndarray:
  """The commonest ids of some batches, `size` at most, in ascending order."""
  tokens = np.concatenate([b.tokens.ravel() for b in batches])
  ids, counts = np.unique(tokens, return_counts=True)
  return np.sort(ids[np.argsort(-counts, kind="stable")[:size]])


def train(
  net: model.Model,
  batches: list[batch_lib.Batch],
  ids: np.ndarray,
  scale: scales.Scale,
  seed: int,
) -> tuple[model.Model, list[dict]]:
  """Trains heads 2..N of `net` on batches from `windows`.

  Args:
    net: the model.
    batches: of a corpus.
    ids: what the heads learn to predict, ascending; see `commonest`.
    scale: how long, how fast.
    seed: order of the batches.

  Returns:
    The model with its new heads, and a row for every tenth of the training:
    step, and nats per token of each head.
  """
  small = vocabulary.cut(net, ids)
  steps = scale.epochs * len(batches)
  cfg = config.Config().replace(
    model=dataclasses.asdict(small.cfg),
    data={"batch": scale.batch, "seq_len": scale.seq_len},
    optim={
      "peak": scale.peak,
      "warmup": max(1, steps // 20),
      "decay": 0.01,
    },
    train={"steps": steps, "freeze": "trunk", "seed": seed},
    mesh={"data": 1},
  )
  mesh = sharding.make_mesh(cfg.mesh, jax.local_devices()[:1])
  state = step_lib.init_state(cfg, mesh, init=small)
  step = step_lib.compile_step(cfg, mesh)
  draw = np.random.default_rng(seed)
  rows, every = [], max(1, steps // 10)
  for i in range(steps):
    if i % len(batches) == 0:
      order = draw.permutation(len(batches))
    batch = renumbered(batches[order[i % len(batches)]], ids)
    state, metrics = step(state, batch)
    if i % every == 0 or i + 1 == steps:
      nats = np.asarray(metrics["nats"]).tolist()
      rows.append({"step": i + 1, "nats": nats})
      told = " ".join(f"{x:.3f}" for x in nats)
      logging.info("step %d of %d: %s nats", i + 1, steps, told)
  return surgery.join(net, surgery.trainable(state.model)), rows


def renumbered(batch: batch_lib.Batch, ids: np.ndarray) -> batch_lib.Batch:
  """Tokens as places in the ascending `ids`; others have weight 0."""
  places = np.searchsorted(ids, batch.tokens).clip(max=len(ids) - 1)
  known = ids[places] == batch.tokens
  return dataclasses.replace(
    batch,
    tokens=np.where(known, places, 0).astype(np.int32),
    weight=np.where(known, batch.weight, 0).astype(np.float32),
  )
