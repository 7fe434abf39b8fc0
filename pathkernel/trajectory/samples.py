"""Training samples by id, whether they came as arrays, tensors or a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset, default_collate

from pathkernel._typing import PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.acceptance import Acceptance, single_sample, with_floats, with_integers
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import as_tensors, check_rows, take
from pathkernel.trajectory.step import MicroBatch


class Samples:
    """Inputs and targets by sample id, 0 … N − 1.

    Parameters
    ----------
    data
        ``(X, y)`` of arrays or tensors (nested tuples, lists or dicts of them too) with samples along the first
        axis, or a map-style `torch.utils.data.Dataset` whose items are ``(input, target)``.
    dtype
        Floating type for samples that come as numpy arrays.

    Raises
    ------
    InputError
        For data of another form.
    """

    def __init__(self, data: Any, dtype: torch.dtype) -> None:
        self.dataset: Dataset | None = None
        self.dtype = dtype
        self._floats = False
        if isinstance(data, Dataset):
            self.dataset = data
            self._length = _length_of(data)
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
        if self.dataset is not None:
            with generators_untouched():
                _check_item(self.dataset[0], type(data).__name__)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, ids: Tensor) -> tuple[PyTree, PyTree]:
        """Inputs and targets of the given ids, samples along the first axis."""
        if self.dataset is None:
            inputs, targets = take(self._inputs, ids), take(self._targets, ids)
        else:
            items = [self.dataset[int(i)] for i in ids]
            collated = default_collate([(item[0], item[1]) for item in items])
            inputs, targets = (as_tensors(part, self.dtype) for part in collated)
        return (with_floats(inputs, self.dtype) if self._floats else inputs), targets

    @property
    def holds_integers(self) -> bool:
        """True where some inputs are integers or booleans."""
        return not all(leaf.is_floating_point() for leaf in pytree.tree_leaves(self.example[0]))

    def suit(self, function: ModelFunction, theta: Tensor) -> None:
        """Give integers in the network's floating type if it takes no integers at θ."""
        inputs = self.example[0]
        try:
            with generators_untouched():
                taken = Acceptance(function, theta, "KernelRecorder")(inputs)
        except InputError:  # the loop may give the network something else
            return
        pairs = zip(pytree.tree_leaves(inputs), pytree.tree_leaves(taken), strict=True)
        if any(own.is_floating_point() and not given.is_floating_point() for given, own in pairs):
            self._floats = True
            del self.example

    @cached_property
    def example(self) -> tuple[PyTree, PyTree]:
        """Input and target of the first sample, as a batch of one; random generators stay as they are."""
        with generators_untouched():
            return self[torch.zeros(1, dtype=torch.int64)]

    @property
    def sample_shapes(self) -> list[tuple[int, ...]]:
        """Shape of each input leaf without its sample axis."""
        return [tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(self.example[0])]

    def queries(self, X: PyTree, asker: str) -> PyTree:
        """Check query samples against the training samples' shape and turn them into tensors of their types.

        Raises
        ------
        InputError
            For another shape, naming it; for two single rows, as scikit-learn's pairwise callers pass them; for
            numbers with a fraction where the training samples were integers.
        """
        inputs = as_tensors(X, self.dtype)
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs)]
        expected = self.sample_shapes
        if shapes == expected and shapes != [()]:
            raise single_sample(asker, "Path kernels", shapes[0])
        if [shape[1:] for shape in shapes] != expected or not all(shapes):
            raise InputError(
                f"`{asker}` was given samples of shape {', '.join(map(str, shapes))}",
                f"The network was trained on samples of shape {', '.join(str(('n', *s)) for s in expected)}".replace(
                    "'n'", "n"
                ),
                "Pass X with one row for each sample, shaped as in training",
            )
        check_rows(inputs, asker)
        leaves, tree = pytree.tree_flatten(inputs)
        trained = pytree.tree_leaves(self.example[0])
        return pytree.tree_unflatten([as_trained(*pair, asker) for pair in zip(leaves, trained, strict=True)], tree)


def as_trained(leaf: Tensor, trained: Tensor, asker: str) -> Tensor:
    """A query in the kind of numbers of the training samples: floating point, integers or booleans.

    Raises
    ------
    InputError
        Where that would change a number.
    """
    if trained.is_floating_point():
        return leaf if leaf.is_floating_point() else leaf.to(trained.dtype)
    whole = with_integers(leaf)
    if whole is not None and trained.dtype == torch.bool and bool(((whole == 0) | (whole == 1)).all()):
        return whole.to(torch.bool)
    if whole is None or trained.dtype == torch.bool:
        kind = "booleans" if trained.dtype == torch.bool else "integers"
        raise InputError(
            f"`{asker}` was given {str(leaf.dtype).removeprefix('torch.')} numbers that are no {kind}",
            f"The network was trained on {kind}",
            "Pass X as in training; for scikit-learn, which makes floating-point numbers of integers, whole numbers do",
        )
    return whole.to(torch.int64) if whole.dtype == torch.bool else whole


def _length_of(data: Dataset) -> int:
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise InputError(
            f"`data` is a {type(data).__name__}, which has no length",
            "Samples have ids from 0 to N - 1: training data are a map-style Dataset with `__len__` and `__getitem__`",
            "Write `data=dataset` with a map-style dataset, or read the stream into arrays `(X, y)` first",
        )
    return len(data)


def _check_item(item: Any, dataset: str) -> None:
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        what = f"a {type(item).__name__}"
        if isinstance(item, Mapping):
            what += f" with the keys {', '.join(map(repr, list(item)[:8]))}"
        if isinstance(item, (tuple, list)):
            what += f" of length {len(item)}"
        raise InputError(
            f"`data` is a {dataset} whose items are {what}",
            "Its items are pairs (input, target); the input may be a dict or a tuple of several",
            "Wrap it in a Dataset whose `__getitem__` returns `(item_without_label, item['label'])`, and hand on the "
            "loop's batches alike",
        )


def samples_of(batch: MicroBatch, data: Samples) -> tuple[PyTree, PyTree]:
    """Inputs and targets as the network saw them."""
    inputs, targets = (batch.inputs, batch.targets)
    if targets is None and (batch.parts is not None or batch.source is not None):
        return as_tensors(inputs, data.dtype), None  # rows that are none of the data's
    if inputs is None or targets is None:
        stored_inputs, stored_targets = data[batch.ids]
        inputs = stored_inputs if inputs is None else inputs
        targets = stored_targets if targets is None else targets
    return as_tensors(inputs, data.dtype), as_tensors(targets, data.dtype)
