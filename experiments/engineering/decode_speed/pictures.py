"""Pictures of `decode_speed.run`'s results."""

import pathlib

import matplotlib
import matplotlib.pyplot as plt

from experiments.engineering.decode_speed import report

matplotlib.use("Agg")


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
      measured = [report.speed_of(rows[label]) for rows in batches.values()]
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
  """Accepted drafts of each head: of all passes, and after accepted drafts."""
  chains = [row for label, row in rows.items() if label.startswith("chain")]
  row = max(chains, key=lambda row: row["heads"])
  heads = range(1, row["heads"] + 1)
  axis.bar(heads, row["accepted"], color="C0", label="of all passes")
  axis.plot(
    heads, row["accepted_in_turn"], "o-", color="C1",
    label="where the draft before was accepted",
  )  # fmt: skip
  axis.set(title="Accepted drafts", xlabel="head", ylim=(0, 1.05))
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
