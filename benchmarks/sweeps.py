"""Which problems are measured, and who takes part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from .losses import CONTESTANTS, FLOOR
from .problems import LAYOUTS, Problem
from .timing import Effort

BACKENDS = tuple(name for name, contestant in CONTESTANTS.items() if contestant.backend)
EVERYONE = tuple(CONTESTANTS)
EAGER = tuple(name for name, contestant in CONTESTANTS.items() if not contestant.compiled)
ONE_COMPILED = tuple(name for name in EVERYONE if name != "compiled plain")
EXACT = (*BACKENDS, "port", "eager", FLOOR)
LEAN = (*BACKENDS, "eager", FLOOR)
OWN = (*BACKENDS, FLOOR)


@dataclass(frozen=True)
class Sweep:
    """Problems that differ in one respect."""

    name: str
    what: str
    problems: tuple[Problem, ...]
    contestants: tuple[str, ...]
    memory: bool = False  #: measured for every contestant, not for the backends alone


@dataclass(frozen=True)
class Plan:
    """Everything that a run measures, and how long it may take over it."""

    sweeps: tuple[Sweep, ...]
    fast: Effort  #: for calls of less than SLOW_CALL
    slow: Effort
    slowest: float  #: seconds of a call that is still worth waiting for
    steps: int  #: training steps of the demo
    extras: bool = True  #: bytes between ranks, and training steps of the demo
    rotated_bytes: int | None = None  #: of inputs in turn; None: a quarter more than the last-level cache

    SLOW_CALL = 1.0

    def effort(self, seconds: float) -> Effort:
        return self.slow if seconds > self.SLOW_CALL else self.fast


def square(exponent: int, channels: int, classes: int, name: str = "", **more: object) -> Problem:
    """A map of 2^exponent pixels."""
    height = 2 ** (exponent // 2)
    shape = (1, channels, height, 2**exponent // height)
    return Problem(name or f"2^{exponent} pixels", shape, classes, **more)


def crops(batch: int) -> Iterable[Problem]:
    yield Problem("Cityscapes", (batch // 2, 256, 128, 256), 19)
    yield Problem("ADE20K", (batch, 256, 128, 128), 150)
    yield Problem("COCO-Stuff", (batch, 256, 128, 128), 171)
    yield Problem("3-D medical", (1, 32, 64, 128, 128), 4)


def negatives(shape: tuple[int, ...], classes: int, counts: Iterable[int | None]) -> Iterable[Problem]:
    for count in counts:
        yield Problem(f"K = {classes}, {count or 'all'} negatives", shape, classes, num_negatives=count)


def forms(shape: tuple[int, ...], classes: int) -> tuple[Problem, ...]:
    pixels = shape[0] * shape[2] * shape[3]
    maps = (Problem(name.replace("_", " "), shape, classes, layout=name) for name in LAYOUTS)
    return (*maps, Problem("rows (N, D)", (pixels, shape[1]), classes))


def every_respect(
    real: Iterable[Problem],
    crop: tuple[int, ...],
    exponents: Iterable[int],
    exponent: int,
    channels: Iterable[int],
    classes: Iterable[int],
    sampled: Iterable[tuple[int, Iterable[int | None]]],
    small: tuple[str, ...],
    exact: tuple[str, ...],
    lean: tuple[str, ...],
) -> tuple[Sweep, ...]:
    """A sweep for each respect in which problems differ: around ``crop``, and around a map of 2^exponent pixels."""
    pixels = crop[0] * crop[2] * crop[3]
    dtypes = ("float32", "bfloat16", "float16", "float64")
    drawn = tuple(problem for k, counts in sampled for problem in negatives(crop, k, counts))
    return (
        Sweep("crops", "real use", tuple(real), EVERYONE, memory=True),
        Sweep("pixels", "D = 32, K = 19", tuple(square(n, 32, 19) for n in exponents), small, memory=True),
        Sweep(
            "channels",
            f"K = 19, 2^{exponent} pixels",
            tuple(square(exponent, d, 19, f"D = {d}") for d in channels),
            LEAN,
        ),
        Sweep(
            "classes",
            f"D = 256, 2^{exponent} pixels",
            tuple(square(exponent, 256, k, f"K = {k}") for k in classes),
            exact,
        ),
        Sweep("dtypes", f"{crop}, K = 19", tuple(Problem(d, crop, 19, dtype=d) for d in dtypes), lean),
        Sweep("layouts", f"{pixels:,} pixels, D = 256, K = 19", forms(crop, 19), OWN),
        Sweep("negatives", f"{crop}", drawn, OWN),
    )


def full() -> Plan:
    """About a quarter of an hour on two cores."""
    counts = (None, 256, 1024, 4096, 16384, 65536)
    return Plan(
        every_respect(
            real=(*crops(4), Problem("large map", (2, 64, 512, 512), 19)),
            crop=(4, 256, 128, 128),
            exponents=(12, 13, 14, 16, 18, 20, 22),
            exponent=15,
            channels=(32, 64, 128, 256, 512, 768),
            classes=(2, 19, 150, 1000),
            sampled=((19, counts), (150, counts)),
            small=ONE_COMPILED,
            exact=EXACT,
            lean=LEAN,
        ),
        fast=Effort(1.2, 5, 20),
        slow=Effort(4.0, 2, 5),
        slowest=30,
        steps=30,
    )


def quick() -> Plan:
    """Under three minutes on two cores: smaller batches, fewer of everything, the compiled forms on one problem."""
    return Plan(
        every_respect(
            real=(next(iter(crops(2))),),
            crop=(1, 256, 128, 128),
            exponents=(12, 15, 18),
            exponent=14,
            channels=(32, 768),
            classes=(2, 150, 1000),
            sampled=((150, (None, 256, 4096)),),
            small=EAGER,
            exact=LEAN,
            lean=OWN,
        ),
        fast=Effort(0.3, 3, 7),
        slow=Effort(0, 1, 1),
        slowest=6,
        steps=5,
    )


def gpu() -> Plan:
    """Two minutes on a large GPU, on which every problem here is several times its L2 cache: real use in two dtypes."""
    large = Problem("large map", (2, 64, 1024, 1024), 19)
    volume = Problem("3-D medical", (2, 32, 64, 128, 128), 4)
    problems = (*(p for p in crops(16) if p.name != volume.name), volume, large)
    in_bfloat16 = tuple(dataclasses.replace(p, dtype="bfloat16") for p in problems)
    return Plan(
        (
            Sweep("crops", "real use", problems, ONE_COMPILED),
            Sweep("crops, bfloat16", "real use", in_bfloat16, ONE_COMPILED),
        ),
        fast=Effort(0.1, 5, 20),
        slow=Effort(0, 1, 1),
        slowest=3,
        steps=0,
        extras=False,
    )


def tiny() -> Plan:
    """Seconds: for the tests of the suite itself."""
    crop = (1, 8, 8, 12)
    return Plan(
        (
            Sweep("crops", "tiny", (Problem("Cityscapes", crop, 5),), EAGER, memory=True),
            Sweep("pixels", "tiny", tuple(square(n, 4, 3) for n in (5, 7)), LEAN, memory=True),
            Sweep("dtypes", "tiny", tuple(Problem(d, crop, 5, dtype=d) for d in ("float32", "bfloat16")), OWN),
            Sweep("layouts", "tiny", forms(crop, 5), OWN),
            Sweep("negatives", "tiny", tuple(negatives(crop, 5, (None, 16))), OWN),
        ),
        fast=Effort(0.01, 2, 3),
        slow=Effort(0, 1, 1),
        slowest=6,
        steps=1,
        rotated_bytes=1 << 20,
    )


PLANS = {"full": full, "quick": quick, "gpu": gpu, "tiny": tiny}
