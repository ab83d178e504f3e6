"""What several test files need: processes with devices of their own."""

import gc
import os
import pathlib
import signal
from importlib import metadata

import forked
import pytest

ROOT = pathlib.Path(__file__).parents[1]

# XLA optimises as ever; LLVM, which takes most of the time to compile on a
# CPU and changes neither the memory nor the FLOPs of a program, does not.
# jaxlib 0.10's older fusion emitters and one LLVM module per program halve
# that time again. XLA_FLAGS overrides this; see Decisions, Testing, in
# BUILD.md.
QUICK = "--xla_backend_optimization_level=0"
QUICK += " --xla_cpu_parallel_codegen_split_count=1"
if metadata.version("jaxlib").startswith("0.10."):
  QUICK += " --xla_cpu_use_fusion_emitters=false"
# A shell ignores Ctrl-C for what it runs in the background, and for all that
# this starts. Tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"


@pytest.fixture(autouse=True, scope="session")
def imports_are_not_scanned():
  """Saves a twelfth of tracing, in which Python collects garbage often."""
  gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def leave_no_trace():
  """A file's compiled programs go with it, and XLA_FLAGS comes back.

  Each program holds some memory maps, of which Linux allows a process 65,530;
  most likely that is why the compiler once crashed behind hundreds of tests.
  `aot.topology` takes the flags away, and other files' programs want them.
  """
  import jax  # not above: it would read the environment too early

  jax.jit(lambda: 0)()  # jaxlib has read the flags
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    yield
  jax.clear_caches()


@pytest.fixture
def run_with_devices():
  """Runs a program on CPU devices and returns what it prints."""

  def run(devices: int, program: str, *arguments: str, **variables: str) -> str:
    count = f"--xla_force_host_platform_device_count={devices}"
    variables["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} {count}"
    process = forked.Process(["-c", program, *arguments], **variables)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    return out

  return run


@pytest.fixture(scope="session")
def call():
  """Calls a program; gives its exit code, output and errors."""

  def call(*arguments, module="experiments.train"):
    program = [module] if module.endswith(".py") else ["-m", module]
    process = forked.Process([*program, *arguments])
    out, err = process.communicate()
    return process.returncode, out, err

  return call
