"""Continues a prompt with a trained model, as fast as its heads allow.

  python -m experiments.generate --workdir=runs/quickstart \\
    --prompt_file=prompt.txt

The prompt is --prompt, --prompt_file, or standard input; in a terminal without
any of them, line after line is read and continued (--interactive). There
Ctrl-C stops a text. At an empty line Ctrl-C and Ctrl-D end the program, and so
does a second Ctrl-C within three seconds, even while a program is compiled.

With --chat the prompt is a user's message in the model's chat template. Lines
are then turns of one conversation; a turn that Ctrl-C stops is left out of it.

The text appears pass by pass, and each pass adds 1 to k tokens. Decoding is
greedy, and writes the text of --heads=1, ordinary decoding. With --temperature
it samples, from the distribution of ordinary sampling. --tree=16 drafts with
the tree of 16 nodes that `experiments.tune_tree` found.

Standard output holds the text without the prompt. A file gets it unchanged; a
terminal gets control characters as escapes such as \\x1b. In a file, each of
several samples ends with a NUL byte. All else goes to standard error. The speed
on its last line leaves out the first pass of each program, which compiles.
Texts end before a --stop string, after a --stop_id, and at the tokenizer's end
token.
"""

from absl import flags

from experiments.startup import continuation, options, program

# Each is a field of `continuation.Request`.
_FLAGS = [
  options.define_model(),
  flags.DEFINE_integer("step", None, "Of the checkpoint; else the last."),
  options.define_path(
    "prompt_file", None, "File whose whole text is the prompt; - for stdin."
  ),
  flags.DEFINE_string("prompt", None, "The prompt itself."),
  flags.DEFINE_bool(
    "interactive", None, "Continue each line of standard input by itself."
  ),
  flags.DEFINE_bool(
    "chat", False, "The prompt is a user's message, in the model's template."
  ),
  flags.DEFINE_string("system", None, "The system message of --chat."),
  flags.DEFINE_integer(
    "heads", None, "Heads k, 1 is ordinary decoding, 0 all; else the run's."
  ),
  flags.DEFINE_integer(
    "max_new", None, "Most tokens to write; else the run's."
  ),
  options.define_dtype(),
  flags.DEFINE_multi_string(
    "stop",
    [],
    r"The text ends before this string, of which \n, \t and \\ are escapes.",
  ),
  flags.DEFINE_multi_integer("stop_id", [], "The text ends behind this token."),
  flags.DEFINE_integer(
    "tree", None, "Nodes of a tree of drafts from the workdir's tree.json.", 2
  ),
  flags.DEFINE_float("temperature", 0.0, "0: greedy."),
  flags.DEFINE_integer("top_k", None, "Draw from the k likeliest."),
  flags.DEFINE_float("top_p", None, "Draw from this share."),
  flags.DEFINE_float("min_p", None, "Least share of the likeliest."),
  flags.DEFINE_float("penalty", None, "Of repeating a token."),
  options.define_seed("Of what is drawn."),
  flags.DEFINE_integer(
    "num_samples",
    1,
    "Texts to draw. In a file or pipe each of several ends with a NUL byte.",
  ),
  flags.DEFINE_integer(
    "sliding_window",
    None,
    "Look back over so many tokens only: texts without end.",
  ),
]
flags.mark_flags_as_mutual_exclusive(["prompt", "prompt_file", "interactive"])
flags.mark_flags_as_mutual_exclusive(["heads", "tree"])


def main(_: list[str]) -> None:
  """Writes the texts to standard output, all else to standard error."""
  values = {flag.name: flag.value for flag in _FLAGS}
  if not values["temperature"]:
    options.refuse_idle(["seed"], "at temperature 0, which draws nothing")
  continuation.run(continuation.Request(**values))


if __name__ == "__main__":
  continuation.keep_compiled_programs()
  program.start(main)
