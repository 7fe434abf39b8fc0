"""Refusals to pickle, in words that name the argument; and tensors that take no more room in a pickle than needed."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from pathkernel.errors import InputError

T = TypeVar("T")


class _Trial(pickle.Pickler):
    """Pickles everything but numbers: whether that works does not depend on them."""

    def persistent_id(self, thing: Any) -> Any:
        """A place holder for tensors and arrays."""
        return "numbers" if isinstance(thing, (Tensor, np.ndarray)) else None


def check_picklable(**given: Any) -> None:
    """Refuse to save what refers to functions and classes that cannot be found by their name.

    Parameters
    ----------
    **given
        The user's own objects, by the argument that they were given as.

    Raises
    ------
    InputError
        That names the first argument that cannot be saved.

    Notes
    -----
    Called from ``__getstate__``, which is not told who asks. `copy` takes every object as it is, and cloudpickle
    (joblib's processes) takes functions and classes by value.
    """
    if _takes_all():
        return
    for name, value in given.items():
        try:
            _Trial(io.BytesIO(), protocol=pickle.HIGHEST_PROTOCOL).dump(value)
        except Exception as error:  # whatever the user's own objects raise
            raise InputError(
                f"`{name}` cannot be pickled ({str(error).strip() or type(error).__name__})",
                "What is saved with a kernel is found by its name when it is loaded: functions and classes at the top "
                "of a module, no lambda, nothing from inside a function; and no open file, no lock",
                f'Define `{name}` at the top of a module, or save the kernel matrix and use `kernel="precomputed"`',
            ) from error


def _takes_all() -> bool:
    frame = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals.get("self")
        by_value = isinstance(own, pickle.Pickler) and hasattr(own, "reducer_override")
        if by_value or frame.f_globals.get("__name__") == "copy":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def with_memory_of_their_own(things: T) -> T:
    """The same steps, vectors …, with tensors that are not cut from larger ones, which a pickle would hold whole each.

    What was one object in several places is one object again.
    """
    known: dict[int, Any] = {}

    def own(thing: Any) -> Any:
        if id(thing) not in known:
            known[id(thing)] = made(thing)
        return known[id(thing)]

    def made(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return thing.clone() if thing.untyped_storage().nbytes() > thing.numel() * thing.element_size() else thing
        if is_dataclass(thing) and not isinstance(thing, type):
            other = copy.copy(thing)
            vars(other).update({each.name: own(getattr(thing, each.name)) for each in fields(thing)})
            return other
        if type(thing) in (list, tuple):
            return type(thing)(own(part) for part in thing)
        return {key: own(part) for key, part in thing.items()} if isinstance(thing, Mapping) else thing

    return own(things)
