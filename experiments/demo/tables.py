"""What the demo prints: two texts side by side, and the README's tables."""

import rich.console
import rich.table
import rich.text

from experiments.demo import report
from experiments.measure import compare
from experiments.startup import terminal
from mtp_jax import tokenizer


def show(result: dict, codec) -> None:
  """Completions of two files side by side, and the README's two tables."""
  console = rich.console.Console()
  first, last = result["decoding"][0], result["decoding"][-1]
  table = rich.table.Table(title="Held-out files, continued", show_lines=True)
  for name in (
    "ordinary, one head",
    f"self-speculative, {last['heads']} heads",
  ):
    table.add_column(name, ratio=1)
  for i, prompt in enumerate(result["prompts"][:2]):
    cells = []
    for entry in (first, last):
      written = report.passes(entry["tokens"][i], entry["per_pass"][i])
      parts = tokenizer.decode_parts(codec, [prompt, *written])
      given, *new = map(terminal.escaped, parts)
      text = rich.text.Text(given, style="dim")
      for turn, part in enumerate(new):
        text.append(part, style=("green", "yellow")[turn % 2])
      cells.append(text)
    table.add_row(*cells)
  console.print(table)
  if console.is_terminal:
    console.print("A change of colour is a new forward pass.\n")
  scores = result["scores"]
  rows = zip(
    scores["bits_per_byte"], scores["accuracy"], last["accepted"], strict=True
  )
  terminal.show_table(
    "Heads, on held-out files",
    ("head", "bits per byte", "accuracy", "drafts accepted"),
    (
      (f"{i}", f"{bits:.3f}", f"{right:.1%}", f"{used:.1%}" if i > 1 else "-")
      for i, (bits, right, used) in enumerate(rows, 1)
    ),
  )
  terminal.show_table(
    "Decoding held-out files, one at a time",
    (
      "heads used",
      "tokens per forward",
      "tokens per second",
      "speedup",
      "same text",
    ),
    (
      (
        f"{entry['heads']}",
        f"{entry['tokens_per_forward']:.2f}",
        f"{entry['tokens_per_second']:,.0f}",
        f"{entry['speedup']:.2f}",
        agreement(entry),
      )
      for entry in result["decoding"]
    ),
  )
  predicted = scores["predicted_tokens_per_forward"]
  repeats = result["most_repeats"]
  console.print(
    f"predicted on the files themselves: {predicted:.2f} tokens per forward\n"
    f"the texts are {report.kind_of_text(result)}; most often in a row: the "
    f"same word {repeats[1]} times, two words {repeats[2]} times, three words "
    f"{repeats[3]} times\n{result['seconds']} s since the command began",
    highlight=False,
  )


def agreement(entry: dict) -> str:
  """'identical', or how many texts part and on what margin."""
  parts = entry["differences"]
  if not parts:
    return "identical"
  margin = max(d["margin"] for d in parts)
  name = "near-ties" if margin <= compare.EPSILON else "DIFFERENT"
  return f"{name}: {len(parts)} part at a margin of {margin:.1e} or less"
