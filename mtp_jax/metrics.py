"""What a run writes down: CSV, TensorBoard events, a progress bar."""

import contextlib
import csv
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import jax
import rich.console
import rich.progress
import tensorboardX

from mtp_jax import config
from mtp_jax.model import model

# Dense bfloat16 FLOP/s of a device, from its maker's data sheet.
PEAK_FLOPS = {
  "NVIDIA A100": 312e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
}


_MARK = "--- step "


class Writer:
  """Numbers by step, into one CSV per group and TensorBoard events.

  A resumed run goes on in the same files: rows after the step that it starts
  from are those of a run that was cut off, and are dropped.

  Args:
    folder: made if it is not there.
    start: step that the run starts from.
    active: False writes nothing (processes other than the first).
  """

  def __init__(self, folder: pathlib.Path, start: int, active: bool = True):
    self._folder, self._start, self._active = folder, start, active
    self._files = {}
    if active:
      folder.mkdir(parents=True, exist_ok=True)
      self._events = tensorboardX.SummaryWriter(
        str(folder / "tensorboard"), purge_step=start + 1
      )

  def write(self, group: str, step: int, values: dict[str, float]) -> None:
    """Appends a row to `group`.csv and to the events, and flushes both."""
    if not self._active:
      return
    if group not in self._files:
      self._files[group] = self._open(group, ["step", *values])
    file, rows = self._files[group]
    rows.writerow({"step": step} | {k: f"{v:.9g}" for k, v in values.items()})
    file.flush()
    for name, value in values.items():
      self._events.add_scalar(f"{group}/{name}", value, step)
    self._events.flush()

  def write_text(self, group: str, step: int, text: str) -> None:
    """Adds a text to the events, and to the file `group`.txt."""
    if self._active:
      self._events.add_text(group, f"```\n{text}\n```", step)
      path = self._folder / f"{group}.txt"
      old = path.read_text().split(_MARK)[1:] if path.exists() else []
      kept = [part for part in old if int(part.split("\n")[0]) < step]
      parts = [*kept, f"{step}\n{text}\n"]
      path.write_text("".join(_MARK + part for part in parts))

  def close(self) -> None:
    """Closes all files."""
    for file, _ in self._files.values():
      file.close()
    if self._active:
      self._events.close()

  def _open(self, group, names):
    path = self._folder / f"{group}.csv"
    kept = []
    if path.exists():
      rows = csv.DictReader(path.read_text().splitlines())
      whole = [r for r in rows if None not in r.values() and r["step"]]
      kept = [r for r in whole if int(r["step"]) <= self._start]
      names += [n for n in rows.fieldnames or () if n not in names]
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
      rows = csv.DictWriter(file, names)
      rows.writeheader()
      rows.writerows(kept)
    os.replace(partial, path)
    file = path.open("a", newline="")
    return file, csv.DictWriter(file, names)


class Progress:
  """A bar on a terminal; elsewhere a line per report."""

  def __init__(self, total: int, start: int, active: bool = True):
    self._console = rich.console.Console(
      file=sys.stdout, soft_wrap=True, quiet=not active
    )
    self._total, self._bar = total, None
    if self._console.is_terminal:
      self._bar = rich.progress.Progress(
        rich.progress.MofNCompleteColumn(),
        rich.progress.BarColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("left"),
        rich.progress.TimeRemainingColumn(),
        console=self._console,
      )
      self._task = self._bar.add_task("", total=total, completed=start, note="")
      self._bar.start()

  def advance(self, step: int) -> None:
    """Moves the bar to `step`."""
    if self._bar:
      self._bar.update(self._task, completed=step)

  def report(self, step: int, note: str) -> None:
    """Shows `note` beside the bar, or as a line."""
    if self._bar:
      self._bar.update(self._task, completed=step, note=note)
    else:
      self.say(f"step {step}/{self._total}  {note}")

  def say(self, text: str) -> None:
    """Prints a line that stays."""
    self._console.print(text, markup=False, highlight=False)

  def close(self) -> None:
    """Leaves the terminal as it was."""
    if self._bar:
      self._bar.stop()


class Clock:
  """Time per step, without compiling, measuring and saving."""

  def __init__(self, cfg: config.Model, data: config.Data):
    self._tokens = data.batch * data.seq_len
    self._flops = flops_per_token(cfg, data.seq_len)
    self._peak = peak_flops()
    self._begin = None
    self._steps, self._wait, self._pause = 0, 0.0, 0.0

  def step(self) -> None:
    """Counts a step; the first one compiles and is not counted."""
    if self._begin is None:  # the first step compiled
      self._begin = time.perf_counter()
      self._wait = self._pause = 0.0
    else:
      self._steps += 1

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Inside: time spent on data."""
    begin = time.perf_counter()
    yield
    self._wait += time.perf_counter() - begin

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Inside: time that is no step's."""
    begin = time.perf_counter()
    yield
    self._pause += time.perf_counter() - begin

  def lap(self) -> dict[str, float]:
    """Rates since the last lap, and the time of its pauses.

    A utilisation of the devices' FLOP/s only where their peak is known.
    """
    now = time.perf_counter()
    seconds = max(now - self._begin - self._pause, 1e-9)
    rate = self._steps * self._tokens / seconds
    values = {
      "tokens_per_second": rate,
      "step_seconds": seconds / max(self._steps, 1),
      "data_wait_share": self._wait / seconds,
      "paused_seconds": self._pause,
      "model_flops_per_second": rate * self._flops,
    }
    if self._peak:
      values["flop_utilisation"] = rate * self._flops / self._peak
    self._begin = now
    self._steps, self._wait, self._pause = 0, 0.0, 0.0
    return values


class Trace:
  """A `jax.profiler` trace of some steps, with a name for each.

  Args:
    folder: takes plugins/profile/<date>/<host>.xplane.pb and .trace.json.gz.
    steps: to trace, as many of them as the run comes to; empty: none.
    active: False traces nothing (processes other than the first, which do
      the same).
  """

  def __init__(self, folder: pathlib.Path, steps: range, active: bool = True):
    self._folder, self._steps = folder, steps if active else range(0)
    self._running = False

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Inside: the host's part of a step."""
    if number not in self._steps:
      yield
      return
    if not self._running:
      jax.profiler.start_trace(self._folder)
      self._running = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def end(self, number: int, result) -> None:
    """After a step; the last one's `result` is waited for and belongs to it."""
    if self._running and number + 1 not in self._steps:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Writes what was traced, if anything was."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


def flops_per_token(cfg: config.Model, seq_len: int) -> float:
  """Model FLOPs of one training token: no recomputation, causal attention.

  Six per matrix parameter, forward and backward, the shared unembedding
  counted once per head that uses it, and 6 T D per attention layer: half of
  the scores and of the sums over values are masked away.
  """
  count = model.count_parameters(cfg)
  attention = 6 * seq_len * cfg.width * (cfg.trunk_layers + cfg.head_layers)
  unembeddings = cfg.n_future * cfg.vocab * cfg.width
  return 6.0 * (count["layers"] + unembeddings) + attention


def peak_flops(devices: list[jax.Device] | None = None) -> float | None:
  """bfloat16 FLOP/s of all devices together, None where it is not known."""
  devices = jax.devices() if devices is None else devices
  for name in sorted(PEAK_FLOPS, key=len, reverse=True):
    if devices[0].device_kind.startswith(name):
      return PEAK_FLOPS[name] * len(devices)
  return None
