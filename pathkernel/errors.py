"""Errors that say what was found, what was expected, and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


class InThreeParts(Exception):
    """Error in three parts: what was found, what was expected, and what to write instead.

    Parameters
    ----------
    found
        What was seen, as a sentence without its full stop.
    expected
        What should have been there.
    write
        What the user can type to get there.
    """

    def __init__(self, found: str, expected: str, write: str) -> None:
        self.found, self.expected, self.write = found, expected, write
        super().__init__(f"{found}. {expected}. {write}.")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.found, self.expected, self.write)


class PathKernelError(InThreeParts, ValueError):
    """A refusal in three parts."""


class CertificateWarning(InThreeParts, UserWarning):
    """A result whose certificate says that its split between samples cannot be trusted far."""


class PlainGradientsWarning(InThreeParts, UserWarning):
    """A considerable part of θ is not accounted for layer by layer: results are the same, and take longer."""


class LabelLeakWarning(InThreeParts, UserWarning):
    """A path kernel knows the labels by which an estimator will be judged that is being fitted with it."""


class RecordingError(PathKernelError):
    """The training loop did something that cannot be put on record."""


class UnsupportedOptimizerError(RecordingError):
    """No update rule is known for an optimizer, or for one of its options."""


class NonFiniteStepError(RecordingError):
    """A gradient holds NaN or infinity; the steps recorded before it stay valid."""


class SampleIdError(RecordingError):
    """Sample ids are missing, out of range, or not those of the batch that was trained on."""


class TrajectoryError(PathKernelError):
    """A trajectory cannot serve what is asked of it."""


class ModelMismatchError(TrajectoryError):
    """The model at hand is not the one that was recorded."""


class StoreError(TrajectoryError):
    """A store on disk cannot be opened, written or gone on with."""


class CorruptBlockError(StoreError):
    """Part of a store is damaged; what is named is not used, the rest stays readable."""


class InputError(PathKernelError):
    """Samples of the wrong shape or type were given to a kernel."""


class GameError(PathKernelError):
    """Players of a game went away from each other for good; ``path`` is what was computed before, (rounds, players)."""

    path: Any = None


class UnsupportedModelError(RecordingError, InputError):
    """A network that has no tangent kernel: not differentiable, or no function of one sample."""


class FlowError(PathKernelError):
    """A flow came to an end before its time; ``flow`` is what was computed of it, None where that is nothing."""

    flow: Any = None


class MissingExtraError(PathKernelError, ImportError):
    """A library that an extra installs is not there."""


def brief(value: object, length: int = 200) -> str:
    """Text that may come from somebody else's file, cut where it is long."""
    text = str(value)
    return text if len(text) <= length else f"{text[:length]}…"


def quoted(value: object, length: int = 200) -> str:
    """The same in quotation marks, escaped."""
    return brief(repr(value), length)


TRUTH_VALUES = ("bool", "torch.bool")
"""Types of truth values: of Python and numpy, and of torch."""


def is_number(value: Any) -> bool:
    """True for a finite number, of Python, numpy or torch; a truth value is none."""
    try:
        return str(getattr(value, "dtype", type(value).__name__)) not in TRUTH_VALUES and math.isfinite(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # what texts, arrays, huge integers and tensors raise
        return False


def is_positive(value: Any) -> bool:
    """True for a finite number above 0."""
    return is_number(value) and value > 0


def is_whole(value: Any) -> bool:
    """True for a whole number, of Python or numpy; a truth value is none."""
    return hasattr(value, "__index__") and is_number(value)


def check_number(name: str, value: Any, *, positive: bool = False, whole: bool = False, example: float = 1) -> None:
    """Refuse a parameter that is no finite number of 0 or more, or of more than 0, or no whole one.

    Raises
    ------
    InputError
        With its name and value, and an example of a right one.
    """
    known = is_whole(value) if whole else is_number(value)
    if not (known and value >= 0) or (positive and value == 0):
        kind, least = "whole" if whole else "finite", "greater than 0" if positive else "0 or more"
        expected = f"It is a {kind} number, {least}"
        raise InputError(f"`{name}={value!r}` was given", expected, f"Write `{name}={example}`")


def check_choice(name: str, value: Any, choices: Iterable[str | None], plural: str) -> None:
    """Refuse a parameter that is none of some choices, which are called by their plural; the first is the usual one.

    Raises
    ------
    InputError
        With its name and value, and the choices.
    """
    first, *others = choices
    named = value is None or isinstance(value, str)  # an array says of itself neither that it is among them nor not
    if not named or value not in (first, *others):
        known = ", ".join(map(repr, (first, *others)))
        raise InputError(f"`{name}={value!r}` was given", f"{plural} are {known}", f'Write `{name}="{first}"`')


def check_instance(name: str, value: Any, kind: type | tuple[type, ...], expected: str, write: str) -> None:
    """Refuse an object that is not of a class: a path or a dictionary in its place, or the class itself.

    Raises
    ------
    InputError
        With the name of the parameter, what was given, and what was expected.
    """
    if not isinstance(value, kind):
        given = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise InputError(f"`{name}` is {given}", expected, write)


SENSELESS = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError)
"""What values of another form than the format's lead to."""
