"""Training samples by id, whether they came as arrays, tensors or a dataset."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, default_collate

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.pytrees import as_tensors, take


class Samples:
    """Inputs and targets by sample id, 0 … N − 1.

    Parameters
    ----------
    data
        ``(X, y)`` of arrays or tensors (nested tuples, lists or dicts of them too) with samples along the first
        axis, or a map-style `torch.utils.data.Dataset` whose items are ``(input, target)``.
    dtype
        Floating type for samples that come as numpy arrays.
    """

    def __init__(self, data: Any, dtype: torch.dtype) -> None:
        self.dataset: Dataset | None = None
        self.dtype = dtype
        if isinstance(data, Dataset):
            self.dataset = data
            self._length = len(data)  # type: ignore[arg-type]
        elif isinstance(data, (tuple, list)) and len(data) == 2:
            self._inputs, self._targets = as_tensors(data[0], dtype), as_tensors(data[1], dtype)
            lengths = {leaf.shape[0] for leaf in pytree.tree_leaves((self._inputs, self._targets)) if leaf.dim()}
            if len(lengths) != 1:
                raise InputError(
                    f"Inputs and targets have different lengths: {sorted(lengths)}",
                    "Every array of `data` has one row for each training sample",
                    "Write `data=(X_train, y_train)` with arrays of equal length",
                )
            self._length = lengths.pop()
        else:
            raise InputError(
                f"`data` is a {type(data).__name__}",
                "Training data come as `(X, y)` arrays or tensors, or as a map-style Dataset of (input, target)",
                "Write `data=(X_train, y_train)` or `data=dataset`",
            )
        if self._length == 0:
            raise InputError(
                "`data` holds no samples", "At least one training sample is needed", "Pass `data=(X_train, y_train)`"
            )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, ids: Tensor) -> tuple[PyTree, PyTree]:
        """Inputs and targets of the given ids, samples along the first axis."""
        if self.dataset is None:
            return take(self._inputs, ids), take(self._targets, ids)
        items = [self.dataset[int(i)] for i in ids]
        inputs, targets = default_collate([(item[0], item[1]) for item in items])
        return as_tensors(inputs, self.dtype), as_tensors(targets, self.dtype)

    @property
    def sample_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each input leaf without its sample axis."""
        inputs = self[torch.zeros(1, dtype=torch.int64)][0]
        return [tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(inputs)]

    def queries(self, X: PyTree, asker: str) -> PyTree:
        """Check query samples against the training samples' shape and turn them into tensors.

        Raises
        ------
        InputError
            For another shape, naming it; for two single rows, as scikit-learn's pairwise callers pass them.
        """
        inputs = as_tensors(X, self.dtype)
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs)]
        expected = self.sample_shapes
        if shapes == expected and shapes != [()]:
            raise InputError(
                f"`{asker}` was called with a single sample of shape {shapes[0]}, as KernelRidge, KernelPCA and "
                "Nystroem do pair by pair",
                "Path kernels take whole arrays of samples",
                'Write `make_pipeline(PathKernelTransformer(kernel), KernelRidge(kernel="precomputed"))`, '
                "or pass `X[None]`",
            )
        if [shape[1:] for shape in shapes] != expected or not all(shapes):
            raise InputError(
                f"`{asker}` was given samples of shape {', '.join(map(str, shapes))}",
                f"The network was trained on samples of shape {', '.join(str(('n', *s)) for s in expected)}".replace(
                    "'n'", "n"
                ),
                "Pass X with one row for each sample, shaped as in training",
            )
        return inputs
