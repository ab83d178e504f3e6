"""Ctrl-C, also where Python does not run, as in compilers.

Python runs a signal's handler after the C++ call that it interrupts, which may
be a minute later. A thread hears of each signal at once. What it does depends
on the handler that is installed at that moment:

  end_program   three seconds to leave by KeyboardInterrupt, then it exits
  stop_text     nothing; it exits at a second Ctrl-C within three seconds
  any other     nothing, as the training loop saves; it exits at the second

Python ignores a KeyboardInterrupt in a finalizer. Where another handler has
been installed three seconds later, the thread sends the signal to it again.
"""

import math
import os
import select
import signal
import socket
import sys
import threading
import time

PATIENCE = 3.0  # seconds

_raised = False  # by `end_program`, since the latest signal that was sent again


def watch() -> None:
  """Starts the thread; Ctrl-C ends the program from here on."""
  reader, writer = socket.socketpair()
  writer.setblocking(False)
  signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
  threading.Thread(target=_listen, args=(reader, writer), daemon=True).start()
  # Last, so that the thread hears of every signal that this handler gets.
  if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    # Not Python's own, which asyncio would replace for a while.
    signal.signal(signal.SIGINT, end_program)


def unwind_at_sigterm() -> None:
  """From here on SIGTERM ends the program as Ctrl-C does, with exit code 143.

  For programs that clean up; those that compile for long would end late.
  """
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def end_program(number, frame) -> None:
  """Handler of Ctrl-C: KeyboardInterrupt, which nobody else catches."""
  global _raised
  _raised = True
  raise KeyboardInterrupt


def stop_text(number, frame) -> None:
  """Handler of Ctrl-C: KeyboardInterrupt, after which the program goes on."""
  raise KeyboardInterrupt


def _listen(reader: socket.socket, writer: socket.socket) -> None:
  global _raised
  del writer  # as an argument it stays open as long as the thread runs
  last = {}  # time of the latest signal, by number
  while True:
    number = reader.recv(1)[0]
    if number not in (signal.SIGINT, signal.SIGTERM):
      continue
    now, handler = time.monotonic(), signal.getsignal(number)
    within = PATIENCE if handler is stop_text else math.inf
    again = now - last.get(number, -math.inf) < within
    last[number] = now
    if not again:
      second = select.select([reader], [], [], PATIENCE)[0]
      if handler is not end_program and not _raised:
        continue
      if signal.getsignal(number) is not end_program:
        if _raised:
          _raised = False
          del last[number]  # the new handler's first signal is yet to come
          if not second:
            signal.pthread_kill(threading.main_thread().ident, number)
        continue
    os.write(2, b"interrupted\n")
    os._exit(128 + number)
