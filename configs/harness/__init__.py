"""Tasks for lm-evaluation-harness, over local files.

The paper's benchmarks of language (appendices G and I). Prompts are ours where
the paper does not give them: `Question: ...`, `Answer:`. The harness also takes
these files itself: lm_eval.tasks.TaskManager(include_path="configs/harness").
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from mtp_jax.evaluate import pass_at_k
from mtp_jax.tasks import benchmark_files

_FOLDER = pathlib.Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def load(
  name: str, file: str | os.PathLike, train: str | os.PathLike | None = None
) -> dict[str, Any]:
  """A task of NAMES as what `lm_eval.simple_evaluate(tasks=[...])` takes.

  Args:
    name: such as 'arc_challenge'.
    file: JSONL with the fields that the task's YAML names.
    train: JSONL that few-shot examples come from; 'gsm8k' needs it.

  Raises:
    ValueError: no such task or file, examples are missing, or a line is bad
      (`benchmark_files.check`).
  """
  import yaml  # comes with ml_collections

  if name not in NAMES:
    raise ValueError(f"no task {name!r}; choose one of {', '.join(NAMES)}")
  task = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text("utf-8"))
  files = {"test": file}
  if "fewshot_split" in task:
    if train is None:
      raise ValueError(f"{name} needs a file of examples, its training split")
    files["train"] = train
  for split, path in files.items():
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
      raise ValueError(f"there is no file {path}, the {split} split of {name}")
    benchmark_files.check(name, path)
    files[split] = str(path)
  task["dataset_kwargs"] = {"data_files": files}
  return task


def sampled(
  task: dict[str, Any],
  count: int,
  ks: Sequence[int],
  *,
  temperature: float,
  top_p: float | None = None,
) -> dict[str, Any]:
  """`task` with several drawn answers to each question, and their pass@k.

  The paper draws 200 answers to each question of GSM8K (appendix I), with
  top_p 0.95 and temperatures from 0.2 to 1.4, for k = 1, 10 and 100:
  `sampled(load("gsm8k", ...), 200, (1, 10, 100), temperature=0.8, top_p=0.95)`.

  Args:
    task: from `load`, whose answers are compared with one text: 'gsm8k'.
    count: answers to each question.
    ks: the k's, each from 1 to `count`.
    temperature: above 0.
    top_p: answers are drawn from this share; None: from all.

  Returns:
    A task with the metrics pass@k, and `correct`: the correct answers among
    `count`.

  Raises:
    ValueError: the answers of the task are not such, or a number is bad.
  """
  if task.get("num_fewshot") is None or len(task["metric_list"]) != 1:
    raise ValueError(f"{task['task']} has no pass@k: 'gsm8k' has")
  if not temperature > 0:
    raise ValueError(f"temperature {temperature} is not above 0")
  for k in ks:
    pass_at_k.pass_at_k(count, [0], k)  # raises
  drawn = {"do_sample": True, "temperature": temperature}
  drawn |= {} if top_p is None else {"top_p": top_p}
  (metric,) = task["metric_list"]
  return task | {
    "task": f"{task['task']}_t{temperature:g}",
    "repeats": count,
    "generation_kwargs": task["generation_kwargs"] | drawn,
    "filter_list": [
      # All answers are scored, not the first alone.
      one
      | {"filter": [f for f in one["filter"] if f["function"] != "take_first"]}
      for one in task["filter_list"]
    ],
    "metric_list": [
      metric
      | {"metric": _pass_at_k, "ks": ks}
      | {"aggregation": "mean", "higher_is_better": True}
    ],
  }


def _pass_at_k(references, predictions, *, ks, **exact_match):
  """The harness's metric: scores of one question's answers."""
  from lm_eval.api import metrics

  (answers,) = predictions
  correct = sum(
    int(
      metrics.exact_match_fn(
        references=references, predictions=[answer], **exact_match
      )["exact_match"]
    )
    for answer in answers
  )
  return {"correct": correct} | {
    f"pass@{k}": float(pass_at_k.pass_at_k(len(answers), [correct], k)[0])
    for k in ks
  }
