"""`StepObserver`: who looks on while training runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from pathkernel.errors import TrajectoryError
from pathkernel.trajectory.step import Step


class StepObserver(ABC):
    """Takes what it needs from every step while training runs; nothing has to be stored for it.

    Tensors and settings of a step are those of the record: an observer may keep them, and does not write on them. When
    recording goes on after a break, `begin` is called again with the same trajectory.
    """

    name: ClassVar[str]
    """What it serves."""

    needs_whole_run: ClassVar[bool] = True
    """Whether it adds something up over the run: it has to see every step from the first on, and to know beforehand how
    many training samples there are. Observers that need neither may join a run that goes on from disk."""

    _missed: int | None = None

    @abstractmethod
    def begin(self, trajectory: Any, settings: tuple[Mapping[str, Any], ...]) -> None:
        """Recording begins at ``trajectory.initial``, under these settings of the optimizer; refuse what cannot be."""

    @abstractmethod
    def observe(self, step: Step) -> None:
        """Take note of a step as it is taken, its changes from outside included."""

    def missed(self, step: Step) -> None:
        """Take note that `observe` ended in an error: the first such step is remembered for `require_whole`."""
        self._missed = step.index if self._missed is None else self._missed

    def require_whole(self) -> None:
        """Refuse a result over a path of which a step is missing.

        Raises
        ------
        TrajectoryError
            With the first step of which `observe` ended in an error.
        """
        if self._missed is not None:
            raise TrajectoryError(
                f"`{type(self).__name__}` was asked for its result, and its `observe` ended in an error at step "
                f"{self._missed}",
                "A result is added up over every step of the path",
                "Mend what the error said and record again, or ask a recorded trajectory in place of the observer",
            )
