"""Programs: the only place where flags are read."""

import os.path
import signal
import sys

# A program imports JAX for seconds before `program.start` can say anything:
# until then Ctrl-C just ends it. Where it is ignored, it stays so.
_name = os.path.basename(sys.argv[0])
if _name == "-m" or _name.startswith("mtp-"):
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Commands from before these folders were moved stay valid:
# `python -m experiments.decode_speed.run`.
__path__.append(os.path.join(os.path.dirname(__file__), "engineering"))
