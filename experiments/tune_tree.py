"""Finds the best draft tree of each size for a trained model.

  python -m experiments.tune_tree --workdir=runs/bytes

Decodes held-out prompts of the run's corpus (for Hugging Face and Meta: this
machine's Python files) and counts how often the candidate of each head and rank
was right. Writes tree.json into the folder: that acceptance, and the best trees
as lists of ranks (for `decode.tree.from_paths`). Seconds to minutes.
"""

from absl import flags

from experiments.measure import study
from experiments.startup import continuation, options, program, terminal
from mtp_jax.data import blocks, pipeline
from mtp_jax.decode import autotune, layout, tree_file
from mtp_jax.decode import window as window_lib
from mtp_jax.interchange import folders

_WORKDIR = options.define_model()
_DTYPE = options.define_dtype()
_PROMPTS = flags.DEFINE_integer("prompts", 32, "Held-out texts to continue.", 1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Tokens of each.", 1)
_SIZES = flags.DEFINE_list("sizes", ["4", "8", "16", "32", "64"], "Nodes.")


def main(_: list[str]) -> None:
  """Checks the flags, then measures acceptance and writes the best trees."""
  sizes = _sizes(_SIZES.value)
  cfg, codec = folders.settings(_WORKDIR.value)
  if cfg.model.drafting < 2:
    raise ValueError(f"{_WORKDIR.value} has one head: nothing drafts")
  new = cfg.data.seq_len - _PROMPT_LEN.value
  if new < 1:
    raise ValueError(
      f"--prompt_len={_PROMPT_LEN.value} leaves nothing to write of the run's "
      f"data.seq_len={cfg.data.seq_len}: give at most {cfg.data.seq_len - 1}"
    )
  path = _WORKDIR.value / "tree.json"
  options.make_room(path)
  _, held = pipeline.pack(cfg.data, codec)
  try:
    prompts = held.excerpts(
      _PROMPTS.value, _PROMPT_LEN.value, cfg.data.seq_len, per_document=8
    )
  except blocks.CacheDamaged:
    raise
  except ValueError as error:
    raise ValueError(f"--prompts={_PROMPTS.value}: {error}") from error
  net = folders.load(_WORKDIR.value, dtype=_DTYPE.value or cfg.model.dtype)[0]
  decoder = layout.lay_out(net, codec.vocab)
  del net  # the decoder holds copies of its layers
  found = tree_file.build(
    autotune.measure_acceptance(decoder, prompts, max_new=new), sizes
  )
  study.write_json(path, found)
  show(found)
  print(path)


def _sizes(texts: list[str]) -> list[int]:
  """The numbers of nodes that --sizes names."""
  try:
    sizes = [int(text) for text in texts]
  except ValueError:
    sizes = []
  most = window_lib.CHUNK
  sound = sizes and all(2 <= size <= most for size in sizes)
  if not sound or len(set(sizes)) < len(sizes):
    raise ValueError(
      f"--sizes={','.join(texts)} has to be different integers from 2 to "
      f"{most}, the most tokens that a pass reads, such as 4,16"
    )
  return sizes


def show(found: dict) -> None:
  """Two tables: acceptance by head and rank, expected tokens by size."""
  acceptance = found["acceptance"]
  ranks = [f"{rank}" for rank in range(1, 1 + len(acceptance[0]))]
  rows = [
    [f"{head}", *(f"{chance:.0%}" for chance in row)]
    for head, row in enumerate(acceptance, 2)
  ]
  title = "How often a head's 1st, 2nd, ... candidate is right"
  terminal.show_table(title, ["head", *ranks], rows)
  expected = {"chain of all heads": found["chain"]}
  for size, tree in found["trees"].items():
    expected[f"tree of up to {size} nodes"] = tree["tokens_per_forward"]
  terminal.show_table(
    "Expected tokens per forward",
    ["drafts", "tokens per forward"],
    ([drafts, f"{tokens:.2f}"] for drafts, tokens in expected.items()),
  )


if __name__ == "__main__":
  continuation.keep_compiled_programs()
  program.start(main)
