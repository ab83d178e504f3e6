"""Answers that a model draws to programming problems.

They are kept as JSONL, a line as soon as it is known. What is there is not
drawn again; `judging` gives verdicts. For one model, settings and prompt, what
is drawn depends on the seed, the problem's name and the sample's number alone:
a file that was cut short ends as it would have.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mtp_jax import tokenizer
from mtp_jax.decode import accept, checks, interface, sampling, serve, stream
from mtp_jax.decode import tree as tree_lib
from mtp_jax.tasks import code


@dataclasses.dataclass(frozen=True)
class SampleSettings:
  """How answers are drawn."""

  temperatures: tuple[float, ...]  # 0 is greedy, with one sample
  count: int  # samples per problem at each temperature above 0
  max_new: int = 512  # tokens
  top_p: float | None = None
  seed: int = 0
  rows: int = 8  # answers at once
  heads: int | tree_lib.Tree = 1  # k, or a tree of drafts
  near_tie: float = 1e-3  # margin of a token that rounding might change
  model: str = ""  # names the model, so that another's answers are refused

  def check(self) -> None:
    """Raises ValueError: nothing to draw, twice the same, or a bad number."""
    if not self.temperatures or min(self.temperatures) < 0:
      raise ValueError(
        f"temperatures {self.temperatures}: give some, from 0 on"
      )
    if len(set(self.temperatures)) < len(self.temperatures):
      raise ValueError(f"temperatures {self.temperatures}: one is there twice")
    if self.count < 1:
      raise ValueError(f"{self.count} samples: give at least 1")
    if self.top_p is not None and max(self.temperatures) == 0:
      raise ValueError("top_p filters what is drawn; greedy draws nothing")
    for temperature in filter(None, self.temperatures):
      self.rule(temperature).sampler.check()
    checks.max_new(self.max_new)
    checks.seed(self.seed)

  def samples(self, temperature: float) -> range:
    """The samples of each problem."""
    return range(self.count if temperature else 1)

  def recorded(self) -> dict[str, Any]:
    """What every line of a file records, and all lines agree in."""
    names = "seed", "max_new", "top_p", "model"
    kept = {name: getattr(self, name) for name in names}
    return kept | {"heads": _heads(self.heads)}

  def rule(self, temperature: float) -> interface.Rule:
    """How tokens are chosen."""
    if not temperature:
      return accept.GREEDY
    sampler = sampling.Sampler(temperature=temperature, top_p=self.top_p)
    return accept.SpeculativeSampling(sampler)


def draw(
  decoder: interface.Decoder,
  codec: tokenizer.Tokenizer,
  problems: Sequence[code.Problem],
  settings: SampleSettings,
  path: pathlib.Path,
) -> list[dict[str, Any]]:
  """Draws the answers that a file lacks, and returns all of these problems.

  A problem's samples share one reading of its prompt. An answer ends before a
  stop sequence (`Problem.end`), and at an end token, while others are written.

  Args:
    decoder: from `mtp_jax.lay_out(model, codec.vocab)`.
    codec: the model's.
    problems: from `problem_files.read`.
    settings: what to draw.
    path: JSONL, made if it is missing. A line has the problem's name, the
      temperature and the sample's number, its completion, `ended` (whether it
      ended by itself), tokens, their log-probabilities under head 1 at
      temperature 1 in nats, passes, and near_ties: how many tokens had a rival
      closer than `settings.near_tie`.

  Raises:
    ValueError: bad settings; the file is damaged, or has answers of another
      seed, max_new, top_p, model or heads, or to another text of one of these
      problems.
  """
  settings.check()
  asked = {p.name: {"prompt": prompt_digest(codec, p)} for p in problems}
  rows = read(path, completion=str)
  _check_same(path, rows, settings, asked)
  done = {key(row) for row in rows}
  for one, count in collections.Counter(map(key, rows)).items():
    if count > 1:
      raise ValueError(
        f"{path} has {count} lines of task_id, temperature, sample {one}: keep "
        "one of them"
      )
  with appending(path, rows) as write:

    def keep(row):
      rows.append(row)
      write(row)

    for temperature in settings.temperatures:
      samples = settings.samples(temperature)
      missing = [
        (p, [i for i in samples if (p.name, temperature, i) not in done])
        for p in problems
      ]
      missing = [(p, some) for p, some in missing if some]
      if missing:
        _draw_missing(decoder, codec, missing, settings, temperature, keep)
  wanted = {
    (p.name, t, i)
    for p in problems
    for t in settings.temperatures
    for i in settings.samples(t)
  }
  return sorted((row for row in rows if key(row) in wanted), key=key)


def _check_same(path, rows, settings, asked) -> None:
  """Raises ValueError where a file's answers are to something else.

  `asked`: problem's name -> what its answers also have to agree in.
  """
  kept = settings.recorded()
  for row in rows:
    for name, value in (kept | asked.get(row["task_id"], {})).items():
      if row.get(name) != value:
        raise ValueError(
          f"{path} has samples of {name}={row.get(name)}, and {value} is asked "
          "for: name another folder"
        )


def _draw_missing(decoder, codec, missing, settings, temperature, keep) -> None:
  """Draws answers at one temperature, and keeps each when it is finished.

  Args:
    decoder: as of `draw`.
    codec: as of `draw`.
    missing: pairs of a problem and the numbers of its samples, at least one.
    settings: as of `draw`.
    temperature: one of the settings'.
    keep: called with the line of each answer.
  """
  problems = [problem for problem, _ in missing]
  prompts = [_ids(codec, problem.prompt) for problem in problems]
  digests = [prompt_digest(codec, problem) for problem in problems]
  names = getattr(codec, "special_names", [])
  # Of each text: its problem's place in `missing`, and its sample's number.
  texts = [(i, n) for i, (_, numbers) in enumerate(missing) for n in numbers]

  def on_text(place, text):
    i, sample = texts[place]
    problem, whole = problems[i], codec.decode(text.tokens, prompts[i])
    end = problem.end(whole, names)
    keep(
      {
        "task_id": problem.name,
        "temperature": temperature,
        "sample": sample,
        **settings.recorded(),
        "prompt": digests[i],
        "completion": whole[:end],
        "ended": end is not None or text.tokens[-1] in codec.ends,
        "tokens": text.tokens.tolist(),
        "logprobs": [round(float(x), 6) for x in text.logprob],
        "passes": len(text.per_pass),
        "near_ties": int((text.margin < settings.near_tie).sum()),
      }
    )

  serve.generate_all(
    decoder,
    prompts,
    rows=settings.rows,
    samples=[[p.number(n) for n in numbers] for p, numbers in missing],
    heads=settings.heads,
    max_new=settings.max_new,
    stop=codec.ends,
    rule=settings.rule(temperature),
    seed=settings.seed,
    on_text=on_text,
    end=stream.ends(
      codec, prompts, lambda place, text: problems[place].end(text, names)
    ),
  )


def read(path: pathlib.Path, **kinds: type) -> list[dict[str, Any]]:
  """The lines of a file; the last one is left out where a kill cut it.

  Args:
    path: the file.
    **kinds: fields that a line has to have, besides its key, and their types.

  Raises:
    ValueError: another line is damaged; names the file and the line.
  """
  if not path.exists():
    return []
  found, lines = [], path.read_bytes().split(b"\n")
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line.decode("utf-8"))
      if not isinstance(row, dict):
        raise ValueError("it is no object of JSON")
      if missing := [name for name in KEY if name not in row]:
        raise ValueError(f"it has no {missing[0]!r}")
      for name, kind in kinds.items():
        if not isinstance(row.get(name), kind):
          value = f"{row.get(name)!r:.40}"
          raise ValueError(f"{name!r} is {value}, not a {kind.__name__}")
      found.append(row)
    except ValueError as error:
      if number < len(lines):  # what ends in a line break was written whole
        raise ValueError(
          f"{path}:{number} is damaged ({error}): mend or remove the line"
        ) from error
  return found


@contextlib.contextmanager
def appending(
  path: pathlib.Path, rows: Iterable[dict[str, Any]]
) -> Iterator[Callable[[dict[str, Any]], None]]:
  """A function that adds a line; the file begins with `rows`.

  Only one process at a time may do so: each replaces the file.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f"{path.name}.partial")
  with partial.open("w", encoding="utf-8") as file:
    file.writelines(json.dumps(row) + "\n" for row in rows)
  partial.replace(path)
  with path.open("a", encoding="utf-8") as file:

    def write(row):
      file.write(json.dumps(row) + "\n")
      file.flush()

    yield write


KEY = "task_id", "temperature", "sample"


def key(row: dict[str, Any]) -> tuple[str, float, int]:
  """What a line is of: the problem's name, the temperature, the sample."""
  task, temperature, sample = (row[name] for name in KEY)
  return task, temperature, sample


def prompt_digest(codec: tokenizer.Tokenizer, problem: code.Problem) -> str:
  """16 digits of the tokens that a model reads and of where answers end."""
  ids = _ids(codec, problem.prompt).tolist()
  return digest((ids, problem.before, problem.stops))


def digest(value: Any) -> str:
  """16 digits that tell values of different `repr` apart."""
  text = repr(value).encode("utf-8", "surrogatepass")
  return hashlib.sha256(text).hexdigest()[:16]


def _heads(heads) -> int | str:
  """k, or a digest of a tree's paths."""
  return heads if isinstance(heads, int) else f"tree {digest(heads.paths)}"


def _ids(codec, text) -> np.ndarray:
  ids = np.array([*codec.prefix, *codec.encode(text)], np.int32)
  return ids if ids.size else np.array([codec.bos], np.int32)
