"""Parameters that no layer accounts for: said when asked, and once without being asked where they take long."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from torch import nn

from pathkernel.errors import PlainGradientsWarning
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout

SHARE, NUMBERS = 0.05, 10_000
"""Part of θ, and its size, from which on rows are worth a word: fewer cost less than the passes. Chosen, not
measured."""

NAMED = 3
"""Parameters that a warning names."""

_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def size_of(plain: Mapping[str, str], layout: ParameterLayout) -> int:
    """Numbers in the parameters that are plain."""
    return sum(where.stop - where.start for name, where in layout.slices.items() if name in plain)


def lines_on(plain: Mapping[str, str], layout: ParameterLayout) -> list[str]:
    """Lines that say how much of θ is covered, and each plain parameter with its reason."""
    share = 1 - size_of(plain, layout) / layout.size
    covered = len(layout.names) - sum(name in plain for name in layout.names)
    lines = [f"layer by layer: {covered} of {len(layout.names)} parameters, {share:.2%} of θ"]
    return lines + [f"on the plain engine: {name}, {plain[name]}" for name in layout.names if name in plain]


def warn_of_rows(function: ModelFunction, plain: Mapping[str, str]) -> None:
    """Warn once for each module where a considerable part of θ is plain.

    Warns
    -----
    PlainGradientsWarning
        With some of the parameters, and the reason of the first.
    """
    layout, module = function.layout, function.structure.original
    numbers = size_of(plain, layout)
    if numbers < max(NUMBERS, SHARE * layout.size) or module is None or module in _WARNED:
        return
    _WARNED.add(module)
    names = [name for name in layout.names if name in plain]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    warnings.warn(
        PlainGradientsWarning(
            f"{numbers / layout.size:.0%} of θ is not accounted for layer by layer: {', '.join(names[:NAMED])}{more} "
            f"({plain[names[0]]})",
            "Gradients of these parameters are formed as rows, sample by sample: results are the same, and take longer",
            "See `describe()` for each of them and why; a rule of a few lines covers a layer of your own, see "
            "`pathkernel.layer_rule`",
        ),
        stacklevel=_user_level(),
    )


def _user_level() -> int:
    """Stack level of the line that called the package, as `warnings.warn` counts from the function that calls this."""
    package, level, found = str(Path(__file__).parents[2]), 1, 1
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:  # others lie in between: decorators of the standard library
        if frame.f_code.co_filename.startswith(package):
            found = level + 1
        frame, level = frame.f_back, level + 1
    return found
