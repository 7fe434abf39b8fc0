"""Samples as scikit-learn's users pass them: checked as its own estimators do, and refused in three parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sklearn.utils.validation import _check_sample_weight, check_array, check_X_y, validate_data
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, PathKernelError
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.pytrees import count

NAMED = 5
"""Rows that an error names, at most."""

FLOATS = (np.float64, np.float32)


@contextmanager
def in_three_parts(**given: Any) -> Iterator[None]:
    """Say what scikit-learn refuses in its words, and name the rows that hold NaN or infinity.

    Parameters
    ----------
    **given
        The arrays that are checked inside, by the names that scikit-learn has for them.

    Raises
    ------
    InputError
        In place of every ValueError of scikit-learn.
    """
    try:
        yield
    except PathKernelError:
        raise
    except ValueError as error:
        said = " ".join(str(error).split())
        found, *advice = re.split(r"(?<=[^.][.!])\s", said, maxsplit=1)
        found = found.rstrip(".")
        for name, array in given.items():
            if re.search(rf"[Ii]nput {name} contains", said):
                rows = _not_finite(array)
                more = ", …" if len(rows) > NAMED else ""
                raise InputError(
                    f"{found}. Of `{name}`, these rows do: {', '.join(map(str, rows[:NAMED]))}{more}",
                    "Every entry is a finite number",
                    "Leave those rows out, or fill them with `sklearn.impute.SimpleImputer` first",
                ) from error
        raise InputError(
            found,
            "Samples and targets are what scikit-learn's own estimators take",
            advice[0].rstrip(".") if advice else "Pass `X` of shape (n_samples, n_features) and `y` with as many rows",
        ) from error


def _not_finite(array: Any) -> list[int]:
    """Rows with NaN or infinity."""
    try:
        found = np.asarray(array, dtype=np.float64)
    except (TypeError, ValueError):
        return []
    return np.flatnonzero(~np.isfinite(found).reshape(len(found), -1).all(axis=1)).tolist()


def checked_weights(sample_weight: Any, X: Any) -> np.ndarray | None:
    """Weights of samples (n,), float64, none of which is negative and some of which is not zero.

    Raises
    ------
    InputError
        For others.
    """
    if sample_weight is None:
        return None
    with in_three_parts(sample_weight=sample_weight):
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
    if not weights.any():
        raise InputError(
            "Sample weights are all zero",
            "Sample weights must contain at least one non-zero number",
            "Leave `sample_weight` out, or give it positive weights",
        )
    return weights


class Rows:
    """Samples that come as the rows of an array.

    Parameters
    ----------
    any_dimension
        Whether a sample may have more than one axis.
    """

    indexed = False

    def __init__(self, any_dimension: bool) -> None:
        self.any_dimension = any_dimension

    def checked(self, estimator: Any, X: Any, y: Any = None, reset: bool = False, **options: Any) -> Any:
        """The samples, and the targets where they are given, as scikit-learn checks them."""
        options |= {"allow_nd": self.any_dimension, "dtype": "numeric" if self.any_dimension else FLOATS}
        with in_three_parts(X=X, y=y):
            if y is None:
                return validate_data(estimator, X, reset=reset, **options)
            return validate_data(estimator, X, y, reset=reset, **options)

    def inputs(self, X: np.ndarray) -> PyTree:
        """What the network takes, for samples that are checked."""
        return X


class IndexedRows:
    """Samples that come by their places in a data set that scikit-learn can not hold.

    Parameters
    ----------
    data
        What has a length and gives a sample for a place: input alone or ``(input, target)``, whose target is not used;
        or tensors and arrays, nested too, with samples along their first axis.
    """

    indexed = True

    def __init__(self, data: Any) -> None:
        self.data = data
        self.nested = isinstance(data, (dict, torch.Tensor, np.ndarray))
        if not self.nested and not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise InputError(
                f"`data` is a {type(data).__name__}",
                "A data set has a length and gives a sample for a place",
                "Write `data=dataset` with a map-style `torch.utils.data.Dataset`, an array, or a dict of arrays",
            )

    def __len__(self) -> int:
        return count(self.data) if self.nested else len(self.data)

    def checked(self, estimator: Any, X: Any, y: Any = None, reset: bool = False, **options: Any) -> Any:
        """Places (n,) int64, and the targets where they are given.

        Raises
        ------
        InputError
            For places that are no whole numbers, or outside of the data set.
        """
        with in_three_parts(X=X, y=y):
            found = check_array(X, ensure_2d=False, estimator=estimator)
            if y is not None:
                _, y = check_X_y(found.reshape(len(found), -1), y, estimator=estimator, **options)
        places = found.reshape(len(found), -1)
        whole = places.shape[1] == 1 and np.all(places == np.floor(places))
        if not whole or places.min() < 0 or places.max() >= len(self):
            raise InputError(
                f"`X` of shape {np.shape(X)} holds {'other numbers than places' if not whole else 'places'} from "
                f"{places.min()} to {places.max()}",
                f"With `data=`, X holds places of samples in a data set of {len(self)}",
                f"Write `X = numpy.arange({len(self)})`, or leave out `data=` and pass the samples themselves",
            )
        places = places[:, 0].astype(np.int64)
        return places if y is None else (places, y)

    def inputs(self, X: np.ndarray) -> PyTree:
        """What the network takes, for places that are checked: samples collated as a DataLoader does it."""
        if self.nested:
            places = torch.from_numpy(X)
            return pytree.tree_map(lambda leaf: _taken(leaf, places), self.data)
        with generators_untouched():
            return default_collate([_input_of(self.data[int(place)]) for place in X])


def _input_of(item: Any) -> Any:
    """Input of ``(input, target)``, or of ``(input,)`` as `torch.utils.data.TensorDataset` gives for one tensor."""
    return item[0] if isinstance(item, (tuple, list)) and len(item) <= 2 and item else item


def _taken(leaf: Any, places: torch.Tensor) -> torch.Tensor:
    """Samples at some places; taken from an array first, since tensors have no negative strides or foreign bytes."""
    if isinstance(leaf, np.ndarray):
        return torch.from_numpy(np.array(leaf[places.numpy()], dtype=leaf.dtype.newbyteorder("="), order="C"))
    return torch.as_tensor(leaf)[places]
