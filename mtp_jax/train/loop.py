"""Trains a model in a workdir: the loop around the training step."""

import contextlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from mtp_jax import config, sharding
from mtp_jax.checkpoint import checkpoints, storage
from mtp_jax.data import blocks, pipeline
from mtp_jax.model import model, surgery
from mtp_jax.train import (
  batches,
  evaluations,
  lock,
  metrics,
  processes,
  provenance,
  report,
  resume,
  terminal,
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
  init: model.Model | Callable[[], tuple[model.Model, dict]] | None = None,
) -> step_lib.State:
  """Trains a model in `workdir`, or resumes from its newest whole checkpoint.

  The result depends on `cfg` and `init` alone: a run that was stopped, killed
  and resumed ends with the same bits as one that was not.

  SIGTERM, or Ctrl-C once, saves the current step and returns. Until the first
  step is compiled there is nothing to save, and signals have their usual
  effect.

  Progress is printed on standard output. Failures of printing, logging,
  evaluations and samples do not stop the run. One exception: with several
  processes, a computation that fails on some of them stops all.

  Args:
    cfg: the run's settings.
    workdir: takes config.json, checkpoints/, train.csv, held_out.csv,
      samples/, tensorboard/, profile/, a copy of its tokenizer, and
      `lock`, which excludes other runs. Several processes (`processes.join`)
      share it. If the settings are refused, at most an empty `lock` is left.
    profile: steps, counted from 1, that `jax.profiler` traces.
    init: a model of `cfg.model` to start from; None: at random. Its arrays are
      copied. A run that resumes does not use it. Or a function that returns
      (model, origin): it is called once, after all checks, if nothing is
      resumed. `origin` goes into every checkpoint's metadata. It has JSON
      values: 'path', 'step', 'fingerprint', 'heads', 'settings'.

  Returns:
    The last state: of step `cfg.train.steps`, or of the step at which a signal
    stopped the run.

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
    ValueError: the settings do not fit each other, the data or the devices, or
      `train.freeze` would keep a trunk of random weights.
    blocks.CacheDamaged: the packed corpus changed on the disk. All steps
      before were trained on sound data.
    checkpoints.CheckpointError: the workdir holds another run, is in use by
      one, cannot be written, or is not shared by all processes.
    Diverged: `train.max_bad_steps` steps in a row, or the last step, had a
      non-finite loss or gradient.
    processes.PeerLost: another process of the run is gone.
  """
  pipeline.refuse_in_worker()
  cfg, workdir = cfg.check(), storage.local(workdir)
  codec, mesh = _prepare(cfg, workdir, profile, init)
  is_first = jax.process_index() == 0
  progress = terminal.Progress(is_first)
  with lock.exclusive(workdir):
    with processes.watched():  # before hours of packing
      _check_resume(cfg, codec, workdir)
    with progress.doing("reading the corpus, which is packed once"):
      splits = pipeline.pack(cfg.data, codec)
    metadata = workdir_lib.metadata(cfg, codec, splits)
    with processes.watched():
      resume.check_agreement(metadata)
    for line in report.settings(cfg, splits, mesh):
      progress.say(line)
    with (
      checkpoints.Checkpoints(
        workdir / "checkpoints", keep=cfg.train.keep
      ) as saved,
      processes.stop_signals() as stop_event,
      processes.watched(saved.abandon),
    ):
      start = _resume(cfg, mesh, saved, metadata, workdir)
      resumes = start is not None
      if not resumes:
        start = _begin(cfg, mesh, init, metadata, progress)
      if start.origin:
        metadata["init"] = start.origin
      workdir_lib.write_settings(cfg, workdir)
      reporter = report.Reporter(cfg, workdir, splits[0], start.step, progress)
      is_ignored = init is not None and resumes
      reporter.begins(start.changes, start.origin, is_ignored)
      loop = _Loop(cfg, mesh, splits, saved, metadata, reporter)
      measures = evaluations.Evaluations(
        cfg, mesh, codec, splits[1], loop.batches.held_out, reporter
      )
      trace = metrics.Trace(workdir / "profile", profile, is_first)
      with contextlib.closing(progress), contextlib.closing(trace):
        return loop.run(start.state, measures, trace, stop_event)


class _Loop:
  """Makes the steps of `fit`; saves, evaluates and reports when due."""

  def __init__(self, cfg, mesh, splits, saved, metadata, reporter):
    self.cfg, self.mesh = cfg, mesh
    self.batches = batches.Batches(cfg, mesh, splits)
    self.saved, self.metadata = saved, metadata
    self.reporter = reporter

  def run(self, state, measures, trace, stop_event):
    """Trains from `state` to the last step or a signal; returns the state."""
    cfg, reporter, clock = self.cfg.train, self.reporter, self.reporter.clock
    start = int(state.step)
    if self._due(start, cfg.eval_every) and measures.lacks(start):
      measures.run(start, state.model)  # the run had stopped before it
    if start == cfg.steps:
      reporter.finished_before(cfg.steps)
      return state
    reporter.progress.start(cfg.steps, start)
    rows = self.batches.training(start)
    step_fn = step_lib.compile_step(self.cfg, self.mesh)
    previous, unsaved = None, False
    for step in range(start + 1, cfg.steps + 1):
      with trace.step(step):
        with self._rescuing(step - 1, state, previous), clock.waiting():
          batch = self.batches.place(next(rows))
        with self._compiling(is_first=step == start + 1):
          state, values = step_fn(state, batch)
      stop_event.watch()  # the first step is compiled: now there is a state
      # Checked one step late, so that the device need not wait for the host.
      self._check(step - 1, previous)
      previous = values
      clock.step()
      with clock.paused():
        trace.end(step, values)
      reporter.progress.advance(step)
      stop = processes.told_to_stop(stop_event)
      if self._due(step, cfg.log_every):
        reporter.step(step, values)
      # Before the evaluation, so that its failure loses no step.
      if unsaved or stop or self._due(step, cfg.save_every):
        unsaved = not self._save_if_finite(step, state, values, wait=stop)
      if stop:
        reporter.stopped(step, self._newest() if unsaved else "")
        break
      if self._due(step, cfg.eval_every):
        with clock.paused():
          measures.run(step, state.model)
    else:
      self._check(step, values, limit=1)
      self.saved.wait()
      reporter.finished(step)
    return state

  def _due(self, step, every):
    return step > 0 and (step % every == 0 or step == self.cfg.train.steps)

  def _compiling(self, is_first):
    if not is_first:
      return contextlib.nullcontext()
    return self.reporter.progress.doing("compiling the training step")

  def _save_if_finite(self, step, state, values, wait):
    """Saves a state, unless its newest step was not finite; whether it did."""
    self._check(step, values)
    if int(values["bad"]) > 0:
      return False  # a later step is saved instead
    with self.reporter.clock.paused():
      self._save(step, state, wait)
    return True

  def _save(self, step, state, wait):
    self.saved.save(step, state, self.metadata, wait=wait)

  @contextlib.contextmanager
  def _rescuing(self, step, state, values):
    """Saves `step` if reading the next batch, inside, fails.

    With several processes nothing is saved: perhaps only one has failed, and
    none can save alone.
    """
    try:
      yield
    except Exception as error:
      if jax.process_count() == 1 and values and not int(values["bad"]):
        self._save(step, state, wait=True)
      if isinstance(error, blocks.CacheDamaged):
        raise blocks.CacheDamaged(
          f"{error}. All steps up to {step} were trained on sound data; "
          f"{self._newest()}"
        ) from error
      raise

  def _newest(self):
    """A sentence on the newest checkpoint, for messages."""
    steps = self.saved.steps()
    if not steps:
      return "there is no checkpoint yet"
    return f"the newest checkpoint is that of step {steps[-1]}"

  def _check(self, step, values, limit=None):
    """Raises Diverged if `limit` steps in a row were not finite.

    Args:
      step: number of the last of them.
      values: what `step_fn` returned for it; None before the first step.
      limit: default `train.max_bad_steps`.
    """
    bad = int(values["bad"]) if values else 0
    if bad < (limit or self.cfg.train.max_bad_steps):
      return
    steps, again = self.saved.steps(), ""
    if steps:
      older = "resumes from the one before" if steps[1:] else "begins anew"
      again = ". If the next steps are not finite either, remove that "
      again += f"checkpoint: the run then {older}"
    raise Diverged(
      f"step {step}: loss {float(values['loss'])} or gradient norm "
      f"{float(values['grad_norm'])} was not finite {bad} steps in a row. They "
      f"changed no parameter and were not saved; {self._newest()}. Start again "
      "on this workdir with a lower optim.peak, a longer optim.warmup or, to "
      "skip more such steps, a higher train.max_bad_steps; or inspect the data "
      f"of these steps{again}"
    )


class _Start(NamedTuple):
  """What a run goes on from."""

  state: step_lib.State
  step: int
  origin: dict | None  # where the first model came from; empty: it was random
  changes: list[str]  # of a run that resumes, from `resume.changes`


def _prepare(cfg, workdir, profile, init):
  """The run's tokenizer and mesh; its folder exists afterwards.

  Raises ValueError, before any work is done, for what cannot be run.
  """
  if profile and profile.start > cfg.train.steps:
    raise ValueError(
      f"profile starts with step {profile.start}, but the run ends with step "
      f"{cfg.train.steps}"
    )
  if profile:
    metrics.check_tracing()
  storage.folder(workdir)
  workdir_lib.check_format(workdir)
  if init is None and not workdir_lib.has_checkpoints(workdir):
    _check_random(cfg.train)
  codec = workdir_lib.tokenizer(cfg, workdir)
  mesh = sharding.make_mesh(cfg.mesh)
  batches.check(cfg, mesh)
  evaluations.check(cfg, mesh, step_lib.abstract_state(cfg, mesh).model)
  if isinstance(init, model.Model):  # once the config itself is not refused
    surgery.reconfigure(init, cfg.model)
  return codec, mesh


def _check_random(train):
  """Raises ValueError if a run with this section may not begin at random."""
  why = ""
  if train.freeze == "trunk":
    why = (
      "train.freeze='trunk' keeps the trunk as it is, and this one is random"
    )
  elif train.finetune:
    why = "train.finetune is on, and this run would begin at random"
  if why:
    raise ValueError(f"{why}: give --init=PATH, or a model as `init`")


def _check_resume(cfg, codec, workdir):
  """Raises if processes' settings differ, or do not fit the checkpoint.

  The corpus is not compared: it is not packed yet. Neither is the step: damaged
  arrays may make the run go on from an older one.
  """
  metadata = workdir_lib.metadata(cfg, codec, ())
  resume.check_agreement(metadata)
  with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
    saved.check(lambda stored: resume.refusals(stored, metadata))


def _resume(cfg, mesh, saved, metadata, workdir):
  """The newest whole checkpoint's _Start; None if there is no checkpoint."""
  restored = saved.restore(
    step_lib.abstract_state(cfg, mesh),
    refusals=lambda stored: resume.refusals(stored, metadata),
  )
  if restored is None:
    return None
  state, stored, step = restored
  resume.check_step(step, cfg.train.steps, workdir)
  changes = resume.changes(stored, metadata)
  return _Start(state, step, stored.get("init"), changes)


def _begin(cfg, mesh, init, metadata, progress):
  """The _Start of a new run, at step 0.

  When it returns, no reference to a model that `init` read is left.
  """
  origin = {}
  if isinstance(init, model.Model):
    origin = {"fingerprint": provenance.fingerprint(init)}
  elif init is not None:
    with progress.doing("reading the model to start from"):
      init, origin = init()
  resume.check_agreement(metadata | {"init": origin})
  return _Start(step_lib.init_state(cfg, mesh, init), 0, origin, [])
