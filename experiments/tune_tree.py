"""Finds the best draft tree of each size for a trained model.

  python -m experiments.tune_tree --workdir=runs/bytes

Decodes held-out prompts and counts how often the candidate of each head and
rank was right, given that the drafts before it were. Builds for every size the
tree with the highest expected acceptance. Writes tree.json into the workdir:
the chances, and each tree as lists of ranks (for `decode.tree.from_paths`) with
its expected tokens per forward. Seconds to minutes.
"""

import json

import rich.console
import rich.table
from absl import flags

from experiments.startup import program
from mtp_jax.data import blocks, pipeline
from mtp_jax.decode import choose, network, prepare
from mtp_jax.decode import tree as tree_lib
from mtp_jax.train import logs, workdir

_WORKDIR = program.define_path("workdir", None, "Folder of a training run.")
_PROMPTS = flags.DEFINE_integer(
  "prompts", 32, "Held-out pieces of text to continue.", lower_bound=1
)
_PROMPT_LEN = flags.DEFINE_integer(
  "prompt_len", 64, "Tokens of a prompt.", lower_bound=1
)
_SIZES = flags.DEFINE_list("sizes", ["4", "8", "16", "32", "64"], "Nodes.")
flags.mark_flag_as_required("workdir")


def main(_: list[str]) -> None:
  """Measures acceptance on held-out text and writes the best tree per size."""
  # What may be wrong is found before the model is read.
  sizes = _sizes(_SIZES.value)
  cfg, codec = workdir.settings(_WORKDIR.value)
  if cfg.model.n_future < 2:
    raise ValueError(f"{_WORKDIR.value} has one head: nothing drafts")
  new = cfg.data.seq_len - _PROMPT_LEN.value
  if new < 1:
    raise ValueError(
      f"--prompt_len={_PROMPT_LEN.value} leaves nothing to write of the run's "
      f"data.seq_len={cfg.data.seq_len}: give at most {cfg.data.seq_len - 1}"
    )
  _, held = pipeline.pack(cfg.data, codec)
  try:
    prompts = held.excerpts(
      _PROMPTS.value, _PROMPT_LEN.value, cfg.data.seq_len, per_document=8
    )
  except blocks.CacheDamaged:
    raise
  except ValueError as error:
    raise ValueError(f"--prompts={_PROMPTS.value}: {error}") from error
  net, _, _ = workdir.load(_WORKDIR.value)
  decoder = prepare.decoder(net, codec.vocab)
  found = tuned(choose.acceptance(decoder, prompts, max_new=new), sizes)
  path = _WORKDIR.value / "tree.json"
  logs.write_whole(path, json.dumps(found, indent=1) + "\n")
  show(found)
  print(path)


def _sizes(texts: list[str]) -> list[int]:
  """The numbers of nodes that --sizes names."""
  try:
    sizes = [int(text) for text in texts]
  except ValueError:
    sizes = []
  most = network.CHUNK
  sound = sizes and all(2 <= size <= most for size in sizes)
  if not sound or len(set(sizes)) < len(sizes):
    raise ValueError(
      f"--sizes={','.join(texts)} has to be different integers from 2 to "
      f"{most}, the most tokens that a pass reads, such as 4,16"
    )
  return sizes


def tuned(chances, sizes: list[int]) -> dict:
  """The counted chances, and the best tree of each size, as plain lists."""
  trees = [tree_lib.build(chances, size) for size in sizes]
  chain = tree_lib.chain(len(chances) + 1)
  return {
    "acceptance": chances.tolist(),
    "chain": tree_lib.expected(chain, chances),
    "trees": {
      str(size): {
        "paths": [list(path) for path in tree.paths],
        "tokens_per_forward": tree_lib.expected(tree, chances),
      }
      for size, tree in zip(sizes, trees, strict=True)
    },
  }


def show(found: dict) -> None:
  """Two tables: chances by head and rank, expected tokens by size."""
  console = rich.console.Console()
  table = rich.table.Table(
    title="How often a head's 1st, 2nd, ... candidate is right"
  )
  table.add_column("head", justify="right")
  for rank in range(1, 1 + len(found["acceptance"][0])):
    table.add_column(f"{rank}", justify="right")
  for head, row in enumerate(found["acceptance"], 2):
    table.add_row(str(head), *(f"{chance:.0%}" for chance in row))
  console.print(table)
  table = rich.table.Table(title="Expected tokens per forward")
  table.add_column("drafts")
  table.add_column("tokens per forward", justify="right")
  table.add_row("chain of all heads", f"{found['chain']:.2f}")
  for size, tree in found["trees"].items():
    expected = tree["tokens_per_forward"]
    table.add_row(f"tree of up to {size} nodes", f"{expected:.2f}")
  console.print(table)


if __name__ == "__main__":
  program.start(main)
