"""How much of each step is put on record, what that can serve, and what it costs.

These are values of the trajectory rather than of the recorder: whoever reads a path must be able to ask what was kept.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pathkernel.errors import InputError, TrajectoryError, check
from pathkernel.trajectory.step import Step

KEYFRAMES = 32
"""Steps from one keyframe to the next where the length of the run is not known: about √S for a thousand steps."""

PRECONDITIONED = 'PathKernel(preconditioner="optimizer")'
"""Who else asks: what the optimizer scaled its gradients by is not on record where θ alone is."""

ID_BYTES, NOTE_BYTES, GENERATOR_BYTES = 8, 32, 5056
"""One sample id; checksums, keyframe and divisor of a replayed step; one state of torch's generator on the CPU."""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class RunSize:
    """What the cost of a record depends on.

    Attributes
    ----------
    parameters
        P.
    steps
        S.
    batch_size
        Samples per step.
    bytes_per_number
        4 for float32.
    statistics
        Numbers that the optimizer keeps for each parameter: 0 for SGD, 1 with momentum, 2 for Adam.
    frozen
        Numbers for each parameter that one step freezes: 0 for SGD, 1 for Adam (its denominator).
    random
        Whether forward passes draw random numbers (dropout).
    """

    parameters: int
    steps: int
    batch_size: int = 64
    bytes_per_number: int = 4
    statistics: float = 2.0
    frozen: float = 1.0
    random: bool = False

    @property
    def vector(self) -> int:
        """Bytes of one θ."""
        return self.parameters * self.bytes_per_number

    @property
    def batch(self) -> int:
        """Bytes that tell which samples a step saw, and how."""
        return ID_BYTES * self.batch_size + (GENERATOR_BYTES if self.random else 0)


class RecordingLevel(ABC):
    """What is kept of each step."""

    @property
    @abstractmethod
    def serves(self) -> tuple[str, ...]:
        """What can be computed from such a record."""

    @property
    @abstractmethod
    def extra_compute(self) -> str:
        """What it costs besides storage, and when."""

    @abstractmethod
    def bytes_per_step(self, run: RunSize) -> float:
        """Bytes stored for each step, before compression."""

    def working_bytes(self, run: RunSize) -> float:
        """Bytes held while the record is read."""
        return (2 + run.frozen) * run.vector

    @abstractmethod
    def require(self, asker: str) -> None:
        """Refuse an asker that this record cannot serve: one whose name is not among `serves`."""


@dataclass(frozen=True)
class Schedule(RecordingLevel):
    """What is kept, and when.

    Parameters
    ----------
    every
        Keep θ at every so many steps. 1 (default) keeps every step; more makes a thinned path of θ alone, whose steps
        join the points that were kept, for `PathKernel` and the analyses of a path.
    keyframes
        Keep θ and the optimizer's state at every so many steps only, and of the steps between just their batches and
        settings: whoever reads them trains them again, checked bit for bit. Serves everything. √S is the best
        choice for a run of S steps; see `keyframes_for`.
    keep
        ``"steps"`` for all of a step, ``"weights"`` for θ alone, which a store on disk keeps as lossless differences.

    Examples
    --------
    >>> import pathkernel as pk
    >>> pk.Schedule()
    Schedule(every=1)
    >>> pk.Schedule.keyframes_for(10_000)
    Schedule(keyframes=100)
    """

    every: int = 1
    keyframes: int | None = None
    keep: str = "steps"

    KEEPS: ClassVar[tuple[str, str]] = ("steps", "weights")

    def __post_init__(self) -> None:
        check(
            _is_count(self.every),
            InputError,
            f"`Schedule(every={self.every!r})` was given",
            "`every` is an integer from 1 upwards",
            "Write `Schedule(every=1)` for every step, `Schedule(every=10)` for every tenth point of the path",
        )
        check(
            self.keyframes is None or _is_count(self.keyframes),
            InputError,
            f"`Schedule(keyframes={self.keyframes!r})` was given",
            "`keyframes` is the number of steps from one keyframe to the next, an integer from 1 upwards",
            f"Write `Schedule(keyframes={KEYFRAMES})`, or `Schedule.keyframes_for(steps)`",
        )
        check(
            self.keep in self.KEEPS,
            InputError,
            f"`Schedule(keep={self.keep!r})` was given",
            'What is kept is all of the "steps" or the "weights" alone',
            'Write `Schedule(keep="weights")`',
        )
        check(
            self.keyframes is None or (self.every == 1 and self.keep == "steps"),
            InputError,
            f"`{self!r}` was given",
            "Steps between keyframes are trained again, which needs all of them; a thinned path leaves steps out",
            f"Write `Schedule(keyframes={self.keyframes})`, or leave `keyframes` out",
        )

    @classmethod
    def keyframes_for(cls, steps: int) -> Schedule:
        """Keyframes every √S steps, where stored keyframes and one block read back take the same memory."""
        check(
            _is_count(steps),
            InputError,
            f"`Schedule.keyframes_for({steps!r})` was called",
            "The expected number of optimizer steps is an integer from 1 upwards",
            "Write for example `Schedule.keyframes_for(epochs * len(loader))`",
        )
        return cls(keyframes=math.isqrt(steps))

    @property
    def weights_only(self) -> bool:
        """Whether θ alone is kept."""
        return self.every > 1 or self.keep == "weights"

    @property
    def serves(self) -> tuple[str, ...]:
        """What can be computed from such a record."""
        return ("PathKernel",) if self.weights_only else ("KernelMachine", "PathKernel", PRECONDITIONED)

    @property
    def extra_compute(self) -> str:
        """What it costs besides storage, and when."""
        if self.keyframes is None:
            return "none"
        return "reading: trains every step once more"

    def bytes_per_step(self, run: RunSize) -> float:
        """Bytes stored for each step, before compression."""
        if self.keyframes is not None:
            return (1 + run.statistics) * run.vector / self.keyframes + run.batch + NOTE_BYTES
        if self.weights_only:
            return run.vector / self.every + ID_BYTES * run.batch_size
        return (2 + run.frozen) * run.vector + run.batch

    def working_bytes(self, run: RunSize) -> float:
        """Bytes held while the record is read: two blocks of replayed steps, since sweeps look at neighbours."""
        if self.keyframes is not None:
            return (2 * self.keyframes * (2 + run.frozen) + 2 + run.statistics) * run.vector
        return run.vector if self.weights_only else super().working_bytes(run)

    def require(self, asker: str) -> None:
        """Refuse an asker that this record cannot serve.

        Raises
        ------
        TrajectoryError
            Where gradients are needed and θ alone was kept.
        """
        if self.every > 1 and asker not in self.serves:
            raise TrajectoryError(
                f"`{asker}` needs every step, but this trajectory was thinned with `{self!r}`",
                "A thinned path has neither the steps between nor their gradients",
                "Record again with `Schedule(every=1)`, or use `PathKernel`, which accepts a thinned path",
            )
        check(
            asker in self.serves,
            TrajectoryError,
            f"`{asker}` needs the gradients of every step, but `{self!r}` kept the weights alone",
            "Weights along the path serve `PathKernel` without a preconditioner, and analyses of the path",
            "Record again with `Schedule(every=1)`, or with `Schedule(keyframes=32)`, which takes less room",
        )

    def __repr__(self) -> str:
        given = {"every": self.every, "keyframes": self.keyframes, "keep": self.keep}
        plain = {"every": 1, "keyframes": None, "keep": "steps"}
        shown = {name: value for name, value in given.items() if value != plain[name]} or {"every": 1}
        return f"Schedule({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


EVERY_STEP = Schedule()
"""All of every step."""


class StepObserver(ABC):
    """Takes what it needs from every step while training runs; nothing has to be stored for it."""

    name: ClassVar[str]
    """What it serves."""

    @abstractmethod
    def begin(self, trajectory: Any, settings: tuple[Mapping[str, Any], ...]) -> None:
        """Recording begins at ``trajectory.initial``, under these settings of the optimizer; refuse what cannot be."""

    @abstractmethod
    def observe(self, step: Step) -> None:
        """See a step as it is taken, its changes from outside included."""


@dataclass(frozen=True)
class Streaming(RecordingLevel):
    """Nothing is stored: observers with a query set that is fixed in advance see every step once.

    Parameters
    ----------
    observers
        `pathkernel.StreamingShares`, `pathkernel.StreamingGram`, `pathkernel.StreamingFeatures`, or your own.
    """

    observers: Sequence[StepObserver]

    def __init__(self, *observers: StepObserver) -> None:
        check(
            len(observers) > 0 and all(isinstance(observer, StepObserver) for observer in observers),
            InputError,
            f"`Streaming({', '.join(type(observer).__name__ for observer in observers)})` was given",
            "Without storage somebody has to look on: a `StreamingShares`, a `StreamingGram` or another `StepObserver`",
            "Write for example `Streaming(StreamingGram(X_train))`",
        )
        object.__setattr__(self, "observers", observers)

    @property
    def serves(self) -> tuple[str, ...]:
        """What can be computed from such a record."""
        return tuple(dict.fromkeys(observer.name for observer in self.observers))

    @property
    def extra_compute(self) -> str:
        """What it costs besides storage, and when."""
        return "training: what its observers compute at every step"

    def bytes_per_step(self, run: RunSize) -> float:
        """Nothing."""
        return 0.0

    def require(self, asker: str) -> None:
        """Refuse: there is no record.

        Raises
        ------
        TrajectoryError
            Always.
        """
        raise TrajectoryError(
            f"`{asker}` needs the recorded path, but this one was streamed with `Streaming(...)` and not stored",
            f"What streamed along is {', '.join(self.serves)}, for the queries that were fixed in advance",
            "Ask the observers for their results, or record again with `Schedule(keyframes=32)`",
        )


def as_schedule(schedule: RecordingLevel | None) -> RecordingLevel:
    """A level of record; None stands for every step in full.

    Raises
    ------
    InputError
        For anything else.
    """
    if schedule is None:
        return EVERY_STEP
    check(
        isinstance(schedule, RecordingLevel),
        InputError,
        f"`schedule={schedule!r}` was given",
        "A schedule is a `Schedule` or a `Streaming`",
        f"Write for example `schedule=Schedule(keyframes={KEYFRAMES})`",
    )
    return schedule
