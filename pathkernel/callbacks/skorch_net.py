"""Data and loss of a net of skorch, as a recorder takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel.callbacks.versions import check_version
from pathkernel.errors import RecordingError
from pathkernel.recording.indexed import levels_of

check_version("skorch")

from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier  # noqa: E402 - as for the callback
from skorch.dataset import Dataset as SkorchDataset  # noqa: E402


class NetLoss(nn.Module):
    """The loss of a net of skorch as a function of what its module returns, which also knows the probabilities.

    Parameters
    ----------
    criterion
        The net's criterion.
    prepare
        What skorch does to the module's outputs before they come to the criterion: ``"log"`` takes the logarithm of
        probabilities, as `skorch.NeuralNetClassifier` does for `torch.nn.NLLLoss`; ``"flat"`` makes outputs (n, 1) of
        shape (n,), as `skorch.NeuralNetBinaryClassifier` does; ``""`` nothing.
    nonlinearity
        What makes probabilities of outputs.
    """

    def __init__(
        self, criterion: Callable[..., Tensor], prepare: str, nonlinearity: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.criterion, self.prepare, self._nonlinearity = criterion, prepare, nonlinearity

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch."""
        if self.prepare == "log":
            output = torch.log(output + torch.finfo(output.dtype).eps)
        return self.criterion(output.reshape(-1) if self.prepare == "flat" else output, target)

    def probabilities(self, outputs: Tensor) -> Tensor:
        """Probabilities (n, C) of outputs, as ``net.predict_proba`` has them."""
        return self._nonlinearity(outputs.reshape(-1) if self.prepare == "flat" else outputs)


def loss_of(net: Any) -> Callable[..., Tensor] | None:
    """The loss that a net is trained with, as a function of its module's outputs and the targets.

    Its criterion, or a `NetLoss` where skorch does something to the outputs before; None where the net's own methods
    say what the loss is. `pathkernel.Trajectory.open` is given the same.

    Parameters
    ----------
    net
        An initialized `skorch.NeuralNet`.
    """
    known = {NeuralNet, NeuralNetClassifier, NeuralNetBinaryClassifier}
    for name in ("get_loss", "infer", "train_step_single"):
        if next(kind for kind in type(net).__mro__ if name in vars(kind)) not in known or name in vars(net):
            return None
    if net._criteria != ["criterion"]:
        return None
    criterion = getattr(net.criterion_, "_orig_mod", net.criterion_)
    if isinstance(net, NeuralNetBinaryClassifier):
        return NetLoss(criterion, "flat", net._get_predict_nonlinearity())
    if isinstance(net, NeuralNetClassifier) and isinstance(criterion, nn.NLLLoss):
        return NetLoss(criterion, "log", net._get_predict_nonlinearity())
    ours = isinstance(criterion, nn.CrossEntropyLoss) and net.predict_nonlinearity == "auto"
    if ours or not isinstance(net, ClassifierMixin):
        return criterion
    return NetLoss(criterion, "", net._get_predict_nonlinearity())


def check_optimizers(net: Any, optimizers: Sequence[Optimizer]) -> None:
    """Refuse a net that trains parameters of other modules than ``module_``.

    Parameters
    ----------
    net
        An initialized `skorch.NeuralNet`.
    optimizers
        Its own.

    Raises
    ------
    RecordingError
        With the names of these modules.
    """
    own = {id(parameter) for parameter in net.module_.parameters()}
    held = {id(parameter) for each in optimizers for group in each.param_groups for parameter in group["params"]} - own
    others = [
        name
        for name in (f"{each}_" for each in (*net._modules, *net._criteria) if each != "module")
        if any(id(parameter) in held for parameter in getattr(net, name).parameters())
    ]
    if others:
        names = " and ".join(f"`{name}`" for name in others)
        raise RecordingError(
            f"The optimizer of the {type(net).__name__} holds parameters of {names}",
            "SkorchRecorder records the training of `module_`, by optimizers of its parameters alone",
            f"If {names} is not to be trained, make the optimizer in `initialize_optimizer` from "
            "`self.module_.parameters()`; otherwise record a loop of your own with `pathkernel.KernelRecorder`",
        )


def task_of(net: Any) -> str | None:
    """``"classification"`` or ``"regression"``; None where the class of the net does not say."""
    if isinstance(net, ClassifierMixin):
        return "classification"
    return "regression" if isinstance(net, RegressorMixin) else None


def found_data(dataset: Any, X: Any) -> tuple[Any, Tensor | None]:
    """The samples that ``fit`` was given, and the places among them of those that are trained on.

    Parameters
    ----------
    dataset
        The part of them that is trained on.
    X
        As given to ``fit``.

    Returns
    -------
    data
        Arrays ``(X, y)`` where the net makes batches of these by indexing alone; otherwise the dataset; None for a
        stream.
    places
        (n,) int64; None for a stream.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return None, None
    *_, (whole, places) = levels_of(dataset, until=X)
    places = torch.arange(len(dataset)) if places is None else places
    if type(whole) is SkorchDataset and whole.y is not None and len(whole) == len(whole.y):
        inputs = dict(whole.X) if isinstance(whole.X, Mapping) else whole.X
        if all(map(_is_array, (*(inputs.values() if isinstance(inputs, dict) else [inputs]), whole.y))):
            return (inputs, whole.y), places
    return whole, places


def _is_array(values: Any) -> bool:
    return isinstance(values, Tensor) or (type(values) is np.ndarray and values.dtype.kind in "fiub")


def same_data(one: Any, other: Any) -> bool:
    """Test that two calls of ``fit`` were given the same samples: one object, or arrays with the same values."""
    if one is other:
        return True
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_data(one[key], other[key]) for key in one)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(same_data, one, other))
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if type(one) is SkorchDataset and type(other) is SkorchDataset:
        return one.X is other.X and one.y is other.y
    return False
