"""Evaluations during a run: held-out measures and a sample of text."""

from collections.abc import Callable

import jax
from absl import logging

from mtp_jax import config, sharding, tokenizer
from mtp_jax.data import batch as batch_lib
from mtp_jax.data import pipeline
from mtp_jax.decode import generate, layout
from mtp_jax.evaluate import heads as head_measures
from mtp_jax.model import heads, model
from mtp_jax.train import processes, report
from mtp_jax.train import step as step_lib


def check(
  cfg: config.Config, mesh: jax.sharding.Mesh, net: model.Model
) -> None:
  """Raises now, before training, what the first evaluation would raise.

  Args:
    cfg: the run's settings.
    mesh: the model's devices.
    net: the model, abstract.
  """
  rows = cfg.data.batch // cfg.train.accumulate
  length = cfg.data.seq_len + cfg.model.reach
  batch = batch_lib.abstract(rows, length, sharding.batch_sharding(mesh))
  # With what `measure` passes: the first evaluation need not trace it again.
  head_measures.score.eval_shape(
    net,
    batch,
    block=head_measures.BLOCK,
    kernel=step_lib.attention_kernel(cfg.model, mesh),
  )


class Evaluations:
  """Measures a model on held-out text, and has it continue a prompt.

  Args:
    cfg: the run's settings.
    mesh: the model's devices.
    codec: the run's tokenizer.
    held_out: the held-out split.
    batch: index -> a batch of it on `mesh` (`Batches.held_out`).
    reporter: logs the measures and samples, and prints the main measures.
  """

  def __init__(
    self,
    cfg: config.Config,
    mesh: jax.sharding.Mesh,
    codec: tokenizer.Tokenizer,
    held_out: pipeline.Packed,
    batch: Callable[[int], batch_lib.Batch],
    reporter: report.Reporter,
  ):
    self._cfg, self._codec, self._held_out = cfg, codec, held_out
    self._batch, self._reporter = batch, reporter
    self._kernel = step_lib.attention_kernel(cfg.model, mesh)
    self._failed = set()  # activities whose failure was reported
    self._samples = cfg.train.sample_tokens > 0
    if self._samples and heads.KINDS[cfg.model.head].reads_tokens:
      self._samples = False
      logging.warning(
        "this run writes no samples: the heads of model.head=%r read tokens, "
        "and no decoder drafts with them yet",
        cfg.model.head,
      )

  def lacks(self, step: int) -> bool:
    """Whether the logs lack an evaluation of `step`; process 0 decides."""
    has = self._reporter.logs.has("held_out", step)
    return processes.gather("" if has else "lacks")[0] == "lacks"

  def run(self, step: int, net: model.Model) -> None:
    """Evaluates and samples. A failure is logged once and raises nothing.

    With several processes this holds if all fail, or if reading or writing
    fails on any. If a computation fails on some of them, the others wait until
    JAX's timeout.
    """
    self._attempt("evaluation", step, self._read_batches, self._measure, net)
    if self._samples:
      self._attempt("sample", step, self._read_prompt, self._sample, net)

  def _attempt(self, what, step, read, use, net):
    """`use(step, net, read())`, unless the read failed on a process."""
    inputs = self._together(what, step, read)
    if inputs is not None:
      self._together(what, step, lambda: use(step, net, inputs))

  def _together(self, what, step, fun):
    """`fun()`, or None if it failed on any process."""
    result, fault = None, ""
    try:
      result = fun()
    except Exception as error:
      if processes.is_loss(error):
        raise
      fault = f"{type(error).__name__}: {error}"
    # Wait for all: a process that has failed must not begin what follows
    # while others still exchange arrays for this.
    faults = [text for text in processes.gather(fault) if text]
    if faults and what not in self._failed:
      self._failed.add(what)
      logging.warning(
        "the %s at step %d failed: %s. The run goes on; this is not said again",
        what,
        step,
        faults[0],
      )
    return None if faults else result

  def _read_batches(self):
    # One batch is read as several of a microbatch's rows (`Batches.held_out`).
    parts = self._cfg.train.accumulate
    return [self._batch(i) for i in range(self._cfg.train.eval_batches * parts)]

  def _measure(self, step, net, batches):
    measured = head_measures.measure(net, batches, kernel=self._kernel)
    values = report.per_head(measured["nats"], self._held_out)
    accuracy = measured["accuracy"]
    values |= {f"accuracy_{i}": x for i, x in enumerate(accuracy, 1)}
    values["tokens_per_forward_greedy"] = measured["greedy"]
    values["tokens_per_forward_sampled"] = measured["sampled"]
    self._reporter.logs.write("held_out", step, values)
    bits = [values[f"bits_per_byte_{i}"] for i in (1, len(accuracy))]
    self._reporter.progress.say(
      f"held out at step {step}: {bits[0]:.3f} bits per byte (head 1), "
      f"{bits[1]:.3f} (head {len(accuracy)}); "
      f"{measured['greedy']:.2f} tokens per forward predicted"
    )

  def _read_prompt(self):
    """The first tokens of the held-out split, half a window at most."""
    length = max(1, self._cfg.data.seq_len // 2)
    row = self._held_out.window(0, length, 0)
    return row.tokens[row.segments > 0]  # a small split is padded to the window

  def _sample(self, step, net, prompt):
    """Writes a sample: the prompt and its continuation."""
    written = generate.generate(
      layout.lay_out(net, self._codec.vocab),
      [prompt],
      heads=self._cfg.decode.heads or self._cfg.model.drafting,
      max_new=self._cfg.train.sample_tokens,
      stop=self._codec.ends,
    )
    given, *new = tokenizer.decode_parts(
      self._codec, [prompt, written.tokens[0]]
    )
    self._reporter.logs.write_sample(step, f"{given}[...]{''.join(new)}")
