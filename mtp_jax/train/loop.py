"""A run in a workdir: the loop around the training step, and what it keeps."""

import contextlib
import json
import pathlib

import jax

from mtp_jax import config, sharding
from mtp_jax.checkpoint import checkpoints, storage
from mtp_jax.data import pipeline
from mtp_jax.train import (
  evaluations,
  lock,
  logs,
  metrics,
  processes,
  report,
  resume,
)
from mtp_jax.train import step as step_lib
from mtp_jax.train import workdir as workdir_lib


class Diverged(Exception):
  """Too many steps in a row had a non-finite loss or gradient."""


def fit(
  cfg: config.Config,
  workdir: str | pathlib.Path,
  *,
  profile: range = range(0),
) -> step_lib.State:
  """Trains, or goes on training, in `workdir`.

  Starts from the newest whole checkpoint there. SIGTERM (and the first
  Ctrl-C) saves the current step and returns, once the first step is compiled;
  before, there is nothing to save, and signals act as without this function.
  The run is a function of `cfg` alone: stopped, killed and resumed anywhere, it
  ends with the same bits.
  Says on standard output what it does (`report`). Nothing that it says or
  logs ends it, and no failed evaluation or sample; among several processes,
  those end it that fail on some of them while the others compute.

  Args:
    cfg: the run's settings.
    workdir: takes config.json, checkpoints/, train.csv, held_out.csv,
      samples/, tensorboard/, profile/, a copy of a SentencePiece model and
      `lock`, which keeps other runs out. Several processes
      (`processes.join`) share it. A start that is refused leaves at most
      `lock`, which is empty then.
    profile: steps, counted from 1, that `jax.profiler` traces.

  Returns:
    The last state: of step `cfg.train.steps`, or where it was told to stop.

  Example:
    >>> import pathlib, mtp_jax
    >>> _ = pathlib.Path("text.txt").write_text("To be or not to be. " * 99)
    >>> cfg = mtp_jax.Config().replace(
    ...   model={"width": 16, "mlp": 32, "head": "unembedding"},
    ...   data={"source": "text", "path": "text.txt", "cache": "cache",
    ...         "seq_len": 16, "batch": 2},
    ...   optim={"warmup": 1},
    ...   train={"steps": 3, "sample_tokens": 0},
    ... )
    >>> state = mtp_jax.fit(cfg, "runs/tiny")
    reading the corpus, which is packed once ...
    finished at step 3; ...
    >>> int(state.step)
    3

  Raises:
    ValueError: settings that do not fit each other, the data or the devices.
    pipeline.CacheDamaged: the packed corpus changed on the disk; every step
      before it was trained on sound data.
    checkpoint.CheckpointError: the workdir holds another run, is in use by
      one, cannot be written, or is not shared by all processes.
    Diverged: `train.max_bad_steps` non-finite steps in a row, or the run
      ends with one.
    processes.PeerLost: another process of the run is gone.
  """
  pipeline.refuse_in_worker()
  cfg = cfg.check()
  if profile and profile.start > cfg.train.steps:
    raise ValueError(
      f"profile starts with step {profile.start}, but the run ends with step "
      f"{cfg.train.steps}"
    )
  if profile:
    metrics.check_tracing()
  workdir = storage.local(workdir)
  storage.folder(workdir)  # refuses a path before any work is done
  workdir_lib.check_format(workdir)
  codec = workdir_lib.tokenizer(cfg, workdir)
  mesh = sharding.make_mesh(cfg.mesh)
  _check_batch(cfg, mesh)
  like = step_lib.abstract_state(cfg, mesh)
  evaluations.check(cfg, mesh, like.model)
  progress = report.Progress(jax.process_index() == 0)
  with lock.exclusive(workdir):  # before the corpus is packed for hours
    with progress.doing("reading the corpus, which is packed once"):
      packed = pipeline.pack(cfg.data, codec)
    metadata = workdir_lib.metadata(cfg, codec, packed)
    with processes.watched():
      _check_agreement(metadata)
    for line in report.settings(cfg, packed, mesh):
      progress.say(line)
    with (
      checkpoints.Checkpoints(
        workdir / "checkpoints", keep=cfg.train.keep
      ) as saved,
      processes.stop_signals() as asked,
      processes.watched(saved.abandon),
    ):
      found = saved.restore(
        like, refusals=lambda stored: resume.refusals(stored, metadata)
      )
      state = found[0] if found else step_lib.init_state(cfg, mesh)
      start = int(state.step)
      if start > cfg.train.steps:
        raise ValueError(
          f"{workdir} is at step {start} already, past train.steps "
          f"{cfg.train.steps}: set --config.train.steps={start} or more"
        )
      workdir_lib.write_settings(cfg, workdir)
      if found:
        progress.say(f"resuming from step {start}")
        for line in resume.changes(found[1], metadata):
          progress.say(line)
      else:
        progress.say(f"a new run in {workdir}")
      run = _Run(
        cfg, mesh, codec, packed, workdir, start, profile, progress, saved
      )
      try:
        return run.steps(state, metadata, asked)
      finally:
        run.close()


class _Run:
  """The loop of `fit`: steps, reports, saves, measures."""

  def __init__(
    self, cfg, mesh, codec, packed, workdir, start, profile, progress, saved
  ):
    self.cfg, self.mesh, self.workdir = cfg, mesh, workdir
    self.train, self.held_out = packed
    self.start, self.progress, self.saved = start, progress, saved
    self.block = sharding.reader(mesh, jax.process_index())
    first = jax.process_index() == 0
    self.writer = logs.Writer(workdir, start, first)
    self.clock = metrics.Clock(cfg.model, cfg.data)
    self.trace = metrics.Trace(workdir / "profile", profile, first)
    self.evaluations = evaluations.Evaluations(
      cfg,
      mesh,
      codec,
      self.held_out,
      self._held_out_batch,
      self.writer,
      progress,
    )

  def close(self):
    self.trace.close()
    self.progress.close()

  def steps(self, state, metadata, asked):
    cfg = self.cfg.train
    due = self._due(self.start, cfg.eval_every)
    if due and self.evaluations.lacks(self.start):  # stopped before it
      self.evaluations.run(self.start, state.model)
    if self.start == cfg.steps:
      self.progress.say(
        f"finished already, with train.steps {cfg.steps}. To go on, set "
        f"--config.train.steps={2 * cfg.steps}, for example: the learning rate "
        "then follows the longer schedule from here on"
      )
      return state
    self.progress.start(cfg.steps, self.start)
    batches = pipeline.batches(
      self.train,
      **self._rows(self.cfg.data.batch),
      seed=self.cfg.data.seed,
      workers=self.cfg.data.workers,
      start=self.start,
    )
    step_fn = step_lib.compile_step(self.cfg, self.mesh)
    previous, unsaved = None, False
    for step in range(self.start + 1, cfg.steps + 1):
      with self.trace.step(step):
        with (
          self._rescuing(step - 1, state, previous, metadata),
          self.clock.waiting(),
        ):
          batch = self._place(next(batches))
        with self._compiling(step):
          state, found = step_fn(state, batch)
      asked.watch()  # compiled; until now there was nothing to save
      self._check(step - 1, previous)  # one step late: the device goes on
      previous = found
      self.clock.step()
      with self.clock.paused():
        self.trace.end(step, found)
      self.progress.advance(step)
      stop = processes.told_to_stop(asked, step)
      if self._due(step, cfg.log_every):
        self._report(step, found)
      # Before the evaluation: what fails there loses no step.
      unsaved |= self._due(step, cfg.save_every) or stop
      if unsaved:
        self._check(step, found)
        # Do not save while the newest steps are not finite.
        unsaved = int(found["bad"]) > 0
        if not unsaved:
          with self.clock.paused():
            self.saved.save(step, state, metadata, wait=stop)
      if stop:
        self._say_stopped(step, unsaved)
        break
      if self._due(step, cfg.eval_every):
        with self.clock.paused():
          self.evaluations.run(step, state.model)
    else:
      self._check(step, found, most=1)
      self.saved.wait()
      self.progress.say(report.end(self.workdir, step))
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
    return jax.tree.map(
      lambda rows: jax.make_array_from_process_local_data(
        where, rows, (len(rows) * blocks, rows.shape[1])
      ),
      batch,
    )

  def _held_out_batch(self, index):
    # As many rows at once as a step holds: the whole batch might not fit.
    rows = self._rows(self.cfg.data.batch // self.cfg.train.accumulate)
    return self._place(pipeline.batch_at(self.held_out, index, **rows, seed=0))

  def _due(self, step, every):
    return step > 0 and (step % every == 0 or step == self.cfg.train.steps)

  def _compiling(self, step):
    if step > self.start + 1:
      return contextlib.nullcontext()
    return self.progress.doing("compiling the training step")

  @contextlib.contextmanager
  def _rescuing(self, step, state, found, metadata):
    """Where reading the batch after `step` fails, saves `step` first.

    Among several processes only one may fail, and none can save alone.
    """
    try:
      yield
    except Exception as error:
      if jax.process_count() == 1 and found and not int(found["bad"]):
        self.saved.save(step, state, metadata, wait=True)
      if isinstance(error, pipeline.CacheDamaged):
        raise pipeline.CacheDamaged(
          f"{error}. All steps up to {step} were trained on sound data; "
          f"{self._newest()}"
        ) from error
      raise

  def _say_stopped(self, step, unsaved):
    if not unsaved:
      self.progress.say(f"told to stop: step {step} is saved")
      return
    self.progress.say(
      f"told to stop: step {step} is not saved, since its loss or gradient "
      f"was not finite; {self._newest()}"
    )

  def _newest(self):
    steps = self.saved.steps()
    if not steps:
      return "there is no checkpoint yet"
    return f"the newest checkpoint is that of step {steps[-1]}"

  def _check(self, step, found, most=None):
    bad = int(found["bad"]) if found else 0
    if bad < (most or self.cfg.train.max_bad_steps):
      return
    raise Diverged(
      f"step {step}: loss {float(found['loss'])} or gradient norm "
      f"{float(found['grad_norm'])} was not finite {bad} steps in a row. They "
      f"changed no parameter and were not saved; {self._newest()}. Start again "
      "on this workdir with a lower optim.peak, a longer optim.warmup, or, if "
      "such steps are to be passed over, more train.max_bad_steps; or look at "
      "the data of these steps. Where the next steps are not finite either, "
      "remove that checkpoint, and the run goes on from the one before"
    )

  def _report(self, step, found):
    found = jax.device_get(found)
    rate = self.clock.lap()
    values = {"loss": found["loss"], "grad_norm": found["grad_norm"]}
    values["learning_rate"] = found["learning_rate"]
    values["skipped_steps"] = found["skipped"]
    values |= evaluations.per_head(found["nats"], self.train) | rate
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
  first, *others = map(json.loads, found)
  for i, other in enumerate(others, 1):
    if lines := resume.disagreements(first, other):
      raise ValueError(
        f"process 0 (the first) and process {i} (the second) do not do the "
        f"same run: {'; '.join(lines)}. Start all with the same settings, on "
        "the same files"
      )
