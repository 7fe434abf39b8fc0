"""Targets of estimators: labels and numbers as what a loss takes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor, nn

from pathkernel._typing import Loss
from pathkernel.errors import InputError
from pathkernel.estimators.samples import in_three_parts


def checked_classes(y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Classes in their order, (C,), and the place of each label among them, (n,).

    Raises
    ------
    InputError
        For targets of a regression, and where all labels are one class.
    """
    with in_three_parts(y=y):
        check_classification_targets(y)
    classes, places = np.unique(y, return_inverse=True)
    if len(classes) < 2:
        raise InputError(
            f"`y` holds {len(classes)} class: {classes.tolist()}",
            "A classifier tells two classes or more apart",
            "Pass samples of every class; within cross-validation use `StratifiedKFold`",
        )
    return classes, places


def weights_of(sample_weight: np.ndarray | None, class_weight: Any, y: np.ndarray) -> np.ndarray | None:
    """Weights of samples times those of their classes, (n,), or None where all are 1.

    Parameters
    ----------
    sample_weight
        (n,), or None.
    class_weight
        As of scikit-learn's classifiers: a dict of labels, ``"balanced"``, or None. Balanced are the samples with a
        weight: the others are as if they were not there.
    y
        Labels, (n,).

    Raises
    ------
    InputError
        For class weights that scikit-learn does not take, and for weights that are negative, not finite, or all zero.
    """
    if class_weight is None:
        return sample_weight
    counted = np.full(len(y), True) if sample_weight is None else sample_weight > 0
    weights = np.zeros(len(y))
    with in_three_parts(y=y):
        check_classification_targets(y)
        weights[counted] = compute_sample_weight(class_weight, y[counted])
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        raise InputError(
            f"`class_weight={class_weight!r}` was given",
            "Weights of classes are finite numbers that are not negative, and not all of them are zero",
            'Write `class_weight="balanced"`, or a dict of a positive number for every class',
        )
    return weights if sample_weight is None else weights * sample_weight


def class_targets(places: np.ndarray, outputs: int, dtype: torch.dtype) -> Tensor:
    """Targets of a classifier: 0 or 1 of a floating type, (n, 1), for one logit; else places of classes (n,)."""
    labels = torch.from_numpy(places.astype(np.int64))
    return labels[:, None].to(dtype) if outputs == 1 else labels


def class_loss(loss: Loss | None, outputs: int) -> Loss:
    """The loss that was given, or cross-entropy: of one logit, or of one for each class."""
    if loss is not None:
        return loss
    return nn.BCEWithLogitsLoss() if outputs == 1 else nn.CrossEntropyLoss()


def logits(classes: int, loss: Loss | None) -> int:
    """Outputs of a classifier: one for two classes, unless the loss that was given takes one for each class."""
    return 1 if classes == 2 and (loss is None or isinstance(loss, nn.BCEWithLogitsLoss)) else classes


def beside(loss: Loss, dtype: torch.dtype, device: torch.device) -> Loss:
    """The loss, or a copy whose own tensors, such as weights of classes, are where and as the network's outputs are."""
    if not isinstance(loss, nn.Module):
        return loss
    own = [tensor for tensor in loss.state_dict(keep_vars=True).values() if tensor.is_floating_point()]
    if all(tensor.dtype == dtype and tensor.device == device for tensor in own):
        return loss
    return copy.deepcopy(loss).to(device, dtype)


def loss_per_sample(loss: Loss) -> Loss:
    """The same loss with one number per sample, where it has a ``reduction``, to be weighted."""
    if isinstance(loss, nn.Module) and getattr(loss, "reduction", "none") in ("mean", "sum"):
        loss = copy.deepcopy(loss)
        vars(loss)["reduction"] = "none"
    return loss
