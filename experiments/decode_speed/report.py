"""Tables and pictures of `decode_speed.run`'s results."""

import pathlib

import matplotlib
import matplotlib.pyplot as plt

from mtp_jax.decode import tree as tree_lib

matplotlib.use("Agg")

EPSILON = 1e-4  # top-two margin of logits below which a tie may fall either way


def name(tree: tree_lib.Tree) -> str:
  """'ordinary', 'chain 4' or 'tree 16'."""
  if tree.size == 1:
    return "ordinary"
  kind = "chain" if tree.is_chain else "tree"
  return f"{kind} {tree.size}"


def tables(result: dict) -> str:
  """Markdown: one table per model, a line per batch and topology."""
  parts = []
  for model, found in result["models"].items():
    lines = [
      f"### {model}: {found['parameters'] / 1e6:.2f} million parameters",
      "",
      "| batch | drafts | tokens per forward | speedup | efficiency | limit | "
      "ms per pass | of bandwidth | predicted over measured speed | texts |",
      "|---" * 10 + "|",
    ]
    for batch, rows in found["batches"].items():
      lines += [_line(batch, label, row) for label, row in rows.items()]
    parts.append("\n".join(lines))
  return "\n\n".join(parts)


def _line(batch, label, row):
  same = row["same_texts"]
  texts = f"{same['same']} of {same['of']}"
  if same["margins"]:
    texts += f", ties of {max(same['margins']):.0e}"
  if "size" not in row:
    speed = row["speedup_with_prompts"]
    cells = ["1.00", f"{speed:.2f} (with prompts)", *[""] * 5, texts]
  else:
    predicted = row["predicted_tokens_per_second"] / speed_of(row)
    cells = [
      f"{row['tokens_per_forward']:.2f}",
      f"{row['speedup']:.2f}",
      f"{row['efficiency']:.2f}",
      f"{row['limit']:.2f}",
      f"{row['milliseconds_per_pass']:.2f}",
      f"{row['share_of_bandwidth']:.0%}",
      f"{predicted:.2f}",
      "" if label == "ordinary" else texts,
    ]
  return f"| {batch} | {label} | {' | '.join(cells)} |"


def speed_of(row: dict) -> float:
  """Tokens per second of all rows, the prompts' passes left out."""
  reading, writing = (
    sorted(row[k])[len(row[k]) // 2]
    for k in ("seconds_reading", "seconds_writing")
  )
  return row["tokens_per_second"] * (reading + writing) / writing


def write(folder: pathlib.Path, result: dict) -> None:
  """Writes a picture per model into `folder`."""
  for model, found in result["models"].items():
    figure, (left, middle, right) = plt.subplots(
      1, 3, figsize=(12, 3.8), layout="constrained"
    )
    batches = found["batches"]
    first = next(iter(batches.values()))
    labels = [label for label, row in first.items() if "size" in row]
    values = [first[label]["tokens_per_forward"] for label in labels]
    left.barh(labels, values, color="C0")
    left.invert_yaxis()
    left.set(title="Tokens per forward pass", xlim=(0, None))
    left.bar_label(left.containers[0], fmt="%.2f", fontsize=7, padding=2)
    colours = plt.colormaps["viridis"](
      [i / max(1, len(labels) - 1) * 0.9 for i in range(len(labels))]
    )
    for label, colour in zip(labels, colours, strict=True):
      speedups = [rows[label]["speedup"] for rows in batches.values()]
      middle.plot(list(batches), speedups, "o-", color=colour, label=label)
      predicted = [
        rows[label]["predicted_tokens_per_second"] for rows in batches.values()
      ]
      measured = [speed_of(rows[label]) for rows in batches.values()]
      right.loglog(measured, predicted, "o", color=colour, ms=4)
    middle.axhline(1, color="0.7", lw=0.8)
    middle.set(title="Speedup", xlabel="batch")
    middle.legend(fontsize=7, ncols=2)
    low, high = right.get_xlim()
    right.plot([low, high], [low, high], color="0.7", lw=0.8)
    right.set(title="Tokens per second", xlabel="measured", ylabel="predicted")
    figure.savefig(folder / f"{model}.png", dpi=130)
    plt.close(figure)
