"""Measures the speed of a run: time per step, FLOP/s, a profile."""

import contextlib
import pathlib
import time
from collections.abc import Iterator

import jax
from absl import logging
from jax._src.lib import xla_client  # for the list of loaded plugins

from mtp_jax import config
from mtp_jax.model import cost


class Clock:
  """Measures time per step, excluding compilation, evaluation and saving.

  Args:
    cfg: for the FLOPs per token.
    data: for the tokens per step.
    freeze: what is not trained, see `config.Train`.
  """

  def __init__(
    self, cfg: config.Model, data: config.Data, freeze: str = "none"
  ):
    self._tokens = data.batch * data.seq_len
    self._flops = cost.flops_per_token(cfg, data.seq_len, freeze)
    self._peak = cost.peak_flops()
    self._begin = None
    self._steps, self._wait, self._pause = 0, 0.0, 0.0

  def step(self) -> None:
    """Ends a step. The first one is not counted, because it compiles."""
    if self._begin is None:
      self._begin = time.perf_counter()
      self._wait = self._pause = 0.0
    else:
      self._steps += 1

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time inside as waiting for data."""
    begin = time.perf_counter()
    yield
    self._wait += time.perf_counter() - begin

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes the time inside from the steps."""
    begin = time.perf_counter()
    yield
    self._pause += time.perf_counter() - begin

  def lap(self) -> dict[str, float]:
    """Rates since the previous lap, and the seconds paused.

    'flop_utilisation' is there only if the devices' peak is known.
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


def check_tracing() -> None:
  """Raises ValueError if starting a trace would crash the process.

  JAX loads libtpu, if it is installed, to look for a TPU. If there is none, the
  profiler of libtpu causes a segmentation fault (jax 0.10.2, libtpu 0.0.52).
  """
  backend = jax.default_backend()
  if backend != "tpu" and xla_client.pjrt_plugin_loaded("tpu"):
    raise ValueError(
      "a profile would crash here: libtpu is loaded, but there is no TPU. Set "
      f"the environment variable JAX_PLATFORMS={backend}, or run without a "
      "profile"
    )


class Trace:
  """Writes a `jax.profiler` trace of some steps.

  Args:
    folder: takes plugins/profile/<date>/<host>.xplane.pb and .trace.json.gz.
    steps: the steps to trace, which may go beyond the last; empty: none.
    active: False traces nothing, for all processes but the first.
  """

  def __init__(self, folder: pathlib.Path, steps: range, active: bool = True):
    self._folder, self._steps = folder, steps if active else range(0)
    self._running = False

  @contextlib.contextmanager
  def step(self, number: int) -> Iterator[None]:
    """Traces the code inside as step `number`, if it is one of `steps`."""
    if number not in self._steps:
      yield
      return
    if not self._running:
      with self._surviving():
        jax.profiler.start_trace(self._folder)
        self._running = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def end(self, number: int, result) -> None:
    """Ends the trace after its last step, when `result` is computed."""
    if self._running and number + 1 not in self._steps:
      jax.block_until_ready(result)
      self.close()

  def close(self) -> None:
    """Writes the trace, if one is running."""
    if self._running:
      self._running = False
      with self._surviving():
        jax.profiler.stop_trace()

  @contextlib.contextmanager
  def _surviving(self) -> Iterator[None]:
    try:
      yield
    except (OSError, RuntimeError) as error:
      self._steps = range(0)
      logging.warning("no profile: %s. The run goes on", error)
