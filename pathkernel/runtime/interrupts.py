"""Deferred `KeyboardInterrupt`: not while something is set for a moment that has to be put back.

Python raises `KeyboardInterrupt` between any two instructions, also between "it is set" and "from here on it will be
put back", and within the putting back. torch's own context managers (modes, `torch.func.functional_call`) are Python,
too: an interrupt there leaves torch in another mode, or another error comes in its place. So it waits.

It is deferred at the rim of the package, so that what lies further in need not think of it:

- in the two sweeps of `pathkernel.kernel_machine`, from one step, or block of columns, to the next;
- in the loops over blocks of the tangent kernel's engines and of its operators, from one tile to the next;
- in `pathkernel.gradients.model_function`, which sets modes of torch and random generators for a moment. It delivers
  before each pass through the network, and so in whatever is a loop of passes. The rows of a coupled batch are one
  pass and many reverse sweeps: `pathkernel.gradients.losses` delivers between these;
- in the recorder's hooks and in its `start`, `flush` and `close`, to their end: a step is on record whole, or not at
  all.

Three places are called from anywhere, so that no rim is around them. Each has a test that fails without its deferral:

- `pathkernel.storage.format.arrays`: an interrupt leaves a lock of the compressor taken for ever;
- `pathkernel.storage.format.lock`: one within filelock 4.2.0, the oldest that is supported, leaves the store locked;
- `pathkernel.runtime.lazy`: one within the initialisation of a compiled module comes out as an `ImportError`.

`result_or_error` is another thing: an error that is taken for an answer ("this has no rule", "this loss does not fit")
may hide what came from outside. Interrupts that are deferred come out as themselves, but a second Ctrl-C is delivered
at once, users' functions are tried outside of every rim, and no memory left is no answer anywhere: so it looks for
both in every error.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

NUMBER = int(signal.SIGINT)
# What functions of `signal` call, ten times as fast: no enumeration is looked up for a handler that is a function.
_quick: Any = sys.modules.get("_signal", signal)
_handler, _set_handler = _quick.getsignal, _quick.signal


class _Waiting:
    """State of the deferral; only the main thread, which alone receives SIGINT, reads and writes it."""

    depth = 0
    whole = 0
    came = False
    handler: Callable[[int, FrameType | None], Any] | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Note SIGINT; a second one is delivered at once."""
        if self.came and self.handler is not None:
            self.handler(number, frame)
        self.came = True


_WAITING = _Waiting()


class defer_interrupts(ContextDecorator):
    """Defer `KeyboardInterrupt` until the end of a block or a decorated function; a second one is delivered at once.

    To be entered before everything that has to be put back. Costs a few microseconds; does nothing in threads other
    than the main one, to which Ctrl-C does not come, and where the user has switched it off.

    Parameters
    ----------
    divisible
        Whether it may also come at `deliver_interrupt`, where all that is lost is a result. False for what is done
        whole or not at all.
    """

    def __init__(self, *, divisible: bool = False) -> None:
        self.divisible = divisible

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if _WAITING.depth == 0:
            found = _handler(NUMBER)
            # It may also be ignored, end the process, or be none of Python's.
            _WAITING.handler, _WAITING.came = found if callable(found) else None, False
            if _WAITING.handler is not None:
                _set_handler(NUMBER, _WAITING.receive)
        _WAITING.depth += 1
        _WAITING.whole += not self.divisible

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        _WAITING.depth -= 1
        _WAITING.whole -= not self.divisible
        if _WAITING.depth == 0 and _WAITING.handler is not None:
            if _handler(NUMBER) == _WAITING.receive:  # unless the network has set one of its own
                _set_handler(NUMBER, _WAITING.handler)
            deliver_interrupt()


def deliver_interrupt() -> None:
    """Deliver a deferred interrupt, unless something that is done whole is under way.

    All that is entered by now is put back as after any other error.
    """
    if not _WAITING.came or _WAITING.whole:
        return
    handler = _WAITING.handler
    if handler is not None and threading.current_thread() is threading.main_thread():
        _WAITING.came = False
        handler(NUMBER, sys._getframe(1))


def result_or_error(call: Callable[[], T], failures: tuple[type[Exception], ...]) -> T | Exception:
    """The result of a call, or the error by which it says that it cannot be done.

    Parameters
    ----------
    call
        To be tried.
    failures
        Errors that say so.

    Raises
    ------
    BaseException
        Any other error; and also such a one, where it only hides what came from outside and would be taken for an
        answer: Ctrl-C, after which cleaning up raised another error, or that no memory is left.
    """
    handled = sys.exc_info()[1]
    try:
        return call()
    except failures as error:
        cause: BaseException | None = error
        while cause is not None and cause is not handled:  # what was handled when this began has come before
            if not isinstance(cause, Exception) or is_out_of_memory(cause):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        return error


def is_out_of_memory(error: BaseException) -> bool:
    """Test that an error says that no memory is left; torch's allocator on the CPU has no type of error for it."""
    torch = sys.modules.get("torch")  # which takes seconds to import: this module does not wait for it
    typed = isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))
    said = ("DefaultCPUAllocator", "out of memory", "std::bad_alloc")
    return typed or (isinstance(error, RuntimeError) and any(words in str(error) for words in said))
