"""Methods of one object that two threads must not run at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

M = TypeVar("M", bound=Callable[..., Any])


def one_at_a_time(method: M) -> M:
    """A method that waits until no other thread is in one of the object's, or of another object with the same `lock`.

    What an engine has proved of a network and the memory that it uses again belong to one computation at a time, and
    joblib's threading backend asks one kernel from several threads.
    """

    @functools.wraps(method)
    def waiting(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            return method(self, *arguments, **options)

    return waiting  # type: ignore[return-value]
