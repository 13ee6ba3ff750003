"""What PTX text is made of: instructions, their operands, functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .parser import FunctionParser
    from .program import Program
    from .run import Run

    Step = Callable[[Run], None]  # executes one instruction for the active threads of a run


class Fault(Exception):
    """What went wrong in a kernel; `line` is the line of the PTX text."""

    line: int | None = None


@dataclass(frozen=True)
class Reg:
    """A register of the kernel, by number."""

    index: int
    type: str


@dataclass(frozen=True)
class Imm:
    """A constant, as it is written."""

    text: str


@dataclass(frozen=True)
class Special:
    """A special register, as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A variable or parameter."""

    name: str


@dataclass(frozen=True)
class Mem:
    """[base + offset]"""

    base: object
    offset: int


@dataclass(frozen=True)
class Vec:
    """{a, b, ...}"""

    items: tuple


@dataclass(frozen=True)
class Not:
    """!a"""

    item: object


@dataclass(frozen=True)
class Minus:
    """-a"""

    item: object


@dataclass(frozen=True)
class Pair:
    """a|b"""

    first: object
    second: object


@dataclass(frozen=True)
class Sink:
    """_, a result that nobody wants"""


class Instruction:
    """One instruction: `op`, its dotted modifiers `mods` (op not included), operands `args`, guard predicate."""

    __slots__ = ("op", "mods", "args", "pred", "negate", "line", "text", "target", "kind", "run", "store")

    def __init__(
        self,
        op: str,
        mods: tuple[str, ...],
        args: tuple[Any, ...],
        line: int,
        text: str,
        pred: Reg | None = None,
        negate: bool = False,
    ) -> None:
        self.op, self.mods, self.args, self.line, self.text = op, mods, args, line, text
        self.pred, self.negate = pred, negate
        self.target = None  # where a branch goes: a label, then an index of the code
        self.kind = None  # how the scheduler treats it, see scheduler.py
        self.run: Step | None = None  # decoded, see instructions.py
        self.store = None  # the scopes in which a branch's label is looked up

    def copy(self) -> Instruction:
        new = Instruction(self.op, self.mods, self.args, self.line, self.text, self.pred, self.negate)
        new.target = self.target
        return new


@dataclass
class Function:
    name: str
    is_kernel: bool
    params: list = field(default_factory=list)  # (name, type, bytes)
    returns: list = field(default_factory=list)
    code: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    tables: dict = field(default_factory=dict)  # .branchtargets
    registers: list = field(default_factory=list)  # type of each register
    variables: list = field(default_factory=list)  # (space, align, name, bytes)
    reqntid: tuple[int, ...] | None = None
    body: FunctionParser | None = None  # fills the fields above; None of what is declared alone: vprintf, malloc ...
    program: Program | None = None  # filled at the first launch
