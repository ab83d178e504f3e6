"""Calls programs as `python -m` does, with the imports paid only once.

Reads a JSON list [module, *arguments] per line, and answers each with
[exit code, standard output, standard error] of a forked child. A module may
also be the path of a file.
"""

import json
import os
import runpy
import sys
import tempfile

import experiments.program  # noqa: F401  takes what all of them import

for line in sys.stdin:
  module, *arguments = json.loads(line)
  with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
    if not (child := os.fork()):
      os.dup2(out.fileno(), 1)
      os.dup2(err.fileno(), 2)
      sys.argv[:] = [module, *arguments]
      if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
      else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
      sys.exit()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    texts = []
    for file in (out, err):
      file.seek(0)
      texts.append(file.read().decode())
  print(json.dumps([code, *texts]), flush=True)
