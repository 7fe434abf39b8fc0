"""`Row`: a quantity that theory says, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A measured number beside the one that theory gives.

    Attributes
    ----------
    quantity
        What it is, in words; the part before the colon names the subject.
    measured, expected
        The two numbers.
    tolerance
        How far apart they may be: an absolute number. An error that only has to be small is expected to be 0.
    ok
        Whether they are that close; NaN never is.
    """

    quantity: str
    measured: float
    expected: float
    tolerance: float
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        for name in ("measured", "expected", "tolerance"):  # numpy's numbers are no JSON
            object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "ok", abs(self.measured - self.expected) <= self.tolerance)
