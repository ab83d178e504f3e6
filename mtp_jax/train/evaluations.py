"""The evaluations of a run: held-out measures and a sample, while it trains."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from absl import logging

from mtp_jax import config, tokenizer
from mtp_jax.data import batch as batch_lib
from mtp_jax.data import pipeline
from mtp_jax.decode import decoder as decoder_lib
from mtp_jax.decode import generate
from mtp_jax.evaluate import heads as head_measures
from mtp_jax.model import model
from mtp_jax.train import logs, processes, report
from mtp_jax.train import step as step_lib


def check(
  cfg: config.Config, mesh: jax.sharding.Mesh, net: model.Model
) -> None:
  """Raises before a run what its first evaluation would raise.

  Args:
    cfg: the run's settings.
    mesh: where the model will lie.
    net: its shapes.
  """
  rows = cfg.data.batch // cfg.train.accumulate
  length = cfg.data.seq_len + cfg.model.n_future
  kernel = step_lib.attention_kernel(cfg.model, mesh)
  score = functools.partial(head_measures.score, kernel=kernel)
  jax.eval_shape(score, net, batch_lib.abstract(rows, length))


class Evaluations:
  """Measures a model during a run, and writes a sample of its text.

  Args:
    cfg: the run's settings.
    mesh: where the model lies.
    codec: the run's tokenizer.
    packed: the held-out split.
    batch: gives its i-th batch, of one microbatch's rows, on `mesh`.
    writer: takes held_out.csv and samples.
    progress: says the main figures.
  """

  def __init__(
    self,
    cfg: config.Config,
    mesh: jax.sharding.Mesh,
    codec: tokenizer.Tokenizer,
    packed: pipeline.Packed,
    batch: Callable[[int], batch_lib.Batch],
    writer: logs.Writer,
    progress: report.Progress,
  ):
    self._cfg, self._codec, self._packed = cfg, codec, packed
    self._batch, self._writer, self._progress = batch, writer, progress
    self._kernel = step_lib.attention_kernel(cfg.model, mesh)
    self._failed = set()  # what was said to fail

  def lacks(self, step: int) -> bool:
    """Whether the logs have no evaluation of `step`; all processes agree."""
    found = self._writer.has("held_out", step)
    return processes.gather("" if found else "lacks")[0] == "lacks"

  def run(self, step: int, net: model.Model) -> None:
    """Measures and samples; a failure is reported once and ends no run.

    Among several processes this holds for failures on all of them, and for
    reading and writing on any. If a computation fails on some alone, the others
    wait for them until JAX gives up.
    """
    self._attempt("evaluation", step, self._read_batches, self._measure, net)
    if self._cfg.train.sample_tokens:
      self._attempt("sample", step, self._read_prompt, self._sample, net)

  def _attempt(self, what, step, read, use, net):
    """`use(step, net, read())`, where all processes could read."""
    found = self._together(what, step, read)
    if found is not None:
      self._together(what, step, lambda: use(step, net, found))

  def _together(self, what, step, fun):
    """`fun()`, or None where it failed on any process."""
    found, fault = None, ""
    try:
      found = fun()
    except Exception as error:
      if processes.is_loss(error):
        raise
      fault = f"{type(error).__name__}: {error}"
    # Wait for all: one that has failed must not begin what follows while
    # others still exchange arrays for this.
    faults = [text for text in processes.gather(fault) if text]
    if faults and what not in self._failed:
      self._failed.add(what)
      logging.warning(
        "the %s at step %d failed: %s. The run goes on; this is not said again",
        what,
        step,
        faults[0],
      )
    return None if faults else found

  def _read_batches(self):
    # As many rows at once as a step holds: the whole batch might not fit.
    parts = self._cfg.train.accumulate
    return [self._batch(i) for i in range(self._cfg.train.eval_batches * parts)]

  def _measure(self, step, net, batches):
    found = head_measures.measure(net, batches, kernel=self._kernel)
    values = per_head(found["nats"], self._packed)
    accuracy = found["accuracy"]
    values |= {f"accuracy_{i}": x for i, x in enumerate(accuracy, 1)}
    values["tokens_per_forward_greedy"] = found["greedy"]
    values["tokens_per_forward_sampled"] = found["sampled"]
    self._writer.write("held_out", step, values)
    bits = [values[f"bits_per_byte_{i}"] for i in (1, len(accuracy))]
    self._progress.say(
      f"held out at step {step}: {bits[0]:.3f} bits per byte (head 1), "
      f"{bits[1]:.3f} (head {len(accuracy)}); "
      f"{found['greedy']:.2f} tokens per forward predicted"
    )

  def _read_prompt(self):
    """The first half window of the held-out text."""
    length = max(1, self._cfg.data.seq_len // 2)
    row = self._packed.window(0, length, 0)
    return row.tokens[row.segments > 0]  # a small split is padded to the window

  def _sample(self, step, net, prompt):
    """Continues the prompt."""
    written = generate.generate(
      decoder_lib.lay_out(net, self._codec.vocab),
      [prompt],
      heads=self._cfg.decode.heads or self._cfg.model.n_future,
      max_new=self._cfg.train.sample_tokens,
      stop=self._codec.eos,
    )
    given, *new = tokenizer.decode_parts(
      self._codec, [prompt, written.tokens[0]]
    )
    self._writer.write_sample(step, f"{given}[...]{''.join(new)}")


def per_head(nats: np.ndarray, packed: pipeline.Packed) -> dict[str, float]:
  """Nats per token and bits per byte of each head, by name.

  Args:
    nats: [N] per token.
    packed: the split whose bytes per token count.
  """
  bits = nats / np.log(2) / packed.bytes_per_token
  values = {f"nats_{i}": x for i, x in enumerate(nats, 1)}
  return values | {f"bits_per_byte_{i}": x for i, x in enumerate(bits, 1)}
