"""Plants bugs and shows that the suite kills each: `make mutants`.

Every mutant is one wrong line in a copy of the tree. The tests named beside
it must pass without the bug and fail with it. Prints a line per mutant; exit
code 1 if one lives or no longer applies.
"""

import concurrent.futures
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PARTS = ("mtp_jax", "configs", "experiments", "tests", "pyproject.toml")


class Mutant(NamedTuple):
  """`old` becomes `new` in `file`; `tests` must see it."""

  bug: str
  file: str
  old: str
  new: str
  tests: str


MUTANTS = [
  Mutant(
    "f(g(X)) is g(f(X))",
    "mtp_jax/tasks/arithmetic.py",
    "values.push(some, operation(values.pop(some), right))",
    "values.push(some, operation(right, values.pop(some)))",
    "test_arithmetic.py::test_expressions_have_their_operations_and_values",
  ),
  Mutant(
    "a name's first mention counts as well",
    "mtp_jax/tasks/stories.py",
    "          if who in seen:\n",
    "          if True:\n",
    "test_induction.py::test_mentions_are_those_of_names_met_before",
  ),
  Mutant(
    "a sweep in which runs failed ends well",
    "experiments/measure/sweep.py",
    "  if outcome.failed:\n",
    "  if not outcome.done and outcome.failed:\n",
    "test_sweep.py::test_a_program_ends_with_an_error_if_runs_failed",
  ),
  Mutant(
    "a remedy names a field where its program takes a flag",
    "experiments/startup/program.py",
    "    if field not in known:\n",
    "    if field in known:\n",
    "test_flags.py::"
    "test_the_fields_of_a_message_are_flags_of_a_program_with_a_config",
  ),
  Mutant(
    "two sweeps write to one folder",
    "experiments/measure/sweep.py",
    "  with lock.exclusive(folder):",
    "  if folder:",
    "test_sweep.py::test_one_sweep_at_a_time_writes_to_a_folder",
  ),
  Mutant(
    "a run of a sweep that was cut short counts as finished",
    "experiments/measure/sweep.py",
    "return {_key(row) for row in rows if row.metric == _LAST}",
    "return {_key(row) for row in rows}",
    "test_sweep.py::test_a_sweep_resumes",
  ),
  Mutant(
    "added heads read the first batches of their model once more",
    "experiments/claims/self_speculation/ways.py",
    'data={"seed": cfg.data.seed + _NEW_ORDER}',
    'data={"seed": cfg.data.seed}',
    "test_ways.py::test_heads_added_or_pretrained_have_one_shape",
  ),
  Mutant(
    "a table shows a run that was cut short",
    "experiments/measure/sweep.py",
    "return [row for row in rows if _key(row) in ended]",
    "return [row for row in rows if ended]",
    "test_sweep.py::test_runs_that_were_cut_are_in_no_table",
  ),
  Mutant(
    "a table shows the runs of another claim",
    "experiments/measure/sweep.py",
    "for key in _ended(rows) if key[0] == claim}",
    "for key in _ended(rows)}",
    "test_sweep.py::test_runs_that_were_cut_are_in_no_table",
  ),
  Mutant(
    "a scale's section shows the pictures of another scale",
    "experiments/claims/__main__.py",
    'results.glob(f"{path.stem}[._]*png")',
    'results.glob("*.png")',
    "test_sweep.py::test_each_scale_is_a_section",
  ),
  Mutant(
    "of the drawn answers to a question the first alone is scored",
    "configs/harness/__init__.py",
    'if f["function"] != "take_first"]',
    "if f]",
    "test_harness.py::test_answers_that_are_drawn_are_all_scored",
  ),
  Mutant(
    "a table has one seed instead of their mean",
    "experiments/measure/plots.py",
    "mean = form.format(sum(values) / len(values))",
    "mean = form.format(values[0])",
    "test_sweep.py::test_a_table_shows_every_seed",
  ),
  Mutant(
    "an object may say that it equals the answer",
    "mtp_jax/evaluate/isolation/checker.py",
    "if not (with_plain or isinstance(args[0], Remote)):",
    "if False:",
    "test_sandbox.py::test_no_hostile_program_passes",
  ),
  Mutant(
    "a program may define the builtins of its tests",
    "mtp_jax/evaluate/isolation/checker.py",
    "n in replaced or not hasattr(builtins, n)",
    "True",
    "test_sandbox.py::test_a_builtin_is_pythons_unless_it_is_replaced",
  ),
  Mutant(
    "answers to another prompt are taken for these",
    "mtp_jax/tasks/samples.py",
    'in (kept | asked.get(row["task_id"], {})).items():',
    "in kept.items():",
    "test_samples.py::test_answers_of_other_settings_are_not_mixed",
  ),
  Mutant(
    "pass@k draws one sample before it begins",
    "mtp_jax/evaluate/pass_at_k.py",
    "places = np.arange(k)",
    "places = np.arange(1, k + 1)",
    "test_pass_at_k.py::test_equals_all_choices",
  ),
  Mutant(
    "correct samples of all temperatures are counted together",
    "mtp_jax/evaluate/pass_at_k.py",
    '(v["temperature"], v["task_id"]) for v in verdicts if v["passed"]',
    '(t["temperature"], v["task_id"])\n    for v in verdicts if v["passed"] '
    "for t in verdicts",
    "test_pass_at_k.py::"
    "test_correct_samples_are_counted_by_problem_and_temperature",
  ),
  Mutant(
    "a program may make files that no folder has",
    "mtp_jax/evaluate/isolation/seccomp.py",
    '"memfd_create": (319, 279),',
    "",
    "test_sandbox.py::test_no_hostile_program_passes",
  ),
  Mutant(
    "a program may clone itself into a user namespace",
    "mtp_jax/evaluate/isolation/seccomp.py",
    "_NAMESPACES = 0x7E020000",
    "_NAMESPACES = 0x6E020000",
    "test_seccomp.py::test_what_the_filter_says",
  ),
  Mutant(
    "what a busy machine left without time is not run again",
    "mtp_jax/evaluate/sandbox.py",
    "self.check(*job) if doubt(verdict.error) else verdict",
    "verdict",
    "test_sandbox.py::test_a_busy_machine_is_told_from_a_wrong_program",
  ),
  Mutant(
    "a verdict counts without the nonce",
    "mtp_jax/evaluate/sandbox.py",
    'if report["nonce"] == secret["nonce"]:',
    "if report:",
    "test_sandbox.py::test_a_verdict_needs_the_nonce",
  ),
  Mutant(
    "a stage of head weights begins a step late",
    "mtp_jax/train/head_weights.py",
    "stage = (step >= begins[1:]).sum()",
    "stage = (step > begins[1:]).sum()",
    "test_head_settings.py::test_stages_begin_where_they_say",
  ),
  Mutant(
    "heads that are held back teach the trunk in the serial loss",
    "mtp_jax/loss/implementations.py",
    "z, token = heads.trunk_read(here, i), heads.tokens_read(here, i)",
    "token = heads.tokens_read(here, i)",
    "test_head_settings.py"
    "::test_heads_that_are_held_back_teach_the_trunk_nothing",
  ),
  Mutant(
    "a head behind a gap counts as one that drafts",
    "mtp_jax/evaluate/heads.py",
    "drafting = slice(net.cfg.drafting)",
    "drafting = slice(None)",
    "test_head_settings.py::test_leaps_are_measured_as_the_heads_they_are",
  ),
  Mutant(
    "a consequence counts as uncertain behind its choice too",
    "mtp_jax/tasks/choice_points.py",
    "(place > 0) & before",
    "(place > 0)",
    "test_choice_points.py::test_a_choice_point_has_the_papers_number_of_terms",
  ),
  Mutant(
    "star graphs whose goal is always on the arm that is listed first",
    "mtp_jax/tasks/star_graph.py",
    "shuffled = rng.random(edges.shape[:2]).argsort(1)",
    "shuffled = np.tile(np.arange(edges.shape[1]), (count, 1))",
    "test_star_graph.py::test_documents_are_star_graphs",
  ),
  Mutant(
    "under a frozen trunk heads learn their neighbours' targets",
    "mtp_jax/loss/batch.py",
    "total, nll = part(rest, of_rest, slice(1, None))",
    "total, nll = part(rest, of_rest, slice(0, -1))",
    "test_frozen.py::test_gradient_is_the_formulas_of_heads_2_to_n",
  ),
  Mutant(
    "a run does not start from the model that it is given",
    "mtp_jax/train/loop.py",
    "step_lib.init_state(cfg, mesh, init), 0, origin",
    "step_lib.init_state(cfg, mesh), 0, origin",
    "test_init.py::test_the_run_is_that_of_the_model_with_more_heads",
  ),
  Mutant(
    "heads are trained on a random trunk",
    "mtp_jax/train/loop.py",
    'is_frozen = cfg.train.freeze == "trunk"',
    "is_frozen = False",
    "test_init.py::test_a_random_trunk_is_not_frozen",
  ),
  Mutant(
    "processes may start from different models",
    "mtp_jax/train/loop.py",
    'resume.check_agreement(metadata | {"init": origin})',
    "resume.check_agreement(metadata)",
    "test_init.py::test_hosts_may_keep_the_model_at_different_paths",
  ),
  Mutant(
    "padding ids have logits of 0",
    "mtp_jax/model/vocabulary.py",
    "mean = rows.mean(-2, keepdims=True)",
    "mean = 0 * rows.mean(-2, keepdims=True)",
    "test_surgery.py::test_padding_takes_no_more_than_its_share",
  ),
  Mutant(
    "targets off by one",
    "mtp_jax/loss/batch.py",
    "there = slice(distance, distance + T)",
    "there = slice(distance - 1, distance - 1 + T)",
    "test_loss.py::test_future_targets_against_loops",
  ),
  Mutant(
    "targets cross a document's end",
    "mtp_jax/loss/batch.py",
    "inside = (segments[:, there] == here) & (here > 0)",
    "inside = (segments[:, there] > 0) & (here > 0)",
    "test_loss.py::test_future_targets_against_loops",
  ),
  Mutant(
    "cotangent dropped",
    "mtp_jax/loss/implementations.py",
    "lambda d: (g * d).astype(d.dtype), (d_heads, d_read)",
    "lambda d: d.astype(d.dtype), (d_heads, d_read)",
    "test_loss.py::test_cotangent_multiplies",
  ),
  Mutant(
    "trunk's gradient of the last head only",
    "mtp_jax/loss/implementations.py",
    "d_read = jax.tree.map(jnp.add, d_read, d_read_here)",
    "d_read = d_read_here",
    "test_loss.py::test_equals_the_formula",
  ),
  Mutant(
    "a chain drops its successor's gradient",
    "mtp_jax/loss/implementations.py",
    "d_layers[i], d_x, d_token = pulls[i](d_x + d_state)",
    "d_layers[i], d_x, d_token = pulls[i](d_state)",
    "test_loss.py::test_equals_the_formula",
  ),
  Mutant(
    "chain of heads run in the wrong order",
    "mtp_jax/model/heads/stack.py",
    "backwards = self.kind.feeds < 0",
    "backwards = self.kind.feeds > 0",
    "test_loss.py::test_undifferentiated_values",
  ),
  Mutant(
    "ignored targets give a gradient",
    "mtp_jax/loss/cross_entropy.py",
    "(exps / total - hit) * jnp.where(valid, scale * weight, 0.0)",
    "(exps / total - hit) * (scale * weight)",
    "test_cross_entropy.py",
  ),
  Mutant(
    "a target's weight not in the gradient",
    "mtp_jax/loss/cross_entropy.py",
    "jnp.where(valid, scale * weight, 0.0)",
    "jnp.where(valid, scale, 0.0)",
    "test_loss.py::test_weights",
  ),
  Mutant(
    "the embedding's gradient of the last head only",
    "mtp_jax/loss/implementations.py",
    "d_embedded = jax.tree.map(jnp.add, d_embedded, d_token)",
    "d_embedded = d_token",
    "test_sequential_heads.py::test_equals_the_formula",
  ),
  Mutant(
    "head order reversed",
    "mtp_jax/model/heads/kinds.py",
    '"anticausal": Kind(feeds=-1)',
    '"anticausal": Kind(feeds=1)',
    "test_heads.py",
  ),
  Mutant(
    "causal mask missing",
    "mtp_jax/model/attention.py",
    "    is_causal=True,\n    local_window_size",
    "    is_causal=False,\n    local_window_size",
    "test_layers.py::test_what_a_position_sees",
  ),
  Mutant(
    "a sliding window one token too wide",
    "mtp_jax/model/attention.py",
    "return (window - 1, 0) if window",
    "return (window, 0) if window",
    "test_attention.py::test_a_sliding_window_hides_what_lies_before_it",
  ),
  Mutant(
    "channels of a file left in halves",
    "mtp_jax/interchange/names.py",
    "return self.entry.rotates and self.scheme.halves",
    "return False",
    "test_hugging_face.py::test_logits_are_those_of_transformers",
  ),
  Mutant(
    "a long prompt rotated as if read token by token",
    "mtp_jax/decode/decoder.py",
    "length = jnp.maximum(length, (start + valid)[:, None])",
    "pass",
    "test_families.py::test_drafts_write_transformers_text",
  ),
  Mutant(
    "document mask missing",
    "mtp_jax/model/layers.py",
    "segments if cfg.mask_documents else None",
    "None if cfg.mask_documents else segments",
    "test_layers.py::test_what_a_position_sees",
  ),
  Mutant(
    "splash attention's queries not scaled",
    "mtp_jax/model/attention.py",
    "C**-0.5",
    "C**-0.0",
    "test_attention.py::test_equals_the_formula",
  ),
  Mutant(
    "rotation of the wrong sign",
    "mtp_jax/model/layers.py",
    "a * ctx.cos - b * ctx.sin",
    "a * ctx.cos + b * ctx.sin",
    "test_layers.py::test_rotate",
  ),
  Mutant(
    "rotary position off by one at the accepted place",
    "mtp_jax/decode/decoder.py",
    "layers.context(positions, attend, self.cfg, length)",
    "layers.context(positions + (len(places) > 1), attend, self.cfg, length)",
    "test_window.py::test_windows_at_ragged_starts_equal_the_uncached_model",
  ),
  Mutant(
    "cache seen one position short",
    "mtp_jax/decode/cache.py",
    "mask = key_positions[:, None] <= positions",
    "mask = key_positions[:, None] < positions",
    "test_window.py::test_windows_at_ragged_starts_equal_the_uncached_model",
  ),
  Mutant(
    "a sliding window that sees one token more",
    "mtp_jax/decode/cache.py",
    "key_positions[:, None] > positions[..., None] - sliding_window",
    "key_positions[:, None] >= positions[..., None] - sliding_window",
    "test_window.py::test_a_ring_equals_a_band",
  ),
  Mutant(
    "nodes of a tree see their siblings",
    "mtp_jax/decode/tree.py",
    "mask[np.arange(self.size)[:, None], self.path_nodes] = True",
    "mask[:] = self.depth <= self.depth[:, None]",
    "test_window.py::test_nodes_of_a_tree_equal_the_text_of_their_path",
  ),
  Mutant(
    "the winning path left where it was",
    "mtp_jax/decode/decoder.py",
    "cache_lib.pick(new, path)",
    "cache_lib.pick(new, path * 0 + jnp.arange(path.shape[1]))",
    "test_window.py::test_nodes_of_a_tree_equal_the_text_of_their_path",
  ),
  Mutant(
    "heads read the tree's first nodes, not the path",
    "mtp_jax/decode/decoder.py",
    "window.at(path, window.start)",
    "window.at(path * 0 + jnp.arange(path.shape[1]), window.start)",
    "test_window.py::test_nodes_of_a_tree_equal_the_text_of_their_path",
  ),
  Mutant(
    "the text's new tokens not penalised",
    "mtp_jax/decode/loop.py",
    "seen = seen.at[rows, tokens].max(keep)",
    "seen = seen",
    "test_loop.py::test_whole_texts_have_head_1s_distribution",
  ),
  Mutant(
    "every pass draws by the same key",
    "mtp_jax/decode/loop.py",
    "keys = _keys(state.key, state.statistics.passes + 1)",
    "keys = _keys(state.key, 0 * state.statistics.passes)",
    "test_loop.py::test_whole_texts_have_head_1s_distribution",
  ),
  Mutant(
    "a ring that never grows",
    "mtp_jax/decode/decoder.py",
    "cache_len == sliding + window_lib.CHUNK",
    "True",
    "test_exactness.py::test_a_ring_grows_until_it_is_whole",
  ),
  Mutant(
    "drafts accepted behind a wrong one",
    "mtp_jax/decode/accept.py",
    "whole = (accepted[:, None] | ~jnp.asarray(tree.ancestor_mask)).all(-1)",
    "whole = accepted",
    "test_exactness.py::test_heads_that_always_or_never_agree_lose_nothing"
    " test_exactness.py::test_random_models_lose_nothing",
  ),
  Mutant(
    "a rejected draft leaves the distribution as it was",
    "mtp_jax/decode/accept.py",
    "return _normalise(jnp.maximum(p - q, 0), p)",
    "return p",
    "test_lossless.py",
  ),
  Mutant(
    "siblings measured against the first one's distribution",
    "mtp_jax/decode/accept.py",
    "q = jnp.where(rejected, _normalise(q.at[rows, x].set(0), q), q)",
    "q = q",
    "test_lossless.py",
  ),
  Mutant(
    "a chain's heads draft from the trunk",
    "mtp_jax/decode/decoder.py",
    "window.states.get(head - self._kind.feeds, window.trunk)",
    "window.trunk",
    "test_window.py::test_windows_at_ragged_starts_equal_the_uncached_model",
  ),
  Mutant(
    "the next drafts made at the wrong place",
    "mtp_jax/decode/decoder.py",
    "window.at(depth[:, None], ",
    "window.at(0 * depth[:, None], ",
    "test_window.py::test_nodes_of_a_tree_equal_the_text_of_their_path",
  ),
  Mutant(
    "log-probabilities taken after the token",
    "mtp_jax/decode/statistics.py",
    "logits, best = verification.logits[rows, path], ver",
    "logits, best = verification.logits[rows, jnp.roll(path, -1, 1)], ver",
    "test_exactness.py::test_log_probabilities_and_margins_are_head_1s",
  ),
  Mutant(
    "int8 keys without their scale",
    "mtp_jax/decode/cache.py",
    "scores *= jnp.swapaxes(k_scale, 2, 3)",
    "pass",
    "test_cache.py::test_attention_equals_the_formula",
  ),
  Mutant(
    "attention's scores rounded to the model's dtype",
    "mtp_jax/decode/cache.py",
    "jax.nn.softmax(jnp.where(mask, scores *",
    "jax.nn.softmax(jnp.where(mask, scores.astype(q.dtype) *",
    "test_cache.py::test_attention_equals_the_formula",
  ),
  Mutant(
    "an answer is cut at a stop word inside a string",
    "mtp_jax/tasks/code.py",
    'return len(quote) == 3 or (bool(quote) and not then.startswith("\\n"))',
    "return False",
    "test_code_tasks.py::test_where_an_answer_ends",
  ),
  Mutant(
    "the space before an answer is lost",
    "mtp_jax/tasks/samples.py",
    "problem, whole = problems[i], codec.decode(text.tokens, prompts[i])",
    "problem, whole = problems[i], codec.decode(text.tokens)",
    "test_samples.py::test_the_space_before_an_answer_stays",
  ),
  Mutant(
    "what a sample draws depends on what was drawn before",
    "mtp_jax/tasks/samples.py",
    "samples=[[p.number(n) for n in numbers] for p, numbers in missing],",
    "samples=[[*range(len(numbers))] for _, numbers in missing],",
    "test_samples.py::test_nothing_is_drawn_twice_and_all_is_the_same",
  ),
  Mutant(
    "a text keeps what was written behind its end",
    "mtp_jax/decode/generate.py",
    "new = slice(length, end if kept is None else length + kept)",
    "new = slice(length, end)",
    "test_serve.py::test_a_text_ends_where_the_caller_says",
  ),
  Mutant(
    "a served prompt that waits where a row is free",
    "mtp_jax/decode/serve.py",
    "while waiting and None in texts:",
    "while waiting and None in texts[: len(ready) or None]:",
    "test_serve.py::test_no_row_waits_while_a_prompt_does",
  ),
  Mutant(
    "padding rows of a refill clobber the last row",
    "mtp_jax/decode/serve.py",
    'old.at[rows].set(new, mode="drop")',
    'old.at[rows].set(new, mode="clip")',
    "test_serve.py::test_equals_one_batch",
  ),
  Mutant(
    "end token inside an accepted block passed over",
    "mtp_jax/decode/loop.py",
    "count = jnp.where(ends.any(1), first, count)",
    "count = jnp.where(ends.any(1), count, count)",
    "test_loop.py::test_a_stop_inside_an_accepted_block_ends_the_row_there",
  ),
  Mutant(
    "ids outside the vocabulary let through",
    "mtp_jax/decode/prompts.py",
    "(row >= vocab)",
    "(row > vocab)",
    "test_prompts.py",
  ),
  Mutant(
    "a first state is made for a config without train.detach",
    "mtp_jax/train/step.py",
    'names = "steps", "freeze", "detach"',
    'names = "steps", "freeze"',
    "test_head_settings.py::test_heads_of_a_chain_are_not_held_back",
  ),
  Mutant(
    "a non-finite step is taken",
    "mtp_jax/train/step.py",
    "jnp.where(good, new, old)",
    "jnp.where(good | True, new, old)",
    "test_train.py::test_a_non_finite_step_changes_nothing_but_the_counters",
  ),
  Mutant(
    "microbatches averaged twice",
    "mtp_jax/train/step.py",
    "weights / divisors[0]",
    "weights / (divisors[0] * cfg.train.accumulate)",
    "test_train.py::test_microbatches_give_the_same_step",
  ),
  Mutant(
    "far heads learn undivided losses where no next token has weight",
    "mtp_jax/train/step.py",
    "* (sums[0] > 0)",
    "* 1",
    "test_train.py::test_without_a_next_token_of_weight_nothing_is_learnt",
  ),
  Mutant(
    "microbatches forget that heads leap",
    "mtp_jax/train/step.py",
    "loss.future_targets(rows, N, cfg.model.offsets)",
    "loss.future_targets(rows, N)",
    "test_head_settings.py::test_microbatches_know_how_far_heads_leap",
  ),
  Mutant(
    "resumed one step off",
    "mtp_jax/train/batches.py",
    "      start=start,",
    "      start=start + (start > 0),",
    "test_train_loop.py::test_sigterm_saves_and_exits_with_0",
  ),
  Mutant(
    "samples tried of heads that no decoder drafts with",
    "mtp_jax/train/evaluations.py",
    "      self._samples = False",
    "      self._samples = True",
    "test_sequential_heads.py::test_a_run_says_once_that_it_writes_no_samples",
  ),
  Mutant(
    "SIGTERM not heard",
    "mtp_jax/train/processes.py",
    "    return asked.is_set()",
    "    return False",
    "test_train_loop.py::test_sigterm_saves_and_exits_with_0",
  ),
  Mutant(
    "SIGTERM waits for the first step of several processes",
    "mtp_jax/train/processes.py",
    '"jax_enable_preemption_service", False)',
    '"jax_enable_preemption_service", True)',
    "test_processes.py::test_a_silent_process_stops_the_others",
  ),
  Mutant(
    "a rate that falls in a line ends late",
    "mtp_jax/train/optim.py",
    "cfg.peak, cfg.peak * cfg.end, steps - cfg.warmup",
    "cfg.peak, cfg.peak * cfg.end, steps",
    "test_optim.py::test_schedule",
  ),
  Mutant(
    "norm scales decay",
    "mtp_jax/train/optim.py",
    "len(p.axes) > 1",
    "len(p.axes) > 0",
    "test_optim.py",
  ),
  Mutant(
    "a damaged array passes its checksum",
    "mtp_jax/checkpoint/reader.py",
    '      if checksum != record["arrays"][name]["checksum"]',
    '      if len(checksum) != len(record["arrays"][name]["checksum"])',
    "test_checkpoints.py::test_falls_back_and_goes_on",
  ),
  Mutant(
    "windows of a document's neighbour",
    "mtp_jax/data/packed.py",
    'inside, places, side="right"',
    'inside, places, side="left"',
    "test_packed.py",
  ),
  Mutant(
    "a damaged block of the corpus is read",
    "mtp_jax/data/blocks.py",
    " or zlib.crc32(raw) != self._checksums[index]",
    "",
    "test_pack.py::"
    "test_a_cache_damaged_in_use_is_an_error_before_its_tokens_are_read",
  ),
  Mutant(
    "a shared context is scored too",
    "mtp_jax/evaluate/likelihood.py",
    "counted = (jnp.arange(tokens.shape[1]) >= skips[:, None]) & (",
    "counted = (jnp.arange(tokens.shape[1]) >= 0 * skips[:, None]) & (",
    "test_likelihood.py::test_equals_whole_passes",
  ),
  Mutant(
    "ROUGE takes the summary for the reference",
    "mtp_jax/evaluate/rouge.py",
    "scorer.score(target=reference, prediction=summary)",
    "scorer.score(target=summary, prediction=reference)",
    "test_summaries.py::test_rouge_equals_its_definition",
  ),
  Mutant(
    "the last token of a prompt is learnt",
    "mtp_jax/data/pack.py",
    "return ids, len(text), len(ids) - len(parts[-1]) - 1",
    "return ids, len(text), len(ids) - len(parts[-1]) - 2",
    "test_answers.py::test_every_head_learns_the_tokens_of_answers",
  ),
  Mutant(
    "a corpus packed for another loss is used again",
    "mtp_jax/data/pack.py",
    "settings += [data.prompt, data.loss_on]",
    "settings += [data.prompt]",
    "test_answers.py::test_another_choice_packs_anew",
  ),
  Mutant(
    "a byte is trained on and held out",
    "mtp_jax/data/splits.py",
    "document.text[cut.at :]",
    "document.text[cut.at - 1 :]",
    "test_corpora.py::test_one_text_file_gives_both_splits",
  ),
  Mutant(
    "shards share rows",
    "mtp_jax/data/pipeline.py",
    "blocks[shard::shards]",
    "blocks[0::shards]",
    "test_pipeline.py",
  ),
  Mutant(
    "processes train on the same rows",
    "mtp_jax/train/batches.py",
    "      shard=self._shard,",
    "      shard=0 * self._shard,",
    "test_processes.py::test_two_processes_end_with_the_bits_of_one",
  ),
  Mutant(
    "a failed save waits for the others",
    "mtp_jax/checkpoint/storage.py",
    "if error := sys.exc_info()[1]:",
    "if error := None:",
    "test_storage.py::test_a_thread_that_failed_waits_for_no_one",
  ),
  Mutant(
    "held-out drafts judged one place early",
    "mtp_jax/evaluate/heads.py",
    "jax.lax.dynamic_slice_in_dim(first, i, T, 1)",
    "jax.lax.dynamic_slice_in_dim(first, i - 1, T, 1)",
    "test_evaluate_heads.py::test_equals_the_slow_way",
  ),
  Mutant(
    "text writes special tokens",
    "mtp_jax/tokenizer/hugging_face.py",
    "    t.encode_special_tokens = True",
    "    t.encode_special_tokens = False",
    "test_tokenizer_json.py::test_hard_texts_come_back",
  ),
  Mutant(
    "a workdir's tokenizer.json loses its special ids",
    "mtp_jax/tokenizer/hugging_face.py",
    'return self.special.files() | {"tokenizer.json": self._json}',
    'return {"tokenizer.json": self._json}',
    "test_workdir.py::test_a_run_keeps_its_tokenizer_json",
  ),
  Mutant(
    "a part of a state may lack stored arrays",
    "mtp_jax/checkpoint/checkpoints.py",
    'if n.split("/")[0] in like}',
    "if n in targets}",
    "test_checkpoints.py::test_a_part_is_restored_without_reading_the_rest",
  ),
  Mutant(
    "a symbol of SentencePiece in a text is a special token",
    "mtp_jax/tokenizer/sentence_piece.py",
    "ids = [j for i in ids for j in self._spelled(i)]",
    "ids = list(ids)",
    "test_tokenizer.py::test_sentencepiece_makes_no_special_id_from_text",
  ),
  Mutant(
    "a model's second end token does not end a text",
    "mtp_jax/tokenizer/interface.py",
    "return self.special.ends if self.special else (self.eos,)",
    "return (self.eos,)",
    "test_tokenizer.py::test_sentencepiece_reads_the_files_beside_it",
  ),
  Mutant(
    "a message ends its own turn",
    "mtp_jax/tokenizer/chat.py",
    "lambda name: name[0].translate(self._hide), text",
    "lambda name: name[0], text",
    "test_chat.py::test_no_message_makes_a_special_token",
  ),
  Mutant(
    "a message completes a name with what the template writes behind it",
    "mtp_jax/tokenizer/chat.py",
    "core = core[:-1] + core[-1].translate(self._hide)",
    "pass",
    "test_chat.py::test_a_message_completes_no_name",
  ),
  Mutant(
    "a head lies in its neighbour's place in a file",
    "mtp_jax/interchange/names.py",
    'found += layer(prefix, "heads.layers", i)',
    'found += layer(prefix, "heads.layers", i - 1)',
    "test_export.py::test_what_is_written_is_read_again",
  ),
  Mutant(
    "a model that is no longer tied is written tied",
    "mtp_jax/interchange/hugging_face.py",
    "return (a == b).all()",
    "return (a == b).any()",
    "test_export.py::test_a_tied_model_that_is_so_no_more_is_written_untied",
  ),
  Mutant(
    "a config.json that is made anew names no end tokens",
    "mtp_jax/interchange/export.py",
    "if tree is not known or codec is not source.codec:",
    "if codec is not source.codec:",
    "test_export.py::test_a_model_of_another_shape_still_names_its_end_tokens",
  ),
  Mutant(
    "a model card tells of the newest checkpoint, not of the one written",
    "mtp_jax/interchange/model_card.py",
    "step = saved.newest() if step is None else step",
    "step = saved.newest()",
    "test_export.py::test_the_card_names_the_step_of_the_checkpoint",
  ),
  Mutant(
    "a file of weights may name any function",
    "mtp_jax/interchange/pickles.py",
    "if name not in _ALLOWED:",
    "if not name:",
    "test_torch_files.py::test_what_a_pickle_would_run_is_refused",
  ),
  Mutant(
    "two spellings of rotary settings may differ",
    "mtp_jax/interchange/hugging_face_config.py",
    "if found[0] != found[-1]:",
    "if not found:",
    "test_folders.py::test_what_is_not_supported_is_refused_by_name",
  ),
  Mutant(
    "a tensor begins where its storage does",
    "mtp_jax/interchange/torch_files.py",
    "storage[place.offset :],",
    "storage,",
    "test_torch_files.py::test_torchs_own_bytes_are_read",
  ),
  Mutant(
    "a draft in a text with noise is taken for the text's last token",
    "experiments/demo/noise.py",
    "positions = window.start[:, None] + depth + 1 + head",
    "positions = window.start[:, None] + 0 * depth + 1 + head",
    "test_demo.py::test_any_heads_and_trees_write_the_text_of_the_formula",
  ),
  Mutant(
    "a draft has the noise of the token before it",
    "experiments/demo/noise.py",
    "ahead = jnp.arange(1, 1 + logits.shape[1])",
    "ahead = jnp.arange(0, 0 + logits.shape[1])",
    "test_demo.py::test_a_draft_has_the_noise_of_its_position",
  ),
]


def run_tests(tree: pathlib.Path, tests: set[str]) -> bool:
  """Whether the tests pass in a tree; a loop without end is a failure.

  Raises:
    RuntimeError: pytest itself did not come so far.
  """
  names = [f"tests/{name}" for name in sorted(tests)]
  try:
    done = subprocess.run(
      [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        *names,
      ],
      cwd=tree,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      timeout=900,
    )
  except subprocess.TimeoutExpired:
    return False
  if done.returncode not in (0, 1):
    raise RuntimeError(f"pytest {names}: {done.stdout[-2000:]}{done.stderr}")
  return done.returncode == 0


def kill(mutant: Mutant) -> str:
  """'killed', 'LIVES' or 'GONE' (the line to change is not there once)."""
  source = (ROOT / mutant.file).read_text()
  if source.count(mutant.old) != 1:
    return "GONE"
  with tempfile.TemporaryDirectory() as folder:
    tree = copy(pathlib.Path(folder))
    (tree / mutant.file).write_text(source.replace(mutant.old, mutant.new))
    return "LIVES" if run_tests(tree, set(mutant.tests.split())) else "killed"


def copy(folder: pathlib.Path) -> pathlib.Path:
  for part in PARTS:
    if (ROOT / part).is_dir():
      shutil.copytree(ROOT / part, folder / part)
    else:
      shutil.copy(ROOT / part, folder / part)
  return folder


def main() -> None:
  begin = time.time()
  tests = {name for mutant in MUTANTS for name in mutant.tests.split()}
  if not run_tests(ROOT, tests):
    sys.exit("the tests fail without any mutant")
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    fates = []
    for mutant, fate in zip(MUTANTS, pool.map(kill, MUTANTS), strict=True):
      fates.append(fate)
      print(f"{fate:7} {mutant.bug} ({mutant.file})", flush=True)
  minutes = (time.time() - begin) / 60
  print(f"{fates.count('killed')} of {len(fates)} killed, {minutes:.1f} min")
  sys.exit(fates.count("killed") != len(fates))


if __name__ == "__main__":
  main()
