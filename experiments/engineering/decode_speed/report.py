"""Tables of `decode_speed.run`'s results."""


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
