"""Tasks for lm-evaluation-harness, over local files.

The paper's benchmarks of language (appendices G and I). Prompts are ours where
the paper does not give them: `Question: ...`, `Answer:`. The harness also takes
these files itself: lm_eval.tasks.TaskManager(include_path="configs/harness").
"""

import os
import pathlib
from typing import Any

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
    ValueError: no such task or file, or examples are missing.
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
    files[split] = str(path)
  task["dataset_kwargs"] = {"data_files": files}
  return task
