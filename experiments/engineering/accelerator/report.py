"""What a call prints at its end: figures, verdicts, what was not done."""

from collections.abc import Sequence

from experiments.measure import study


def text(stages: dict, not_begun: Sequence[str] = ()) -> str:
  """A few lines per stage, and those that the last call did not begin."""
  lines = []
  for name, section in stages.items():
    results = section.get("results", {})
    kind = section.get("device", {}).get("kind", "no device")
    lines.append(
      f"{name}: {section['status']}, {len(results)} results on {kind}"
    )
    for key, value in results.items():
      lines += [f"  {line}" for line in _figures(key, value)]
    for title in ("failed", "left_out"):
      found = section.get(title, {})
      lines += [
        f"  {title.replace('_', ' ')}: {key}: {why}"
        for key, why in found.items()
      ]
  if not_begun:
    lines.append(f"not begun by this call: {', '.join(not_begun)}")
  return "\n".join(lines)


def _figures(name, value):
  """Lines of one result; none for those that are only to be looked up."""
  if "met" in value:
    yield f"{name}: {study.verdict(value['met'])}"
  if "bytes_per_second" in value:
    yield (
      f"{name}: {value['bytes_per_second'] / 1e9:,.0f} GB/s, "
      f"{value['flops_per_second'] / 1e12:,.0f} TFLOP/s"
    )
  if name.startswith("batch"):
    for key, row in value.items():
      yield f"{name}, {key}: {_pass(row)}"
  for row in value.get("rows", []):
    if "seconds" in row:
      use = row.get("flop_utilisation")
      yield (
        f"{row['size']}, n={row['n']}, {row['loss']}: {row['seconds']:.4f} s, "
        f"{row['tokens_per_second']:,.0f} tokens/s, "
        f"utilisation {'unknown' if use is None else f'{use:.3f}'}"
      )
  for key, bound in value.get("bounds", {}).items():
    if isinstance(bound, dict):
      yield f"{key}: {study.Bound(**bound)}"
  if "fits" in value:
    yield f"{name}: {value['fits']} fit, {value['does_not_fit']} do not"
  if "steps" in value:
    yield (
      f"{name}: {value['parameters'] / 1e6:.1f} million parameters, step "
      f"{value['steps']} of {value['of']}"
    )


def _pass(row):
  """A pass of stage 2, or a topology of `decode_speed`."""
  if "failed" in row:
    return f"failed: {row['failed']}"
  if "over_ordinary" in row:
    return (
      f"{row['seconds'] * 1e3:.2f} ms, {row['over_ordinary']:.2f} of ordinary, "
      f"{row.get('of_bandwidth', 0):.0%} of bandwidth, "
      f"{row.get('of_flops', 0):.0%} of FLOP/s"
    )
  if "speedup" in row:
    same = row["same_texts"]
    return (
      f"{row['tokens_per_forward']:.2f} tokens per forward, speedup "
      f"{row['speedup']:.2f}, {same['same']} of {same['of']} texts the same"
    )
  return "not timed"
