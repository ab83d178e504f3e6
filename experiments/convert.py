"""Writes a model in another format, from any folder that holds one.

  python -m experiments.convert --model=runs/mine --output=mine
  python -m experiments.convert --model=mine --output=plain --heads=1

--model is a training run, a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3)
or a folder of Meta's release (params.json, consolidated.pth). --output becomes
a Hugging Face folder that transformers loads, with heads 2..N in a file of
their own beside it; or, with --format=meta, one like Meta's. --notes is text
for the model card, such as what the model was trained on.
"""

import pathlib

from absl import flags

from experiments.startup import interrupts, options, program
from mtp_jax.interchange import export, folders, model_card, names
from mtp_jax.model import surgery

_FORMATS = {"hugging_face": "Hugging Face", "meta": "Meta"}

_MODEL = options.define_path("model", None, "Folder that holds a model.")
_STEP = flags.DEFINE_integer("step", None, "Of a run's checkpoint; else last.")
_OUTPUT = options.define_output("Folder to write; it must not exist.")
_FORMAT = flags.DEFINE_enum(
  "format", "hugging_face", _FORMATS, "What to write."
)
_DTYPE = flags.DEFINE_enum(
  "dtype", None, export.DTYPES, "Of all tensors; else as the folder has them."
)
_HEADS = flags.DEFINE_integer("heads", None, "Write heads 1..k; else all.", 1)
_NOTES = flags.DEFINE_string("notes", None, "Text for the model card.")
flags.mark_flag_as_required("model")


def main(_: list[str]) -> None:
  """Writes the folder, and one line on what it holds."""
  source, output = _MODEL.value, _OUTPUT.value
  if _NOTES.value and _FORMAT.value == "meta":
    raise ValueError(
      "--notes goes into a model card, which Meta's format lacks"
    )
  cfg, _ = folders.settings(source, _STEP.value)
  heads = cfg.model.n_future if _HEADS.value is None else _HEADS.value
  if heads > cfg.model.n_future:
    raise ValueError(f"--heads={heads}: {source} has {cfg.model.n_future}")
  # Before the model is read, which takes long. A kind of heads that cannot be
  # written stays one, however many heads are dropped.
  names.check_kind(cfg.model)
  to_meta, shape = _FORMAT.value == "meta", cfg.model.with_heads(heads)
  export.check(shape, output, to_meta=to_meta)
  stored = folders.dtype(source)
  # Held in 16 bits, norms and biases are written as the folder has them.
  held = "bfloat16" if stored == "bfloat16" and not _DTYPE.value else None
  dtype = _DTYPE.value or (None if held else stored)
  interrupts.unwind_at_sigterm()  # what is half written is removed
  net, *_, step = folders.load_step(source, _STEP.value, dtype=held)
  net = surgery.drop_heads(net, heads)
  given = {"like": model_card.Source.of(source, step), "dtype": dtype}
  if to_meta:
    export.save_meta(net, output, **given)
  else:
    export.save(net, output, notes=_NOTES.value, **given)
  print(
    f"{output}: {heads} {'head' if heads == 1 else 'heads'} over "
    f"{net.cfg.trunk_layers} layers, {_FORMATS[_FORMAT.value]}'s format, "
    f"{_size(output) / 1e6:.1f} MB in {dtype or held}"
  )


def _size(folder: pathlib.Path) -> int:
  return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
  program.start(main)
