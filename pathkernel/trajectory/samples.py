"""Training samples by id, whether they came as arrays, tensors or a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate

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
        axis, or a map-style `torch.utils.data.Dataset` whose items are ``(input, target)``. Or how many samples there
        are, None where they are counted as they come, or a dataset with items of another form: then all that is known
        of them is what the batches on record hold.
    dtype
        Floating type for samples that come as numpy arrays.

    Attributes
    ----------
    announced
        Whether inputs are known from batches alone.
    limit
        How many ids there may be; None where they are counted.
    lengths
        Of the axes of each input in the batches on record, but the first; -1 where it varies.

    Raises
    ------
    InputError
        For data of another form.
    """

    announced = _counted = False  # where a pickle of an earlier version does not say
    lengths: Sequence[list[int]] = ()

    def __init__(self, data: Any, dtype: torch.dtype) -> None:
        self.dataset: Dataset | None = None
        self.dtype = dtype
        self._floats = False
        if data is None or (isinstance(data, int) and not isinstance(data, bool) and data > 0):
            self.announced, self._counted, self._length = True, data is None, data or 0
            return
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
                "Training data come as `(X, y)` arrays or tensors, or as a map-style Dataset of (input, target); or as "
                "their number, or not at all, where the network's inputs are kept",
                "Write `data=(X_train, y_train)`, `data=dataset` or `data=len(dataset)`",
            )
        if self._length == 0:
            raise InputError(
                "`data` holds no samples", "At least one training sample is needed", "Pass `data=(X_train, y_train)`"
            )
        if self.dataset is not None:
            with generators_untouched():
                item = self.dataset[0]
            self.announced = not isinstance(item, (tuple, list)) or len(item) < 2

    def __len__(self) -> int:
        return self._length

    @property
    def limit(self) -> int | None:
        """How many ids there may be; None where they are counted."""
        return None if self._counted else self._length

    def meet(self, ids: Tensor) -> None:
        """Count samples that are announced, where nobody said how many there are."""
        if self._counted:
            self._length = max(self._length, int(ids.max()) + 1)

    def note(self, inputs: PyTree) -> None:
        """Take note of inputs of a batch, by which queries are known that look alike."""
        if self.announced and "example" not in vars(self):
            self.example = (pytree.tree_map(lambda leaf: leaf[:1].clone(), inputs), None)
        if not self.lengths:
            self.note_lengths([list(shape) for shape in self.sample_shapes])
        self.note_lengths([list(leaf.shape[1:]) for leaf in pytree.tree_leaves(inputs)])

    def note_lengths(self, found: Sequence[list[int]]) -> None:
        """Take note of the lengths of the axes of each input; those that vary are not compared."""
        if len(self.lengths) != len(found):
            self.lengths = found
        elif list(self.lengths) != list(found):
            self.lengths = [
                [a if a == b else -1 for a, b in zip(known, new, strict=False)]
                for known, new in zip(self.lengths, found, strict=True)
            ]

    def __getitem__(self, ids: Tensor) -> tuple[PyTree, PyTree]:
        """Inputs and targets of the given ids, samples along the first axis, or axes where ids have several.

        Raises
        ------
        InputError
            Where they are known from the batches on record alone.
        """
        if self.announced:
            raise InputError(
                f"Training samples were asked for by their ids, and `data` is {self._described}",
                "They are then known from the batches on record alone; random batches and training targets are taken "
                "from arrays `(X, y)`, or from a dataset of pairs (input, target)",
                "Write `data=(X_train, y_train)`, or wrap the dataset in one whose `__getitem__` returns "
                "`(item_without_label, item['label'])`; or go through a loader with `recorder.track(loader)`",
            )
        if self.dataset is None:
            inputs, targets = take(self._inputs, ids), take(self._targets, ids)
        else:
            items = [self.dataset[int(i)] for i in ids.flatten()]
            collated = default_collate([(item[0], item[1]) for item in items])
            inputs, targets = (
                pytree.tree_map(lambda leaf: leaf.unflatten(0, ids.shape), as_tensors(part, self.dtype))
                for part in collated
            )
        return (with_floats(inputs, self.dtype) if self._floats else inputs), targets

    def everything(self) -> tuple[PyTree, PyTree]:
        """Inputs and targets of all samples; see `__getitem__`."""
        return self[torch.arange(len(self))]

    @property
    def inputs_in_memory(self) -> PyTree | None:
        """Inputs of all samples where they lie in memory, as arrays or in a `TensorDataset`; None where they do not."""
        if self.announced or not isinstance(self.dataset, TensorDataset | None):
            return None
        inputs = self._inputs if self.dataset is None else self.dataset.tensors[0]
        return with_floats(inputs, self.dtype) if self._floats else inputs

    def targets(self, ids: Tensor) -> PyTree:
        """Targets of the given ids alone: inputs need not make a batch."""
        if self.dataset is None:
            return self[ids][1]
        return as_tensors(default_collate([self.dataset[int(i)][1] for i in ids]), self.dtype)

    @property
    def _described(self) -> str:
        if self.dataset is None:
            return "not given" if self._counted else "the number of samples alone"
        with generators_untouched():
            item = self.dataset[0]
        what = f"a {type(item).__name__}"
        if isinstance(item, Mapping):
            what += f" with the keys {', '.join(map(repr, list(item)[:8]))}"
        if isinstance(item, (tuple, list)):
            what += f" of length {len(item)}"
        return f"a {type(self.dataset).__name__} whose items are {what}"

    @property
    def holds_integers(self) -> bool:
        """True where some inputs are integers or booleans, as far as data are at hand."""
        return not self.announced and not all(leaf.is_floating_point() for leaf in pytree.tree_leaves(self.example[0]))

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
        """Input and target of the first sample, as a batch of one; random generators stay as they are.

        Where inputs are known from batches alone, the first of the first batch, and None for its target.
        """
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
        example = self.example[0]
        places = pytree.tree_unflatten(range(len(pytree.tree_leaves(example))), pytree.tree_structure(example))
        if isinstance(example, dict) and isinstance(X, Mapping):
            X = _in_order(X, example, asker)
            example, places = {key: example[key] for key in X}, {key: places[key] for key in X}
        elif isinstance(X, Mapping) and isinstance(example, Tensor):
            raise InputError(
                f"`{asker}` was given samples with the keys {', '.join(map(repr, X))}",
                "In training a sample was one array",
                "Pass the array that the network takes",
            )
        elif self.announced and isinstance(example, tuple):  # labels and the like, behind the others, may be left out
            given = len(X) if isinstance(X, tuple) else 1
            example, places = example[:given], places[:given]
        inputs = as_tensors(X, self.dtype)
        shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs)]
        expected = [tuple(leaf.shape[1:]) for leaf in pytree.tree_leaves(example)]
        if shapes == expected and shapes != [()]:
            raise single_sample(asker, "Path kernels", shapes[0])
        rows = [shape[1:] for shape in shapes]
        if not (rows == expected or self._looks_alike(rows, pytree.tree_leaves(places))) or not all(shapes):
            raise InputError(
                f"`{asker}` was given samples of shape {', '.join(map(str, shapes))}",
                f"The network was trained on samples of shape {', '.join(str(('n', *s)) for s in expected)}".replace(
                    "'n'", "n"
                ),
                "Pass X with one row for each sample, shaped as in training",
            )
        check_rows(inputs, asker)
        leaves, tree = pytree.tree_flatten(inputs)
        trained = pytree.tree_leaves(example)
        return pytree.tree_unflatten([as_trained(*pair, asker) for pair in zip(leaves, trained, strict=False)], tree)

    def _looks_alike(self, rows: list[tuple[int, ...]], places: list[int]) -> bool:
        """Test that rows have the shapes of inputs on record, of which some lengths vary."""
        lengths = self.lengths
        if len(rows) != len(places) or not all(place < len(lengths) for place in places):
            return False
        return all(
            len(row) == len(lengths[place])
            and all(k in (-1, size) for k, size in zip(lengths[place], row, strict=True))
            for row, place in zip(rows, places, strict=True)
        )


def _in_order(X: Mapping[Any, Any], example: Mapping[Any, Any], asker: str) -> dict[Any, Any]:
    """Query samples by the names of the inputs in training, in their order; labels and the like may be left out.

    Raises
    ------
    InputError
        For a name that there was none of.
    """
    if strange := [key for key in X if key not in example]:
        raise InputError(
            f"`{asker}` was given samples with the keys {', '.join(map(repr, X))}",
            f"In training they had {', '.join(map(repr, example))}",
            f"Leave out {', '.join(map(repr, strange))}",
        )
    return {key: X[key] for key in example if key in X}


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
            "Leave `data=` out and write `recorder.track(loader)`, which counts ids; or write `data=dataset` with a "
            "map-style dataset, or read the stream into arrays `(X, y)` first",
        )
    return len(data)


def samples_of(batch: MicroBatch, data: Samples) -> tuple[PyTree, PyTree]:
    """Inputs and targets as the network saw them; None for targets that nobody knows, or asks for."""
    inputs, targets = batch.inputs, batch.targets
    if inputs is None:
        inputs, stored = data[batch.ids]
        targets = stored if targets is None else targets
    elif targets is None and batch.has_targets and not data.announced and batch.cotangents is None:
        targets = data.targets(batch.ids)
    return as_tensors(inputs, data.dtype), None if targets is None else as_tensors(targets, data.dtype)
