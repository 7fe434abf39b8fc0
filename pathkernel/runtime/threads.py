"""Methods of one object that two threads must not run at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

M = TypeVar("M", bound=Callable[..., Any])


def on_the_cpu() -> AbstractContextManager[Any]:
    """Make tensors on the CPU inside where no device is named, under ``torch.set_default_device(...)`` as without."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def made_on_the_cpu(method: M) -> M:
    """A method that makes its tensors `on_the_cpu`."""

    @functools.wraps(method)
    def there(*arguments: Any, **options: Any) -> Any:
        with on_the_cpu():
            return method(*arguments, **options)

    return there  # type: ignore[return-value]


def one_at_a_time(method: M) -> M:
    """A method that waits until no other thread is in one of the object's, or of another object with the same `lock`.

    What an engine has proved of a network and the memory that it uses again belong to one computation at a time, and
    joblib's threading backend asks one kernel from several threads. Tensors that it makes lie on the CPU unless it says
    otherwise, whatever ``torch.device(...)`` stands around the call.
    """

    @functools.wraps(method)
    def waiting(self: Any, *arguments: Any, **options: Any) -> Any:
        with self.lock, on_the_cpu():
            return method(self, *arguments, **options)

    return waiting  # type: ignore[return-value]
