"""What became of an injected fault, and the rows of the table."""

from __future__ import annotations

import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SURVIVED, LOST, WRONG, FAILED = "survived", "lost", "silently wrong", "failed"


@dataclass(frozen=True)
class Outcome:
    """Of one injected fault.

    Attributes
    ----------
    verdict
        SURVIVED: everything that was promised is there, or the user is told what is not. LOST: more is gone than the
        stated bound. WRONG: something else than what was recorded was read, and nobody was told. FAILED: anything
        else, such as a crash, or an error of the wrong kind.
    gets
        What the user sees.
    amount
        Steps that were lost within the bound.
    """

    verdict: str
    gets: str
    amount: int = 0


@dataclass(frozen=True)
class Bench:
    """What every fault is given: the size of the run, a source of randomness, and a folder."""

    quick: bool
    random: random.Random
    folder: Path

    def count(self, quick: int, full: int) -> int:
        return quick if self.quick else full

    def place(self) -> Path:
        """A path that does not exist yet."""
        return self.folder / f"{self.random.getrandbits(64):016x}"


@dataclass(frozen=True)
class Fault:
    """A kind of fault: its name, what may be lost by it, and the trials, each of which does the harm and looks."""

    name: str
    bound: str
    trials: Callable[[Bench], Iterator[Outcome]]


@dataclass
class Tally:
    """The outcomes of one kind of fault."""

    fault: Fault
    outcomes: list[Outcome] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def of(cls, fault: Fault, bench: Bench) -> Tally:
        tally, start = cls(fault), time.perf_counter()
        tally.outcomes.extend(fault.trials(bench))
        tally.seconds = time.perf_counter() - start
        return tally

    @property
    def good(self) -> bool:
        return bool(self.outcomes) and all(outcome.verdict == SURVIVED for outcome in self.outcomes)

    def row(self) -> dict[str, Any]:
        verdicts = Counter(outcome.verdict for outcome in self.outcomes)
        return {
            "fault": self.fault.name,
            "trials": len(self.outcomes),
            "survived": verdicts[SURVIVED],
            "lost": verdicts[LOST],
            "silently_wrong": verdicts[WRONG],
            "failed": verdicts[FAILED],
            "most_lost": max((outcome.amount for outcome in self.outcomes), default=0),
            "bound": self.fault.bound,
            "user_gets": self.gets,
            "seconds": round(self.seconds, 1),
        }

    @property
    def gets(self) -> str:
        """The most frequent of what users saw, with numbers of times."""
        seen = Counter(re.sub(r"/\S*/", "…/", outcome.gets) for outcome in self.outcomes)
        shown = [f"{text} ({times}×)" if len(seen) > 1 else text for text, times in seen.most_common(4)]
        return "; ".join([*shown, f"and {len(seen) - 4} others"] if len(seen) > 4 else shown)

    def problems(self) -> list[str]:
        bad = Counter(f"{o.verdict}: {o.gets}" for o in self.outcomes if o.verdict != SURVIVED)
        return [f"{text} ({times}×)" for text, times in bad.most_common(5)]


def first_sentence(error: BaseException, length: int = 110) -> str:
    """The kind of an error and the first of its parts."""
    text = str(getattr(error, "found", error))
    return f"{type(error).__name__}: {text[:length]}{'…' if len(text) > length else ''}"
