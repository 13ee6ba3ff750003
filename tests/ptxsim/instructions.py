"""Finds the function that decodes an instruction, ``op_<name>`` of one of the modules below, and runs what it made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import (
    arithmetic,
    async_copies,
    atomics,
    bits,
    comparisons,
    control,
    conversions,
    fragments,
    loads_stores,
    tensor_cores,
    warp,
)
from .syntax import Fault, Instruction

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step

MODULES = (
    arithmetic,
    async_copies,
    atomics,
    bits,
    comparisons,
    control,
    conversions,
    fragments,
    loads_stores,
    tensor_cores,
    warp,
)
DECODERS = {
    name.removeprefix("op_"): function
    for module in MODULES
    for name, function in vars(module).items()
    if name.startswith("op_")
}


def execute_instruction(run: Run, instruction: Instruction) -> None:
    """Runs it for the active threads; decoded the first time."""
    if instruction.run is None:
        instruction.run = decode(instruction)
    instruction.run(run)


def decode(instruction: Instruction) -> Step:
    """The function of the Run that executes it; Fault by name if it is not supported."""
    decoder = DECODERS.get(instruction.op)
    if decoder is None:
        raise Fault(f"instruction {instruction.op} is not implemented")
    try:
        return decoder(instruction)
    except (KeyError, IndexError, StopIteration, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise Fault(f"this form of {instruction.op} is not implemented ({what})") from error
