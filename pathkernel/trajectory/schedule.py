"""How much of each step is put on record, what that can serve, and what it costs.

These are values of the trajectory rather than of the recorder: whoever reads a path must be able to ask what was kept.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, ABCMeta, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pathkernel.errors import InputError, TrajectoryError
from pathkernel.trajectory.observer import StepObserver as StepObserver

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
    """Sizes that the cost of a record depends on.

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
    """Extent to which each step is kept."""

    @property
    @abstractmethod
    def serves(self) -> tuple[str, ...]:
        """Computations that such a record serves."""

    @property
    @abstractmethod
    def extra_compute(self) -> str:
        """Cost besides storage, and when it falls due."""

    @abstractmethod
    def bytes_per_step(self, run: RunSize) -> float:
        """Bytes stored for each step, before compression."""

    def working_bytes(self, run: RunSize) -> float:
        """Bytes held while the record is read."""
        return (2 + run.frozen) * run.vector

    @abstractmethod
    def require(self, asker: str) -> None:
        """Refuse an asker that this record cannot serve: one whose name is not among `serves`."""


class _Building(ABCMeta):
    """Lets ``Schedule(...)``, which is no level itself, make the one that its arguments name."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return level_of(*args, **kwargs) if cls is Schedule else super().__call__(*args, **kwargs)

    @property
    def __signature__(cls) -> inspect.Signature:
        """Signature of the constructor, which `__call__` hides."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class Schedule(RecordingLevel, metaclass=_Building):
    """A level of record: `Every`, `Keyframes`, `WeightsOnly` or `Nothing`, as one call makes them from settings.

    Parameters
    ----------
    every
        Keep θ at every so many steps: `Every`.
    keyframes
        Keep θ and the optimizer's state at every so many steps only: `Keyframes`.
    keep
        ``"steps"`` for all of a step, ``"weights"`` for θ alone (`WeightsOnly`), ``"nothing"`` (`Nothing`).

    Examples
    --------
    >>> import pathkernel as pk
    >>> pk.Schedule()
    Every()
    >>> pk.Schedule(every=10) == pk.Every(10)
    True
    >>> pk.Schedule.keyframes_for(10_000)
    Keyframes(100)
    """

    every = 1
    keyframes: int | None = None
    keep = "steps"
    weights_only = False
    """True where θ alone is kept."""

    def __init__(self, every: int = 1, keyframes: int | None = None, keep: str = "steps") -> None: ...

    @staticmethod
    def keyframes_for(steps: int) -> Keyframes:
        """Keyframes every √S steps, where stored keyframes and one block read back take the same memory."""
        if not _is_count(steps):
            raise InputError(
                f"`Schedule.keyframes_for({steps!r})` was called",
                "The expected number of optimizer steps is an integer from 1 upwards",
                "Write for example `Schedule.keyframes_for(epochs * len(loader))`",
            )
        return Keyframes(math.isqrt(steps))

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of `Schedule` that make this level, as headers of stores hold them."""
        return {"every": self.every, "keyframes": self.keyframes, "keep": self.keep}

    @property
    def serves(self) -> tuple[str, ...]:
        """Computations that such a record serves."""
        return ("PathKernel",) if self.weights_only else ("KernelMachine", "PathKernel", PRECONDITIONED)

    @property
    def extra_compute(self) -> str:
        """Cost besides storage, and when it falls due."""
        return "none"

    def bytes_per_step(self, run: RunSize) -> float:
        """Bytes stored for each step, before compression."""
        if self.weights_only:
            return run.vector / self.every + ID_BYTES * run.batch_size
        return (2 + run.frozen) * run.vector + run.batch

    def working_bytes(self, run: RunSize) -> float:
        """Bytes held while the record is read."""
        return run.vector if self.weights_only else super().working_bytes(run)

    def require(self, asker: str) -> None:
        """Refuse an asker that this record cannot serve.

        Raises
        ------
        TrajectoryError
            Where gradients are needed and θ alone was kept.
        """
        if asker in self.serves:
            return
        if self.every > 1:
            raise TrajectoryError(
                f"`{asker}` needs every step, but this trajectory was thinned with `{self!r}`",
                "A thinned path has neither the steps between nor their gradients",
                "Record again with `Every()`, or use `PathKernel`, which accepts a thinned path",
            )
        raise TrajectoryError(
            f"`{asker}` needs the gradients of every step, but `{self!r}` kept the weights alone",
            "Weights along the path serve `PathKernel` without a preconditioner, and analyses of the path",
            f"Record again with `Every()`, or with `Keyframes({KEYFRAMES})`, which takes less room",
        )


@dataclass(frozen=True, repr=False)
class Every(Schedule):
    """All of every step, or θ alone at every n-th.

    Parameters
    ----------
    n
        1 (default) keeps every step in full; more makes a thinned path of θ alone, whose steps join the points that
        were kept, for `PathKernel` and the analyses of a path.
    state
        What is kept of the optimizer's state: ``"rule"``, that from which its update rule is found.
    """

    n: int = 1
    state: str = "rule"

    def __post_init__(self) -> None:
        if not _is_count(self.n):
            raise InputError(
                f"`Every({self.n!r})` was given",
                "A step is kept every so many, an integer from 1 upwards",
                "Write `Every()` for every step, `Every(10)` for every tenth point of the path",
            )
        if self.state != "rule":
            raise InputError(
                f"`Every(state={self.state!r})` was given",
                "What is kept of the optimizer's state is what its update rule needs",
                'Write `Every(state="rule")`; `Keyframes(32)` keeps whole states at keyframes',
            )

    @property
    def every(self) -> int:  # type: ignore[override]
        """Steps from one point that is kept to the next."""
        return self.n

    @property
    def weights_only(self) -> bool:  # type: ignore[override]
        """True where θ alone is kept."""
        return self.n > 1

    def __repr__(self) -> str:
        return "Every()" if self.n == 1 else f"Every({self.n})"


@dataclass(frozen=True, repr=False)
class Keyframes(Schedule):
    """θ and the optimizer's state at every n-th step, and of the steps between just their batches and settings.

    Whoever reads these trains them again, checked bit for bit. Serves everything. √S is the best choice for a run of S
    steps; see `Schedule.keyframes_for`.

    Parameters
    ----------
    n
        Steps from one keyframe to the next.
    """

    n: int

    def __post_init__(self) -> None:
        if not _is_count(self.n):
            raise InputError(
                f"`Keyframes({self.n!r})` was given",
                "The number of steps from one keyframe to the next is an integer from 1 upwards",
                f"Write `Keyframes({KEYFRAMES})`, or `Schedule.keyframes_for(steps)`",
            )

    @property
    def keyframes(self) -> int:  # type: ignore[override]
        """Steps from one keyframe to the next."""
        return self.n

    @property
    def extra_compute(self) -> str:
        """Cost besides storage, and when it falls due."""
        return "reading: trains every step once more"

    def bytes_per_step(self, run: RunSize) -> float:
        """Bytes stored for each step, before compression."""
        return (1 + run.statistics) * run.vector / self.n + run.batch + NOTE_BYTES

    def working_bytes(self, run: RunSize) -> float:
        """Bytes held while the record is read: two blocks of replayed steps, since sweeps look at neighbours."""
        return (2 * self.n * (2 + run.frozen) + 2 + run.statistics) * run.vector

    def __repr__(self) -> str:
        return f"Keyframes({self.n})"


@dataclass(frozen=True)
class WeightsOnly(Schedule):
    """θ at every step, which a store on disk keeps as lossless differences."""

    keep = "weights"
    weights_only = True


@dataclass(frozen=True)
class Nothing(Schedule):
    """No step: only the recorder's ``observers=`` see them."""

    keep = "nothing"

    @property
    def serves(self) -> tuple[str, ...]:
        """Nobody."""
        return ()

    def bytes_per_step(self, run: RunSize) -> float:
        """Zero."""
        return 0.0

    def require(self, asker: str) -> None:
        """Refuse: there is no record.

        Raises
        ------
        TrajectoryError
            Always.
        """
        watched = ", ".join(self.serves) or "nothing"
        raise TrajectoryError(
            f"`{asker}` needs the recorded path, but this one was streamed with `{type(self).__name__}(...)` and not "
            "stored",
            f"What streamed along is {watched}, for the queries that were fixed in advance",
            f"Ask the observers for their results, or record again with `Keyframes({KEYFRAMES})`",
        )


def level_of(every: int = 1, keyframes: int | None = None, keep: str = "steps") -> Schedule:
    """The level of record that arguments of `Schedule` name.

    Raises
    ------
    InputError
        For a level that there is not, or two at once.
    """
    if keep not in KEEPS:
        raise InputError(
            f"`Schedule(keep={keep!r})` was given",
            'What is kept is all of the "steps", the "weights" alone, or "nothing"',
            "Write `WeightsOnly()`",
        )
    if keyframes is None and keep == "nothing" and every == 1:
        return Nothing()
    if keyframes is None and keep != "nothing":
        return WeightsOnly() if keep == "weights" and every == 1 else Every(every)
    if keyframes is not None and every == 1 and keep == "steps":
        return Keyframes(keyframes)
    raise InputError(
        f"`Schedule(every={every!r}, keyframes={keyframes!r}, keep={keep!r})` was given",
        "Steps between keyframes are trained again, which needs all of them; a thinned path leaves steps out",
        f"Write one of `Every({every!r})`, `Keyframes({KEYFRAMES})`, `WeightsOnly()` and `Nothing()`",
    )


KEEPS = ("steps", "weights", "nothing")

EVERY_STEP = Every()
"""All of every step."""


@dataclass(frozen=True)
class Streaming(Nothing):
    """No step, and who looks on in place of a record: `Nothing` with ``observers=`` in one value.

    Parameters
    ----------
    observers
        `pathkernel.StreamingShares`, `pathkernel.StreamingGram`, `pathkernel.StreamingFeatures`, or your own.
    """

    observers: tuple[StepObserver, ...]

    def __init__(self, *observers: StepObserver) -> None:
        if not observers or not all(isinstance(observer, StepObserver) for observer in observers):
            raise InputError(
                f"`Streaming({', '.join(type(observer).__name__ for observer in observers)})` was given",
                "Without storage somebody has to look on: a `StreamingShares`, a `StreamingGram` or another "
                "`StepObserver`",
                "Write for example `KernelRecorder(..., observers=[StreamingGram(X_train)], schedule=Nothing())`",
            )
        object.__setattr__(self, "observers", observers)

    @property
    def serves(self) -> tuple[str, ...]:
        """Computations that such a record serves."""
        return tuple(dict.fromkeys(observer.name for observer in self.observers))

    @property
    def extra_compute(self) -> str:
        """Cost besides storage, and when it falls due."""
        return "training: what its observers compute at every step"


def as_schedule(schedule: RecordingLevel | None, observers: Sequence[StepObserver] = ()) -> RecordingLevel:
    """A level of record with those who look on; None stands for every step in full.

    Raises
    ------
    InputError
        For anything else, and where nothing is kept and nobody looks on.
    """
    for observer in observers:
        if not isinstance(observer, StepObserver):
            raise InputError(
                f"A {type(observer).__name__} was given among `observers`",
                "Observers are a `StreamingShares`, a `StreamingGram` or another `StepObserver`",
                "Write for example `KernelRecorder(..., observers=[StreamingGram(X_train)])`",
            )
    if schedule is None:
        return EVERY_STEP
    if not isinstance(schedule, RecordingLevel):
        raise InputError(
            f"`schedule={schedule!r}` was given",
            "A level of record is `Every(n)`, `Keyframes(n)`, `WeightsOnly()` or `Nothing()`",
            f"Write for example `schedule=Keyframes({KEYFRAMES})`",
        )
    if isinstance(schedule, Nothing):
        return Streaming(*observers, *getattr(schedule, "observers", ()))
    return schedule
