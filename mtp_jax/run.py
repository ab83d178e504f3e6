"""A run in a workdir: the loop around the training step, and what it keeps."""

import json
import pathlib

import jax
import numpy as np

from mtp_jax import (
  checkpoint,
  config,
  metrics,
  processes,
  record,
  sharding,
  storage,
  tokenizer,
)
from mtp_jax import train as train_lib
from mtp_jax import workdir as workdir_lib
from mtp_jax.data import pipeline
from mtp_jax.decode import generate, prepare
from mtp_jax.evaluate import held_out


class Diverged(Exception):
  """Too many steps in a row had a non-finite loss or gradient."""


def fit(
  cfg: config.Config,
  workdir: str | pathlib.Path,
  *,
  profile: range = range(0),
) -> train_lib.State:
  """Trains, or goes on training, in `workdir`.

  Starts from the newest whole checkpoint there. SIGTERM (and the first
  Ctrl-C) saves the current step and returns, once the first step is compiled;
  before, there is nothing to save, and signals act as without this function. The run is a function of `cfg`
  alone: stopped, killed and resumed anywhere, it ends with the same bits.

  Args:
    cfg: the run's settings.
    workdir: takes config.json, checkpoints/, train.csv, held_out.csv,
      sample.txt, tensorboard/, profile/, a copy of a SentencePiece model and
      `lock`, which keeps other runs out. Several processes
      (`processes.join`) share it.
    profile: steps, counted from 1, that `jax.profiler` traces.

  Returns:
    The last state: of step `cfg.train.steps`, or where it was told to stop.

  Raises:
    ValueError: settings that do not fit each other, the data or the devices.
    checkpoint.CheckpointError: the workdir holds another run, is in use by
      one, cannot be written, or is not shared by all processes.
    Diverged: `train.max_bad_steps` non-finite steps in a row.
    processes.PeerLost: another process of the run is gone.
  """
  pipeline.refuse_in_worker()
  cfg.check()
  if profile and profile.start > cfg.train.steps:
    raise ValueError(
      f"profile starts with step {profile.start}, but the run ends with step "
      f"{cfg.train.steps}"
    )
  workdir = pathlib.Path(workdir).expanduser()
  storage.folder(workdir)  # refuses a path before any work is done
  codec = workdir_lib.tokenizer(cfg, workdir)
  mesh = sharding.make_mesh(cfg.mesh)
  _check_batch(cfg, mesh)
  packed = pipeline.pack(cfg.data, codec)
  metadata = workdir_lib.metadata(cfg, codec, packed)
  with processes.watched():
    _check_agreement(metadata)
  with (
    workdir_lib.lock(workdir),
    checkpoint.Checkpoints(
      workdir / "checkpoints", keep=cfg.train.keep
    ) as saved,
    processes.stop_signals() as asked,
    processes.watched(saved.abandon),
  ):
    found = saved.restore(
      train_lib.abstract_state(cfg, mesh), expect=workdir_lib.fixed(metadata)
    )
    state = found[0] if found else train_lib.init_state(cfg, mesh)
    workdir_lib.write_settings(cfg, workdir)
    run = _Run(cfg, mesh, codec, packed, workdir, int(state.step), profile)
    try:
      return run.steps(state, saved, metadata, asked)
    finally:
      run.close()


class _Run:
  """The loop of `fit`: steps, reports, measures, saves."""

  def __init__(self, cfg, mesh, codec, packed, workdir, start, profile):
    self.cfg, self.mesh, self.codec = cfg, mesh, codec
    self.train, self.held_out = packed
    self.start = start
    self.block = sharding.reader(mesh, jax.process_index())
    first = jax.process_index() == 0
    self.writer = metrics.Writer(workdir, start, first)
    self.progress = metrics.Progress(cfg.train.steps, start, first)
    self.clock = metrics.Clock(cfg.model, cfg.data)
    self.trace = metrics.Trace(workdir / "profile", profile, first)

  def close(self):
    self.trace.close()
    self.progress.close()
    self.writer.close()

  def steps(self, state, saved, metadata, asked):
    cfg = self.cfg.train
    if self.start:
      self.progress.say(f"going on from step {self.start}")
    batches = pipeline.batches(
      self.train,
      **self._rows(self.cfg.data.batch),
      seed=self.cfg.data.seed,
      workers=self.cfg.data.workers,
      start=self.start,
    )
    step_fn = train_lib.compile_step(self.cfg, self.mesh)
    previous = None
    for step in range(self.start + 1, cfg.steps + 1):
      with self.trace.step(step):
        with self.clock.waiting():
          batch = self._place(next(batches))
        state, found = step_fn(state, batch)
      asked.watch()  # compiled; until now there was nothing to save
      self._check(step - 1, previous)  # one step late: the device goes on
      previous = found
      self.clock.step()
      with self.clock.paused():
        self.trace.end(step, found)
      self.progress.advance(step)
      stop = processes.told_to_stop(asked, step)
      if step % cfg.log_every == 0 or step == cfg.steps:
        self._report(step, found)
      if step % cfg.eval_every == 0 or step == cfg.steps:
        with self.clock.paused():
          self._measure(step, state.model)
      if step % cfg.save_every == 0 or step == cfg.steps or stop:
        self._check(step, found)
        with self.clock.paused():
          saved.save(step, state, metadata, wait=stop)
      if stop:
        self.progress.say(f"told to stop: step {step} is saved")
        break
    self._check(int(state.step), previous)
    return state

  def _rows(self, batch):
    """What `pipeline` has to know of the rows that this process reads."""
    block, blocks = self.block
    return dict(
      batch=batch,
      seq_len=self.cfg.data.seq_len,
      n_future=self.cfg.model.n_future,
      process=block,
      processes=blocks,
    )

  def _place(self, batch):
    where, (_, blocks) = sharding.batch_sharding(self.mesh), self.block
    return {
      name: jax.make_array_from_process_local_data(
        where, rows, (len(rows) * blocks, rows.shape[1])
      )
      for name, rows in batch.items()
    }

  def _check(self, step, found):
    if found is None or int(found["bad"]) < self.cfg.train.max_bad_steps:
      return
    raise Diverged(
      f"step {step}: loss {float(found['loss'])} or gradient norm "
      f"{float(found['grad_norm'])} was not finite {int(found['bad'])} steps "
      "in a row. The parameters are those before them; no step after the last "
      "checkpoint was saved. Lower optim.peak, raise optim.warmup, or look at "
      "the data of these steps"
    )

  def _report(self, step, found):
    found = jax.device_get(found)
    rate = self.clock.lap()
    values = {"loss": found["loss"], "grad_norm": found["grad_norm"]}
    values["learning_rate"] = found["learning_rate"]
    values["skipped_steps"] = found["skipped"]
    values |= self._per_head(found["nats"], self.train) | rate
    self.writer.write("train", step, values)
    line = f"loss {found['loss']:.3f}  head 1 {found['nats'][0]:.3f} nats"
    if rate["tokens_per_second"]:
      line += (
        f"  {rate['tokens_per_second']:,.0f} tokens/s, "
        f"{rate['data_wait_share']:.0%} of it waiting for data"
      )
    if "flop_utilisation" in rate:
      line += f"  {rate['flop_utilisation']:.1%} of peak"
    self.progress.report(step, line)

  def _per_head(self, nats, packed):
    """Nats per token and bits per byte of each head, by name."""
    bits = nats / np.log(2) / packed.bytes_per_token
    values = {f"nats_{i}": x for i, x in enumerate(nats, 1)}
    return values | {f"bits_per_byte_{i}": x for i, x in enumerate(bits, 1)}

  def _measure(self, step, net):
    # As many rows at once as a step holds: the whole batch might not fit.
    parts = self.cfg.train.accumulate
    rows = self._rows(self.cfg.data.batch // parts)
    batches = (
      self._place(pipeline.batch_at(self.held_out, i, **rows, seed=0))
      for i in range(self.cfg.train.eval_batches * parts)
    )
    kernel = train_lib.attention_kernel(self.cfg.model, self.mesh)
    found = held_out.measure(net, batches, kernel=kernel)
    values = self._per_head(found["nats"], self.held_out)
    accuracy = found["accuracy"]
    values |= {f"accuracy_{i}": x for i, x in enumerate(accuracy, 1)}
    values["tokens_per_forward_greedy"] = found["greedy"]
    values["tokens_per_forward_sampled"] = found["sampled"]
    self.writer.write("held_out", step, values)
    bits = [values[f"bits_per_byte_{i}"] for i in (1, len(accuracy))]
    self.progress.say(
      f"held out at step {step}: {bits[0]:.3f} bits per byte (head 1), "
      f"{bits[1]:.3f} (head {len(accuracy)}); "
      f"{found['greedy']:.2f} tokens per forward predicted"
    )
    if self.cfg.train.sample_tokens:
      self._sample(step, net)

  def _sample(self, step, net):
    """Continues the first half window of the held-out text."""
    prompt = self.held_out.window(0, max(1, self.cfg.data.seq_len // 2), 0)[0]
    written = generate.generate(
      prepare.decoder(net, self.codec.vocab),
      [prompt],
      heads=self.cfg.decode.heads or self.cfg.model.n_future,
      max_new=self.cfg.train.sample_tokens,
      stop=self.codec.eos,
    )
    given, *new = tokenizer.decode_parts(
      self.codec, [prompt, written.tokens[0]]
    )
    self.writer.write_text("sample", step, f"{given}[...]{''.join(new)}")


def _check_batch(cfg, mesh):
  rows = cfg.data.batch // cfg.train.accumulate
  devices = mesh.shape["data"]
  if rows % devices:
    raise ValueError(
      f"data.batch {cfg.data.batch} in {cfg.train.accumulate} microbatches "
      f"gives {rows} rows, not divisible by {devices} devices of axis 'data'"
    )


def _check_agreement(metadata):
  """All processes have the same settings, and packed the same corpus."""
  found = processes.gather(json.dumps(metadata))
  first, *others = (workdir_lib.shared(json.loads(text)) for text in found)
  for i, other in enumerate(others, 1):
    if lines := record.differing_metadata(first, other):
      raise ValueError(
        f"process 0 (the first) and process {i} (the second) do not do the "
        f"same run: {'; '.join(lines)}. Start all with the same settings, on "
        "the same files"
      )
