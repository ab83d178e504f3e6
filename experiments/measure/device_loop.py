"""Many training steps per call, for models that wait for the host otherwise.

The step is the library's, `train.step.train_step`, in a `jax.lax.scan` over
batches that travel to the device together, while it computes the steps before.
"""

import contextlib
import dataclasses
import functools
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import config, sharding
from mtp_jax.checkpoint import checkpoints
from mtp_jax.data import batch as batch_lib
from mtp_jax.model import model
from mtp_jax.train import resume
from mtp_jax.train import step as step_lib

SAVE_S = 600  # seconds between two checkpoints, so shorter trainings have none


class Progress(NamedTuple):
  """Where a training is after a call."""

  step: int
  net: model.Model  # valid until the next call
  nats: np.ndarray  # [N] of each head, the mean over the call's steps
  # Both count from the end of the first call since the program started.
  seconds: float  # without pauses
  tokens: int  # positions trained on


def train(
  cfg: config.Config,
  rows: Callable[[int], batch_lib.Batch],
  *,
  steps_per_call: int,
  folder: pathlib.Path | None = None,
  depends_on: Mapping[str, Any] | None = None,
) -> Iterator[Progress]:
  """Trains a model on one device; yields after every call.

  Equals `train.steps` calls of the step that `train.step.compile_step` makes.
  Runs that differ in `train.seed` alone share one program.

  Args:
    cfg: its model, optim and train sections, and B and T of data.
    rows: call number -> its rows, a Batch [steps_per_call * B, T+N] on the
      host. A thread calls it ahead.
    steps_per_call: steps of one call; divides `train.steps`.
    folder: takes a checkpoint every `SAVE_S` seconds, between two calls. A
      training resumes from the one that is there, see `saved_step`. None:
      nothing is saved.
    depends_on: what else `rows` depend on, JSON values. A checkpoint made with
      other values is refused.

  Raises:
    ValueError: steps that are not whole calls, or rows of another shape.
    FloatingPointError: a loss was not finite.
    checkpoints.CheckpointError: the checkpoint in `folder` is damaged, or of
      other settings, or one cannot be saved.
  """
  cfg, K = cfg.check(), steps_per_call
  if cfg.train.steps % K:
    raise ValueError(
      f"train.steps {cfg.train.steps} are not whole calls of {K} steps"
    )
  call = compiled(cfg, K).result()
  with contextlib.ExitStack() as stack:
    if folder is not None:
      saved = stack.enter_context(_saved(folder))
      settings = {"config": dataclasses.asdict(cfg), "steps_per_call": K}
      settings["depends_on"] = dict(depends_on or {})
      state, first = _resumed(cfg, folder, saved, settings)
    else:
      state, first = _initial_state(cfg), 0
    chunks = stack.enter_context(
      contextlib.closing(_ahead(cfg, rows, K, first))
    )
    begin = last_save = time.monotonic()
    paused = 0.0
    for i, chunk in enumerate(chunks, first):
      state, nats = call(state, chunk)
      nats = np.asarray(nats)  # waits for the device
      step = (i + 1) * K
      if not np.isfinite(nats).all():
        raise FloatingPointError(f"the loss was not finite by step {step}")
      now = time.monotonic()
      if i == first:
        begin = now
      tokens = (i - first) * K * cfg.data.batch * cfg.data.seq_len
      yield Progress(step, state.model, nats, now - begin - paused, tokens)
      due = time.monotonic() - last_save >= SAVE_S
      if folder is not None and due and step < cfg.train.steps:
        saved.save(step, state, settings)
        last_save = time.monotonic()
      paused += time.monotonic() - now


def saved_step(folder: pathlib.Path) -> int:
  """The step from which `train` resumes in `folder`; -1: from the start."""
  with _saved(folder) as saved:
    return _newest(saved)


def _saved(folder) -> checkpoints.Checkpoints:
  return checkpoints.Checkpoints(folder / "checkpoints", keep=1)


def _newest(saved) -> int:
  return max(saved.steps(), default=-1)


def _resumed(cfg, folder, saved, settings):
  """The state to resume from, and the number of its call."""
  step = _newest(saved)
  if step < 0:
    return _initial_state(cfg), 0
  try:
    state, *_ = saved.restore(
      step_lib.abstract_state(cfg, _mesh()),
      step=step,  # an earlier one is not what `saved_step` says
      refusals=lambda stored: resume.differences(stored, settings),
    )
  except checkpoints.CheckpointError as error:
    raise checkpoints.CheckpointError(
      f"{error}. Or remove {folder / 'checkpoints'}: the training begins again"
    ) from error
  return state, step // settings["steps_per_call"]


def compiled(cfg: config.Config, steps_per_call: int) -> futures.Future:
  """The program of a config, which a thread compiles.

  Ask for those of a whole sweep at first: they compile side by side.
  """
  return _compiled(cfg.check().replace(train={"seed": 0}), steps_per_call)


def evaluate_ahead(
  cfgs: Iterable[config.Config], evaluate: Callable[[model.Model], object]
) -> list[threading.Thread]:
  """Compiles what `evaluate` computes on each config's model, in threads.

  Each calls it with an untrained model, which compiles its beginning too.
  """

  def work(cfg):
    evaluate(_initial_state(cfg).model)

  threads = [
    threading.Thread(target=work, args=(cfg.check(),), daemon=True)
    for cfg in cfgs
  ]
  for thread in threads:
    thread.start()
  return threads


def _initial_state(cfg):
  net = _initial(cfg.model)(jax.random.key(cfg.train.seed))
  return step_lib.init_state(cfg, _mesh(), init=net)


@functools.cache
def _mesh():
  return sharding.make_mesh(config.Mesh(data=1), jax.local_devices()[:1])


@functools.cache
def _initial(cfg):
  """Key -> a random model. On a CPU it compiles longer than a step."""
  return jax.jit(lambda key: model.Model(cfg, key))


@functools.cache
def _compiled(cfg, K):
  shape = (K, cfg.data.batch, cfg.data.seq_len + cfg.model.n_future)
  kind = _integers(cfg)
  chunk = batch_lib.Batch(
    jax.ShapeDtypeStruct(shape, kind),
    jax.ShapeDtypeStruct(shape, np.int16),
    jax.ShapeDtypeStruct(shape, np.float32),
  )

  def call(state, chunk):
    def one(state, rows):
      wide = batch_lib.of(
        rows.tokens.astype(jnp.int32),
        rows.segments.astype(jnp.int32),
        rows.weight,
      )
      state, metrics = step_lib.train_step(state, wide, cfg=cfg, mesh=_mesh())
      return state, metrics["nats"]

    state, nats = jax.lax.scan(one, state, chunk)
    return state, nats.mean(0)

  lowered = jax.jit(call, donate_argnums=0).lower(
    step_lib.abstract_state(cfg, _mesh()), chunk
  )
  found = futures.Future()

  def work():
    try:
      found.set_result(lowered.compile())
    except Exception as error:
      found.set_exception(error)

  threading.Thread(target=work, daemon=True).start()
  return found


def _integers(cfg):
  """The dtype in which tokens travel."""
  return np.int16 if cfg.model.vocab <= 2**15 else np.int32


def _ahead(cfg, rows, K, first):
  """The chunks of calls from `first` on; a thread prepares some beforehand."""
  calls = range(first, cfg.train.steps // K)
  shape = (K * cfg.data.batch, cfg.data.seq_len + cfg.model.n_future)
  ready, stopped = queue.Queue(2), threading.Event()

  def put(chunk):
    while not stopped.is_set():
      try:
        return ready.put(chunk, timeout=0.1)
      except queue.Full:
        continue

  def prepare():
    try:
      for i in calls:
        chunk = rows(i)
        if chunk.tokens.shape != shape:
          raise ValueError(
            f"rows {chunk.tokens.shape}, but the config asks for {shape}"
          )
        if stopped.is_set():
          return
        put(_placed(cfg, chunk, K))
    except Exception as error:
      put(error)

  thread = threading.Thread(target=prepare, daemon=True)
  thread.start()
  try:
    for _ in calls:
      chunk = ready.get()
      if isinstance(chunk, Exception):
        raise chunk
      yield chunk
  finally:
    stopped.set()
    thread.join()


def _placed(cfg, chunk, K):
  """Rows [K * B, T+N] as [K, B, T+N] on the device, in small integers."""

  def place(values, dtype):
    values = values.astype(dtype).reshape(K, -1, values.shape[1])
    return jax.device_put(values, _mesh().devices.flat[0])

  return batch_lib.Batch(
    place(chunk.tokens, _integers(cfg)),
    place(chunk.segments, np.int16),
    place(chunk.weight, np.float32),
  )
