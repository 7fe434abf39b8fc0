"""Whether a user's own objects can be saved, said before the pickler says it in words that name no argument."""

from __future__ import annotations

import io
import pickle
import sys
from typing import Any

import numpy as np
from torch import Tensor

from pathkernel.errors import InputError


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
                f"Define `{name}` at the top of a module, or save the kernel matrix and use `kernel=\"precomputed\"`",
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
