"""What a run reports: its settings, its steps and how it ends."""

import pathlib

import jax
import numpy as np

from mtp_jax import config
from mtp_jax.data import pipeline
from mtp_jax.model import model
from mtp_jax.train import logs, metrics, provenance, terminal


class Reporter:
  """Prints lines on the terminal and writes the same figures to the logs.

  Args:
    cfg: the run's settings.
    workdir: takes the logs.
    train: the training split, for bits per byte.
    start: step from which the run starts or resumes.
    progress: prints.

  Attributes:
    logs: the CSV files, events and samples.
    clock: measures speed; the caller marks waiting and pauses.
    progress: as given.
  """

  def __init__(
    self,
    cfg: config.Config,
    workdir: pathlib.Path,
    train: pipeline.Packed,
    start: int,
    progress: terminal.Progress,
  ):
    self._workdir, self._train, self._start = workdir, train, start
    self.logs = logs.Writer(workdir, start, jax.process_index() == 0)
    self.clock = metrics.Clock(cfg.model, cfg.data, cfg.train.freeze)
    self.progress = progress

  def begins(self, changes: list[str], origin: dict, is_ignored: bool) -> None:
    """Reports whether the run is new, and where its weights come from.

    Args:
      changes: of a run that resumes, from `resume.changes`.
      origin: see `provenance.sentence`; empty if the weights were random.
      is_ignored: whether a model was given to start from, but the run resumes.
    """
    line = f"a new run in {self._workdir}"
    if self._start:
      line = f"resuming from step {self._start}"
    lines = [line, *changes]
    if origin:
      lines.append(provenance.sentence(origin))
    if is_ignored:
      lines.append("the model that was given to start from is not used")
    for line in lines:
      self.progress.say(line)

  def step(self, step: int, values: dict) -> None:
    """Reports a training step.

    Args:
      step: its number.
      values: the second result of `step.train_step`.
    """
    values = jax.device_get(values)
    speed = self.clock.lap()
    row = {name: values[name] for name in ("loss", "grad_norm")}
    row["learning_rate"] = values["learning_rate"]
    row["skipped_steps"] = values["skipped"]
    self.logs.write(
      "train", step, row | per_head(values["nats"], self._train) | speed
    )
    line = f"loss {values['loss']:.3f}  head 1 {values['nats'][0]:.3f} nats"
    if speed["tokens_per_second"]:
      line += (
        f"  {speed['tokens_per_second']:,.0f} tokens/s, "
        f"{speed['data_wait_share']:.0%} of it waiting for data"
      )
    if "flop_utilisation" in speed:
      line += f"  {speed['flop_utilisation']:.1%} of peak"
    self.progress.report(step, line)

  def stopped(self, step: int, newest: str = "") -> None:
    """Reports that a signal ended the run.

    Args:
      step: the last step.
      newest: if `step` could not be saved, what the newest checkpoint is.
    """
    line = f"told to stop: step {step} is saved"
    if newest:
      line = (
        f"told to stop: step {step} is not saved, since its loss or gradient "
        f"was not finite; {newest}"
      )
    self.progress.say(line)

  def finished(self, step: int) -> None:
    """Reports that the run has made its last step, and where its files are."""
    samples = ", samples/" * (self._workdir / "samples").is_dir()
    self.progress.say(
      f"finished at step {step}; {self._workdir}/ has checkpoints/{step}"
      f"{samples}, and the logs train.csv, held_out.csv and tensorboard/"
    )

  def finished_before(self, steps: int) -> None:
    """Reports that the run had finished, and how to extend it."""
    self.progress.say(
      f"finished already, with train.steps {steps}. To go on, set "
      f"--config.train.steps={2 * steps}, for example: the learning rate then "
      "follows the longer schedule from here on"
    )


def per_head(nats: np.ndarray, split: pipeline.Packed) -> dict[str, float]:
  """Nats per token and bits per byte of each head, by name.

  Args:
    nats: [N] per token.
    split: the split whose bytes per token count.
  """
  bits = nats / np.log(2) / split.bytes_per_token
  values = {f"nats_{i}": x for i, x in enumerate(nats, 1)}
  return values | {f"bits_per_byte_{i}": x for i, x in enumerate(bits, 1)}


def settings(
  cfg: config.Config,
  splits: tuple[pipeline.Packed, pipeline.Packed],
  mesh: jax.sharding.Mesh,
) -> list[str]:
  """Lines on the devices, the model, the corpus and the steps of a run.

  Args:
    cfg: the run's settings.
    splits: the training split and the held-out split.
    mesh: the run's devices.
  """
  device, shape = mesh.devices.flat[0], mesh.shape
  processes = jax.process_count()
  counts = model.count_parameters(cfg.model)
  cut = f" ({splits[1].cut})" if splits[1].cut else ""
  source = f"{cfg.data.source} {cfg.data.path}".rstrip()
  files = f"{splits[0].files:,} file{'' if splits[0].files == 1 else 's'}"
  skipped = ", ".join(f"{n:,} {why}" for why, n in splits[0].skipped.items())
  tokens = cfg.data.batch * cfg.data.seq_len
  windows = splits[0].windows(cfg.data.seq_len)
  epochs = cfg.train.steps * cfg.data.batch / windows
  trained = ""
  if cfg.train.freeze == "trunk":
    whole, first = (
      model.count_parameters(shape)["total"]
      for shape in (cfg.model, cfg.model.with_heads(1))
    )
    n = cfg.model.n_future
    which = "head 2 is" if n == 2 else f"heads 2 to {n} are"
    trained = (
      f"; {which} trained, "
      f"{short(whole - first)}parameters, and all else is frozen"
    )
  return [
    f"devices: {mesh.size} x {device.device_kind} (data {shape['data']} x "
    f"model {shape['model']}) in {processes} process"
    f"{'es' if processes > 1 else ''}, jax {jax.__version__}",
    f"model: {short(counts['total'])}parameters, {short(counts['layers'])}"
    f"of them not embeddings; {cfg.model.n_future} {cfg.model.head} heads"
    + trained,
    f"corpus: {source}, {files}; left out: {skipped or 'nothing'}",
    f"  to train on: {_size(splits[0])}",
    f"  held out: {_size(splits[1])}{cut}",
    f"steps: {cfg.train.steps:,} of {tokens:,} tokens, {epochs:.3g} epochs",
  ]


def _size(split: pipeline.Packed) -> str:
  predicted, of_what = len(split.tokens) - split.documents, ""
  if split.weight is not None:
    predicted, of_what = int(np.sum(split.weight)), " of answers"
  size = round(split.bytes_per_token * predicted)
  return (
    f"{split.documents:,} documents, {short(size)}bytes{of_what}, "
    f"{short(len(split.tokens))}tokens"
  )


def short(number: float) -> str:
  """A count and a space: '1.23 million ', '12,345 '."""
  for size, name in ((1e9, "billion"), (1e6, "million")):
    if number >= size:
      return f"{number / size:.2f} {name} "
  return f"{number:,} "
