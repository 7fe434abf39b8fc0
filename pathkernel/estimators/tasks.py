"""Classification and regression, as far as estimators that train a network differ by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pathkernel._typing import Loss
from pathkernel.errors import InputError
from pathkernel.estimators.network_estimator import NetworkEstimator
from pathkernel.estimators.networks import Moments, StandardizedSquaredError
from pathkernel.estimators.samples import in_three_parts
from pathkernel.estimators.targets import checked_classes, class_loss, class_targets, logits, weights_of


class NetworkClassification(NetworkEstimator):
    """Part of classifiers: labels as classes, cross-entropy."""

    task: ClassVar[str] = "classification"
    _target_checks: ClassVar[Mapping[str, Any]] = {}

    class_weight: Any
    classes_: np.ndarray

    def _encoded(self, y: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        # Samples of weight 0 are as if they were not there: their classes are none, and count for no other's weight.
        weights = weights_of(weights, self.class_weight, y)
        counted = slice(None) if weights is None else weights > 0
        classes, found = checked_classes(y[counted])
        if self.warm_start and hasattr(self, "network_") and not np.array_equal(classes, self.classes_):
            raise InputError(
                f"`y` holds the classes {classes.tolist()}, and the network was trained on {self.classes_.tolist()}",
                "With `warm_start=True` training goes on, on the same classes",
                f"Write `{type(self).__name__}(warm_start=False)` for other classes",
            )
        self.classes_ = classes
        places = np.zeros(len(y), dtype=np.int64)
        places[counted] = found
        return places, weights

    def _encoded_again(self, y: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Targets of ``partial_fit`` as places of the classes that are known."""
        strange = np.setdiff1d(y, self.classes_)
        if len(strange):
            raise InputError(
                f"`y` holds the classes {strange.tolist()}, which are not among {self.classes_.tolist()}",
                "The first call of `partial_fit` says all classes that there will be",
                "Write `partial_fit(X, y, classes=numpy.unique(every_y))` with a new estimator",
            )
        return np.searchsorted(self.classes_, y), weights_of(weights, self.class_weight, y)

    def _know_classes(self, classes: Any) -> None:
        """Take the classes of the first call of ``partial_fit``, and check that they are the same in others."""
        if classes is None and not hasattr(self, "classes_"):
            raise InputError(
                "classes must be passed on the first call to partial_fit",
                "Its samples need not be of every class that there will be",
                "Write `partial_fit(X, y, classes=numpy.unique(every_y))`",
            )
        if classes is not None:
            found, _ = checked_classes(classes)
            if hasattr(self, "classes_") and not np.array_equal(found, self.classes_):
                raise InputError(
                    f"`classes={found.tolist()}` is not the same as on the last call to partial_fit, which was "
                    f"{self.classes_.tolist()}",
                    "The classes stay those of the first call",
                    "Leave out `classes`",
                )
            self.classes_ = found

    def _wanted_outputs(self, values: np.ndarray) -> int:
        return logits(len(self.classes_), self.loss)

    def _loss_of(self, outputs: int, targets: Moments | None) -> Loss:
        if outputs != len(self.classes_) and not (outputs == 1 and len(self.classes_) == 2):
            raise InputError(
                f"The network has {outputs} outputs, and `y` holds {len(self.classes_)} classes",
                "A classifier has one output for each class, or one for two classes",
                f"End the network in a layer with {self._wanted_outputs(np.empty(0))} outputs",
            )
        return class_loss(self.loss, outputs)

    def _targets(self, values: np.ndarray, outputs: int, dtype: torch.dtype) -> Tensor:
        return class_targets(values, outputs, dtype)

    @staticmethod
    def _decision(outputs: np.ndarray) -> np.ndarray:
        """Outputs (n, C) as scikit-learn's decision function: (n,) for two classes."""
        if outputs.shape[1] == 1:
            return outputs[:, 0]
        return outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs

    def _labels(self, decision: np.ndarray) -> np.ndarray:
        """Labels that a decision function stands for, (n,)."""
        return self.classes_[decision.argmax(axis=1) if decision.ndim == 2 else (decision > 0).astype(np.int64)]


class NetworkRegression(NetworkEstimator):
    """Part of regressors: numbers as targets, squared error."""

    task: ClassVar[str] = "regression"
    _target_checks: ClassVar[Mapping[str, Any]] = {"multi_output": True, "y_numeric": True}

    def _encoded(self, y: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        self._single = y.ndim == 1
        with in_three_parts(y=y):
            # A copy: tensors take no negative strides, and the record outlives what the user does with y.
            return np.array(y, dtype=np.float64), weights

    def _wanted_outputs(self, values: np.ndarray) -> int:
        return 1 if values.ndim == 1 else values.shape[1]

    def _loss_of(self, outputs: int, targets: Moments | None) -> Loss:
        if self.loss is not None:
            return self.loss
        return nn.MSELoss() if targets is None else StandardizedSquaredError(targets.scale)

    def _targets(self, values: np.ndarray, outputs: int, dtype: torch.dtype) -> Tensor:
        if outputs != self._wanted_outputs(values):
            raise InputError(
                f"The network has {outputs} outputs, and `y` is of shape {values.shape}",
                "A regressor has one output for each target of a sample",
                f"End the network in a layer with {self._wanted_outputs(values)} outputs",
            )
        return torch.from_numpy(values.reshape(len(values), -1)).to(dtype)

    def _numbers(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs (n, k), (n,) where y was (n,)."""
        return outputs[:, 0] if self._single else outputs

    def _standardize(self, values: np.ndarray, weights: np.ndarray | None) -> None:
        """Find mean and standard deviation of the targets, for solvers whose settings depend on their units."""
        self._mean = np.average(values, axis=0, weights=weights)
        deviation = np.sqrt(np.average((values - self._mean) ** 2, axis=0, weights=weights))
        self._scale = np.where(deviation > 1e-12 * np.abs(self._mean), deviation, 1.0)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = self._target_checks.get("multi_output", False)
        return tags
