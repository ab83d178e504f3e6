"""How much is trained and decoded at each scale."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Scale:
  """Sizes of one run of the experiment; the shape of the model is its own."""

  corpora: tuple[str, ...]  # of `corpora.NAMES`: what heads are trained on
  train_tokens: int  # of each corpus, read once by the trunk
  epochs: int  # over them, by the heads
  held_tokens: int  # of files, to measure the heads' losses on
  draft_vocab: int  # ids that the heads are trained to predict
  batch: int  # B
  seq_len: int  # T
  peak: float  # learning rate
  written_prompt: int  # tokens of a file that the model continues
  written_new: int  # tokens that it writes then
  written_rows: int  # texts at once
  prompts: int  # held-out files, and HumanEval's prompts, to continue
  prompt_len: int  # tokens of a file's prompt
  new: int  # tokens to write after each
  # Rows at once, of a comparison in alternating turns with trees and with
  # transformers; more than one: of files only; none: no comparison.
  batches: tuple[int, ...]
  repeats: int  # timed turns

  def training(self) -> dict[str, float]:
    """The fields that the heads depend on."""
    others = {"corpora", "prompts", "prompt_len", "new", "batches", "repeats"}
    fields = dataclasses.asdict(self)
    return {name: fields[name] for name in fields if name not in others}


SCALES = {
  "test": Scale(
    corpora=("files", "written"),
    train_tokens=256,
    epochs=2,
    held_tokens=128,
    draft_vocab=20,
    batch=2,
    seq_len=16,
    peak=1e-3,
    written_prompt=8,
    written_new=32,
    written_rows=4,
    prompts=2,
    prompt_len=8,
    new=8,
    batches=(1,),
    repeats=1,
  ),
  "demo": Scale(
    corpora=("files",),
    train_tokens=40_000,
    epochs=4,
    held_tokens=8_000,
    draft_vocab=4096,
    batch=4,
    seq_len=128,
    peak=1e-3,
    written_prompt=32,
    written_new=96,
    written_rows=16,
    prompts=4,
    prompt_len=64,
    new=64,
    batches=(),
    repeats=1,
  ),
  "cpu": Scale(
    corpora=("files", "written"),
    train_tokens=100_000,
    epochs=4,
    held_tokens=16_000,
    draft_vocab=8192,
    batch=4,
    seq_len=128,
    peak=1e-3,
    written_prompt=32,
    written_new=96,
    written_rows=32,
    prompts=8,
    prompt_len=64,
    new=64,
    batches=(1, 8, 32),
    repeats=2,
  ),
  "gpu": Scale(
    corpora=("files", "written"),
    train_tokens=4_000_000,
    epochs=3,
    held_tokens=64_000,
    draft_vocab=16_384,
    batch=16,
    seq_len=512,
    peak=1e-3,
    written_prompt=64,
    written_new=448,
    written_rows=512,
    prompts=8,
    prompt_len=64,
    new=64,
    batches=(1, 8, 32),
    repeats=2,
  ),
}
