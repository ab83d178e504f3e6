"""Stages that end badly, for `test_accelerator.py`; nothing is imported."""

import os
import signal
import time


def crash(*arguments):
  os.kill(os.getpid(), signal.SIGABRT)


def hang(*arguments):
  time.sleep(600)


def fail(*arguments):
  raise MemoryError
