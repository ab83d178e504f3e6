"""Collectives of a compiled TPU program: bytes, iterations, what hides them.

Reads the text of a scheduled program, in which the instructions of every
computation stand in the order in which they run. A collective is hidden where
a matrix product or a kernel runs between its start and its end. Four forms
are known: a plain instruction (the chip waits), a pair `-start`, `-done`
(collective permutes: XLA turns a gather and the product that reads it into a
ring of both), `async-start`, `async-done` around a computation (SparseCore),
and the fusions `AsyncCollectiveStart`, `AsyncCollectiveDone` (v5e).
"""

import dataclasses
import functools
import re

KINDS = (
  "all-gather all-reduce reduce-scatter all-to-all collective-permute"
).split()
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_INSTRUCTION = re.compile(r"  (ROOT )?%(?P<name>\S+) = (?P<rest>.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%(?P<name>\S+) \(.*\{$")
_COMPUTING = ("convolution", "dot")


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective instruction of a program."""

  kind: str  # one of KINDS
  part: str  # of the step: 'trunk forward', 'heads', ... as `_part` tells
  received: int  # bytes that a chip receives each time
  times: int  # in one step
  behind: int  # products and kernels that run between its start and its end

  @property
  def hidden(self) -> bool:
    """Whether any product or kernel runs between its start and its end."""
    return self.behind > 0


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  type: str
  opcode: str
  rest: str  # from the operands on

  @property
  def calls(self) -> list[str]:
    return re.findall(
      r"(?:calls|body|condition|to_apply)=%([^\s,)]+)", self.rest
    )

  @property
  def operands(self) -> list[str]:
    return re.findall(r"%([^\s,)]+)", self.rest.split("), ")[0])

  def attribute(self, pattern: str) -> str:
    found = re.search(pattern, self.rest)
    return found[1] if found else ""


def collectives(text: str) -> list[Collective]:
  """Every collective of a program; in loops, with the number of iterations.

  Args:
    text: a scheduled HLO module as the TPU compiler writes it.

  Raises:
    ValueError: the text is no such module, or a loop's iterations are unknown.
  """
  program = _Program(text)
  return list(program.walk(program.entry, 1))


class _Program:
  """Computations by name; `walk` goes through them as often as they run."""

  def __init__(self, text: str):
    self.entry, self.computations, current = None, {}, None
    for line in text.splitlines():
      if found := _COMPUTATION.match(line):
        current = self.computations.setdefault(found["name"], [])
        if line.startswith("ENTRY"):
          self.entry = found["name"]
      elif found := _INSTRUCTION.match(line):
        current.append(_parse(found["name"], found["rest"]))
    if self.entry is None or "is_scheduled=true" not in text[:10_000]:
      raise ValueError("the text is not a scheduled HLO module")
    self.computes = functools.cache(self._computes)

  def walk(self, computation: str, times: int):
    instructions = self.computations[computation]
    for place, instruction in enumerate(instructions):
      if instruction.opcode == "while":
        condition, body = (
          instruction.attribute(rf"{key}=%([^\s,)]+)")
          for key in ("condition", "body")
        )
        yield from self.walk(body, times * self.iterations(condition))
        continue
      inner = self.started(instruction)
      if inner is not None:
        end = self.end(instructions, place, inner)
        between = instructions[place + 1 : end]
        behind = sum(self.computes(i) for i in between)
        yield self.describe(inner, times, behind)
      elif instruction.opcode in ("call", "conditional", "fusion"):
        for name in instruction.calls:
          if not self.in_flight(name):
            yield from self.walk(name, times)
      elif instruction.opcode in KINDS:
        scattered = computation.startswith("all-reduce-scatter")
        yield self.describe(instruction, times, 0, scattered)

  def started(self, instruction: _Instruction) -> _Instruction | None:
    """The collective that `instruction` starts, if it starts one."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS and kind != instruction.opcode:
      return instruction
    asynchronous = instruction.opcode == "async-start"
    for name in instruction.calls:
      body = self.computations[name]
      if asynchronous or any("AsyncCollectiveStart" in i.rest for i in body):
        return self.first_collective(name)
    return None

  def first_collective(self, name: str) -> _Instruction | None:
    for instruction in self.computations[name]:
      if instruction.opcode in KINDS:
        return instruction
      for called in instruction.calls:
        if found := self.first_collective(called):
          return found
    return None

  def in_flight(self, name: str) -> bool:
    """A computation with a step, or the end, of a collective begun before."""
    return any(
      "async_collective_fusion_config" in i.rest
      for i in self.computations[name]
    )

  def end(self, instructions, place: int, inner: _Instruction) -> int:
    """Place of the instruction that waits for the one at `place`."""
    names, channel = {instructions[place].name}, _channel(inner)
    for i in range(place + 1, len(instructions)):
      instruction = instructions[i]
      if names & set(instruction.operands):
        if instruction.opcode.endswith("-done"):
          return i
        if instruction.opcode == "async-update":
          names.add(instruction.name)
      for name in instruction.calls if channel else ():
        body = self.computations[name]
        if any("AsyncCollectiveDone" in x.rest for x in body) and any(
          _channel(x) == channel for x in body
        ):
          return i
    raise ValueError(f"nothing waits for {instructions[place].name}")

  def _computes(self, instruction: _Instruction) -> bool:
    if instruction.opcode in _COMPUTING:
      return True
    if instruction.opcode == "custom-call":
      return "tpu_custom_call" in instruction.rest
    return any(
      self.computes(i)
      for name in instruction.calls
      for i in self.computations[name]
    )

  def iterations(self, condition: str) -> int:
    """Iterations of a loop whose counter runs from 0 in steps of 1."""
    constants = {
      i.name: i.rest for i in self.computations[condition]
      if i.opcode == "constant"
    }  # fmt: skip
    last = self.computations[condition][-1]
    if last.opcode == "compare" and "direction=LT" in last.rest:
      bound = constants.get(last.operands[-1], "")
      if found := re.match(r"\((\d+)\)", bound):
        return int(found[1])
    raise ValueError(
      f"cannot count the iterations of the loop with {condition}"
    )

  def describe(
    self, instruction, times: int, behind: int, scattered: bool = False
  ) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    arrays = _bytes(instruction.type)
    if kind != instruction.opcode:  # a start: operands, results, then flags
      arrays = [size for size in arrays if size > 4]
      arrays = arrays[len(arrays) // 2 :]
    result = sum(arrays)
    size = 1 if kind == "collective-permute" else _group(instruction.rest)
    if kind == "collective-permute":
      received = result
    elif scattered:  # an all-reduce of which a chip keeps its slice alone
      kind, received = "reduce-scatter", result * (size - 1) // size
    elif kind == "all-reduce":
      received = 2 * result * (size - 1) // size
    elif kind == "reduce-scatter":
      received = result * (size - 1)
    else:
      received = result * (size - 1) // size
    part = _part(instruction.attribute(r'op_name="([^"]*)"'))
    return Collective(kind, part, received, times, behind)


def _parse(name: str, rest: str) -> _Instruction:
  """'TYPE opcode(operands), attributes' in three."""
  depth = 0
  for end, letter in enumerate(rest):  # noqa: B007, it is used after
    depth += letter in "({["
    depth -= letter in ")}]"
    if letter == " " and not depth:
      break
  opcode, _, tail = rest[end + 1 :].partition("(")
  return _Instruction(name, rest[:end], opcode, f"({tail}")


def _bytes(type_: str) -> list[int]:
  """Bytes of each array in an instruction's type."""
  sizes = []
  for dtype, shape in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", type_):
    count = 1
    for size in shape.split(",") if shape else ():
      count *= int(size)
    sizes.append(count * _BYTES[dtype])
  return sizes


def _group(rest: str) -> int:
  """Chips that take part together."""
  if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return len(found[1].split(","))
  if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
    return int(found[1])
  if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
    sizes = dict(re.findall(r"('[^']+')=(\d+)", found[1]))
    group = 1
    for axis in re.findall(r"'[^']+'", found[2]):
      group *= int(sizes[axis])
    return group
  raise ValueError(f"cannot read the chips of {rest[:200]}")


def _channel(instruction: _Instruction) -> str:
  return instruction.attribute(r"channel_id=(\d+)")


def _part(op_name: str) -> str:
  """Where in the step, by the named scopes of model, loss and training."""
  for scope in ("update", "heads", "trunk"):
    if scope in op_name:
      if scope != "trunk":
        return scope
      return "trunk backward" if "transpose(" in op_name else "trunk forward"
  return "elsewhere"
