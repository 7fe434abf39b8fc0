"""Ctrl-C at any moment of a call."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


def interrupted(call: Callable[[], Any], moment: int = 0, at: Callable[[FrameType], bool] = lambda frame: True) -> int:
    """Run a call, and let Ctrl-C come at one of its moments.

    A moment is the beginning of a line of Python or of a function, here or in any library, in the main thread.

    Parameters
    ----------
    call
        To be run; what it returns is dropped.
    moment
        Which of its moments, from 1; 0 for none.
    at
        Whether a frame's moments count.

    Returns
    -------
    int
        How many moments there were.

    Raises
    ------
    KeyboardInterrupt
        Where the call lets it through.
    """
    passed = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal passed
        if event in ("call", "line") and at(frame):
            passed += 1
            if passed == moment:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, before)
    return passed
