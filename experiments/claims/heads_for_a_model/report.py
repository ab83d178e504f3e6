"""Tables and the picture of `heads_for_a_model`'s results."""

import pathlib

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from experiments.demo import report as demo_report
from experiments.demo import tables as demo_tables
from experiments.measure import study
from mtp_jax import tokenizer

matplotlib.use("Agg")


def tables(result: dict) -> str:
  """Markdown: the heads on held-out files, then decoding."""
  lines = [
    "| trained on | head | nats per token | accuracy |",
    "|---|---|---|---|",
  ]
  for corpus, found in result.items():
    rows = zip(found["held_out_nats"], found["held_out_accuracy"], strict=True)
    lines += [
      f"| {corpus} | {i} | {nats:.3f} | {accuracy:.1%} |"
      for i, (nats, accuracy) in enumerate(rows, 1)
    ]
  if not any(found["decoding"] for found in result.values()):
    return "\n".join(lines)
  lines += [
    "",
    "| trained on | prompts | batch | decoder | tokens per forward | "
    "over ordinary | same texts | largest margin |",
    "|---" * 8 + "|",
  ]
  for corpus, found in result.items():
    for place, rows in found["decoding"].items():
      lines += [_line(corpus, place, *row) for row in rows.items()]
  return "\n".join(lines)


def _line(corpus, place, label, row) -> str:
  prompts, batch = place.split(", ")
  same, tokens = row["same_texts"], row.get("tokens_per_forward")
  margin = f"{max(same['margins']):.0e}" if same["margins"] else ""
  cells = [
    *(corpus, prompts, batch, label),
    "" if tokens is None else f"{tokens:.2f}",
    f"{row['speedup_with_prompts']:.2f}",
    f"{same['same']} of {same['of']}",
    margin,
  ]
  return f"| {' | '.join(cells)} |"


def write_page(
  folder: pathlib.Path, page: dict, codec: tokenizer.Tokenizer
) -> None:
  """Prints completions and writes report.html, both as the demo does.

  Args:
    folder: takes report.html and what its picture is drawn from.
    page: from `decoding.completions`, with the run's provenance and the rows of
      its training.
    codec: the tokenizer.
  """
  scores = page["scores"]["bits_per_byte"]
  per_nat = scores[0] / page["held_out_nats"][0]
  rows = [
    {"step": row["step"]}
    | {
      f"bits_per_byte_{i}": nats * per_nat
      for i, nats in enumerate(row["nats"], 1)
    }
    for row in page["steps"]
  ]
  study.write_csv(folder / "train.csv", rows)
  demo_report.write(folder, page, codec)
  demo_tables.show(page, codec)


def write_picture(folder: pathlib.Path, result: dict) -> None:
  """Draws heads_for_a_model.png: losses, tokens per forward, speed.

  Nothing is drawn of corpora without a comparison (`Scale.batches`).
  """
  result = {name: r for name, r in result.items() if r["decoding"]}
  if not result:
    return
  figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
  for corpus, found in result.items():
    steps = [row["step"] for row in found["steps"]]
    nats = np.array([row["nats"] for row in found["steps"]])
    for i in range(1, nats.shape[1]):
      axes[0].plot(steps, nats[:, i], label=f"{corpus}, head {i + 1}", lw=1.2)
  axes[0].set(xlabel="step", ylabel="nats per token", title="Training loss")
  axes[0].legend(fontsize=7)
  for axis, key, title in (
    (axes[1], "tokens_per_forward", "Tokens per forward"),
    (axes[2], "speedup_with_prompts", "Speed over ordinary decoding"),
  ):
    places = next(iter(result.values()))["decoding"]
    places = [p for p in places if p.endswith(", 1")]
    width = 0.8 / max(1, len(result) * len(places))
    for j, (corpus, place) in enumerate((c, p) for c in result for p in places):
      rows = result[corpus]["decoding"][place]
      rows = {k: row for k, row in rows.items() if key in row}
      axis.bar(
        np.arange(len(rows)) + j * width,
        [row[key] for row in rows.values()],
        width,
        label=f"heads from {corpus}, prompts of {place.split(',')[0]}",
      )
    axis.set_xticks(np.arange(len(rows)), rows, rotation=30, fontsize=8)
    axis.set_title(title)
    axis.legend(fontsize=6)
  figure.savefig(folder / "heads_for_a_model.png", dpi=130)
  plt.close(figure)
