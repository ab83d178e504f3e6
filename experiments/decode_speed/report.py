"""Tables and pictures of `decode_speed.run`'s results."""

import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from mtp_jax.decode import tree as tree_lib

matplotlib.use("Agg")

EPSILON = 1e-4  # top-two margin of logits below which a tie may fall either way


def name(tree: tree_lib.Tree) -> str:
  """'ordinary', 'chain 4' or 'tree 16'."""
  if tree.size == 1:
    return "ordinary"
  kind = "chain" if tree.is_chain else "tree"
  return f"{kind} {tree.size}"


def common(a, b) -> int:
  """Length of the common beginning."""
  size = min(len(a), len(b))
  return int(np.argmax(np.append(a[:size] != b[:size], True)))


def tables(result: dict) -> str:
  """Markdown: two tables per model, a line per batch and topology."""
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
    lines += [
      "",
      "| slots | prompts | drafts | tokens/s | over ordinary | predicted | "
      "tokens per forward | predicted | auto |",
      "|---" * 9 + "|",
    ]
    for slots, served in found["served"].items():
      lines += [
        f"| {slots} | {served['prompts']} | {label} | "
        f"{row['tokens_per_second']:,.0f} | {row['speedup']:.2f} | "
        f"{row['predicted_speedup']:.2f} | {row['tokens_per_forward']:.2f} | "
        f"{row['predicted_tokens_per_forward']:.2f} | "
        f"{'taken' if row['auto'] else ''} |"
        for label, row in served["rows"].items()
      ]
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
  """Tokens per second of all rows if none idles; without prompts' passes."""
  reading, writing = (
    sorted(row[k])[len(row[k]) // 2]
    for k in ("seconds_reading", "seconds_writing")
  )
  speed = row["tokens_per_second"] * (reading + writing) / writing
  return speed / (1 - row["idle_rows"])


def write(folder: pathlib.Path, result: dict) -> None:
  """Writes a picture per model into `folder`."""
  for model, found in result["models"].items():
    batches = found["batches"]
    first = next(iter(batches.values()))
    shown = {k: row for k, row in first.items() if "size" in row}
    labels = list(shown)
    colours = plt.colormaps["viridis"](
      [i / max(1, len(labels) - 1) * 0.9 for i in range(len(labels))]
    )
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    _bars(axes[0, 0], "Tokens per forward pass", "tokens_per_forward", shown)
    _bars(axes[1, 2], "Wasted share of the tokens read", "wasted", shown)
    _accepted(axes[1, 0], shown)
    _ranks(axes[1, 1], found["acceptance"])
    _, middle, right = axes[0]
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


def _bars(axis, title, key, rows):
  axis.barh(list(rows), [row[key] for row in rows.values()], color="C0")
  axis.invert_yaxis()
  axis.set(title=title, xlim=(0, None))
  axis.bar_label(axis.containers[0], fmt="%.2f", fontsize=7, padding=2)


def _accepted(axis, rows):
  """Drafts of each head that stood, of all and of those whose turn came."""
  chains = [row for label, row in rows.items() if label.startswith("chain")]
  row = max(chains, key=lambda row: row["heads"])
  heads = range(1, row["heads"] + 1)
  axis.bar(heads, row["accepted"], color="C0", label="of all passes")
  axis.plot(
    heads, row["accepted_in_turn"], "o-", color="C1",
    label="where the draft before stood",
  )  # fmt: skip
  axis.set(title="Drafts that stand", xlabel="head", ylim=(0, 1.05))
  axis.legend(fontsize=7)


def _ranks(axis, acceptance):
  """Chance of each head's candidates by rank, one upon the other."""
  heads, below = range(2, 2 + len(acceptance)), [0.0] * len(acceptance)
  ranks = list(zip(*acceptance, strict=True))
  for rank, chances in enumerate(ranks):
    shade = plt.colormaps["Blues"](0.9 - 0.7 * rank / len(ranks))
    axis.bar(heads, chances, bottom=below, color=shade)
    below = [b + c for b, c in zip(below, chances, strict=True)]
  axis.set(
    title=f"Right candidates, ranks 1 to {len(ranks)}",
    xlabel="head",
    ylim=(0, 1.05),
  )
