"""Training that goes on with every call of ``partial_fit``, on one record."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.utils import check_random_state
from torch import Tensor

from pathkernel.estimators.network_estimator import FittedOn, NetworkEstimator
from pathkernel.estimators.networks import seeded
from pathkernel.estimators.targets import loss_per_sample
from pathkernel.estimators.training import Trainer
from pathkernel.gradients.pytrees import take
from pathkernel.recording.recorder import KernelRecorder


class Session:
    """Network in training, with its optimizer, and the recorder that counts the samples of all calls.

    Parameters
    ----------
    trainer, recorder
        Of the first call.
    seed
        Of random numbers that the network draws in training.
    """

    def __init__(self, trainer: Trainer, recorder: KernelRecorder, seed: int) -> None:
        self.trainer, self.recorder, self.seed = trainer, recorder, seed
        self.seen = 0

    def train(self, inputs: Any, targets: Tensor, weights: Tensor) -> float:
        """Train one epoch on further samples; the mean loss."""
        trainer = replace(self.trainer, weights=weights)
        with seeded(self.seed + self.seen), self.recorder:
            loss = trainer.train_once(self.recorder, inputs, targets, self.seen)
        self.trainer.network.eval()
        self.seen += len(targets)
        return loss


class IncrementalEstimator(NetworkEstimator):
    """Estimator with ``partial_fit``."""

    def _partial_fit(self, X: Any, y: Any, sample_weight: Any) -> FittedOn:
        self._check_parameters()
        begun = hasattr(self, "network_")
        fitted = self._checked(X, y, sample_weight, reset=not begun, encode=self._encoded_again)
        session = self.__dict__.get("_session")
        if session is None:
            seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
            with seeded(seed):
                network, loss = self._made(fitted, go_on=True)
                trainer = self._trainer(network, loss_per_sample(loss), None, seed)
            session = self._session = Session(trainer, self._recorded(trainer, None, None), seed)
            self.loss_curve_, self.validation_curve_, self.n_iter_ = [], [], 0
        counted = torch.from_numpy(fitted.ids)
        weights = np.ones(len(fitted.values)) if fitted.weights is None else fitted.weights
        inputs, targets = self._tensors(fitted.inputs), self._target_tensor(fitted.values)
        mean_loss = session.train(take(inputs, counted), targets[counted], torch.from_numpy(weights[fitted.ids]))
        self.trajectory_ = session.recorder.trajectory
        self.loss_curve_.append(mean_loss)
        self.n_iter_ += 1
        return fitted

    def __getstate__(self) -> dict[str, Any]:
        # Hooks and a live optimizer do not travel: where training goes on after that, a new record begins.
        return {name: value for name, value in super().__getstate__().items() if name != "_session"}
