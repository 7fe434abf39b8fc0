"""Classifiers among the networks: which they are, and what their outputs are as probabilities."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss
from pathkernel.errors import InputError
from pathkernel.trajectory.trajectory import Trajectory


def is_classifier(trajectory: Trajectory) -> bool:
    """Test that the training targets are classes."""
    loss, task = trajectory.loss, trajectory.task
    if task is not None:
        return task == "classification"
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss)):
        return True
    if trajectory.data.announced:  # no targets are on record
        return False
    target = pytree.tree_leaves(trajectory.data.example[1])[0]
    return not target.is_floating_point() and target.dim() == 1


def predictions(trajectory: Trajectory, outputs: np.ndarray) -> np.ndarray:
    """Class indices (n,) of a classifier's outputs, (n, C) or (n,); a regressor's outputs as they are."""
    if not is_classifier(trajectory):
        return outputs
    return outputs.argmax(axis=1) if outputs.ndim == 2 else (outputs > 0).astype(np.int64)


def classes_of(z: Tensor) -> Tensor:
    """Class indices (n,) of outputs (n, C): of the largest, or of a single one its sign."""
    return z.argmax(dim=1) if z.shape[1] > 1 else (z[:, 0] > 0).long()


def probabilities(loss: Loss, outputs: Tensor) -> Tensor:
    """Class probabilities (n, C) of outputs under the loss that a network was trained with.

    A loss that has a method ``probabilities`` says them itself.

    Raises
    ------
    InputError
        For losses that define none.
    """
    own = getattr(loss, "probabilities", None)
    if callable(own):
        return own(outputs)
    if isinstance(loss, nn.CrossEntropyLoss):
        return outputs.softmax(dim=1)
    if isinstance(loss, nn.NLLLoss):
        return outputs.exp()
    if isinstance(loss, nn.BCEWithLogitsLoss) and outputs.shape[1] == 1:
        positive = outputs.sigmoid()
        return torch.cat([1 - positive, positive], dim=1)
    raise InputError(
        f"Probabilities were asked of a network trained with {type(loss).__name__}",
        "CrossEntropyLoss, NLLLoss and BCEWithLogitsLoss with one output define them",
        "Use `decision_function(X)` and turn outputs into probabilities as your loss does",
    )
