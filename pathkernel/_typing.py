"""Names for types that many modules share.

Shapes are written with jaxtyping where it is installed (the tests check them at run time through beartype);
without it, the same annotations are plain tensors, so that nothing more has to be installed to use the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int
else:
    try:
        from jaxtyping import Float, Int
    except ImportError:  # pragma: no cover - the fallback is for installations without the test extra

        class _Shaped:
            def __class_getitem__(cls, item):
                return item[0]

        Float = Int = _Shaped

Parameters: TypeAlias = Mapping[str, Tensor]
PyTree: TypeAlias = Any
"""Nested tuples, lists and dicts whose leaves are tensors with the samples along their first axis."""
Loss: TypeAlias = Callable[[Any, Any], Tensor]
Array: TypeAlias = np.ndarray

__all__ = ["Array", "Float", "Int", "Loss", "Parameters", "PyTree", "Tensor"]
