"""`KernelMachineClassifier` and `KernelMachineRegressor`: networks that predict as kernel machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from sklearn.base import ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from pathkernel._typing import Loss
from pathkernel.estimators.incremental import IncrementalEstimator
from pathkernel.estimators.network_estimator import FittedOn, all_or_nothing
from pathkernel.estimators.tasks import NetworkClassification, NetworkRegression
from pathkernel.gradients.pytrees import copied_samples, take
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.kernel_machine.classification import probabilities
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.trajectory.schedule import Every, RecordingLevel, RunSize, Schedule

RECORD_BYTES = 2**30
"""Memory up to which all of every step is kept. Chosen, not measured: keyframes take little of it, but steps that are
trained once more between them come out the same on the same machine only."""

CERTIFIED = 8
"""Training samples on which the certificate of a fitted estimator is measured."""

NODES = 8
"""Stretches of the path of which `kernel_` takes one node or two each."""


class KernelMachineEstimator(IncrementalEstimator):
    """Estimator whose prediction is the exact sum over its training samples."""

    schedule: RecordingLevel | None
    machine_: KernelMachine

    def _schedule(self, run: RunSize) -> RecordingLevel:
        if self.schedule is not None:
            return self.schedule
        fits = Every().bytes_per_step(run) * run.steps <= RECORD_BYTES
        return Every() if fits else Schedule.keyframes_for(run.steps)

    def _fit(self, X: Any, y: Any, sample_weight: Any) -> None:
        self.__dict__.pop("_session", None)
        self._make_machine(self._fit_network(X, y, sample_weight))
        # The table of displacements is part of fitting; what no machine can say is refused here, not by `predict`.
        with self._threads():
            self.machine_.decision_function(self._certified)

    def _make_machine(self, fitted: FittedOn) -> None:
        for name in ("kernel_", "certificate_"):  # those of a fit before
            self.__dict__.pop(name, None)
        self._certified = copied_samples(take(fitted.inputs, slice(0, CERTIFIED)))
        self.machine_ = KernelMachine(self.trajectory_, keep=True)
        self._number_of_threads = torch.get_num_threads()

    @contextmanager
    def _threads(self) -> Iterator[None]:
        """Compute with as many threads as training did, where steps are trained once more.

        joblib's processes have one each, and sums of floating-point numbers depend on how many there are.
        """
        before = torch.get_num_threads()
        other = self._number_of_threads if self.trajectory_.store.replays else before
        if other == before:
            yield
            return
        torch.set_num_threads(other)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _outputs_of(self, X: Any, exact: bool) -> np.ndarray:
        """Outputs (n, C) float64: of the machine, or of the network."""
        inputs = self._queries(X)
        if not exact:
            return self._network_outputs(inputs)
        with self._threads():
            found = self.machine_.decision_function(inputs)
        return found[:, None] if found.ndim == 1 else found

    def explain(self, X: Any, outputs: Any = None, **options: Any) -> Attributions:
        """Shares: by how much each sample of ``fit`` moved each query output; see `pathkernel.KernelMachine.explain`.

        Parameters
        ----------
        X
            n samples.
        outputs, **options
            As `pathkernel.KernelMachine.explain` takes them; by default the predicted class of a classifier (the
            logit where it has one), and every output of a regressor.

        Returns
        -------
        Attributions
            Shares (Q, N), whose columns are the rows of the X of ``fit``; channels, and the certificate.
        """
        inputs = self._queries(X)
        with self._threads():
            return self.machine_.explain(inputs, outputs, **options)

    @cached_property
    def kernel_(self) -> PathKernel:
        """The path kernel of the network, made when it is first asked for."""
        check_is_fitted(self)
        return PathKernel(self.trajectory_, steps=min(NODES, len(self.trajectory_)))

    @cached_property
    def certificate_(self) -> dict[str, float]:
        """Errors of the sum on a few training samples, measured when they are first asked for.

        ``residual`` and ``quadrature_error`` are relative to the largest output; ``split_error`` is that of the split
        between samples.
        """
        check_is_fitted(self)
        with self._threads():
            why = self.machine_.explain(self._certified)
        largest = max(float(abs(why.output).max()), 1e-12)
        return {
            "residual": float(why.relative_residual),
            "quadrature_error": float(abs(why.quadrature_error).max()) / largest,
            "split_error": float(why.split_error),
        }


class KernelMachineClassifier(ClassifierMixin, KernelMachineEstimator, NetworkClassification):
    r"""A network trained in ``fit`` that predicts as a kernel machine: an exact sum over its training samples.

    .. math:: f(x) = f(x; \theta_0) + \sum_{i=1}^N \mathrm{share}_i(x) + \sum_{\text{channels}} \mathrm{channel}(x)

    Parameters
    ----------
    module
        The network: a `torch.nn.Module`, of which a copy is trained from its own weights, or a function or class that
        makes one, called with those of ``n_features`` and ``n_outputs`` that it names. None for a multilayer perceptron
        on standardised inputs, in float64. Samples of a module may have any number of axes.
    hidden
        Widths of the perceptron's hidden layers.
    optimizer
        ``"adamw"``, ``"adam"``, ``"sgd"``, or what makes an optimizer of parameters and ``lr=``.
    loss
        ``(output, target) ->`` a scalar or one number per sample; by default cross-entropy, of one logit for two
        classes. Targets are places of classes (n,) int64, or 0 and 1 (n, 1) for a network with one output.
    epochs, batch_size, learning_rate
        Of the training.
    data
        A data set whose samples scikit-learn cannot hold (tokens, dicts, images): X then holds their places in it,
        ``numpy.arange(n)``. What gives ``(input, target)`` gives its input; targets are y.
    device
        Where the network is trained; the CPU by default.
    random_state
        Seed of the weights, of the order of samples and of what is held out. torch's own generators stay as they are.
    early_stopping
        Whether ``validation_fraction`` of the samples is held out, training stops after ``n_iter_no_change`` epochs
        without a loss on it that is lower by ``tol``, and the network is that of the epoch where it was lowest.
    validation_fraction, n_iter_no_change, tol
        See ``early_stopping``.
    class_weight
        ``"balanced"``, or a dict of weights by class, which multiply the weights of samples.
    callbacks
        Functions of this estimator, called after each epoch, that stop training by returning True.
    verbose
        Whether the loss of each epoch is printed.
    warm_start
        Whether ``fit`` goes on from the weights of the last ``fit``. The record begins there: what was learnt before is
        in the channel ``"initial"``.
    schedule
        What is kept of each step, as `pathkernel.KernelRecorder` takes it. By default all of it up to 1 GB, and beyond
        that `pathkernel.Keyframes`, between which steps are trained once more when they are asked for.

    Attributes
    ----------
    network_
        The trained network. The perceptron takes X as it was given to ``fit``.
    trajectory_
        The recorded path.
    machine_
        `pathkernel.KernelMachine` of it.
    kernel_
        `pathkernel.PathKernel` of it.
    certificate_
        Errors of the sum, on a few training samples.
    loss_curve_, validation_curve_
        Loss of each epoch, of training and of what is held out.
    n_iter_
        Number of epochs.
    classes_, n_features_in_, feature_names_in_
        As in scikit-learn.

    Notes
    -----
    Samples of weight 0 are trained on as if they were not there; their shares are 0. In one batch, weights are the same
    as repetitions.

    Examples
    --------
    >>> import pathkernel as pk
    >>> from sklearn.datasets import load_wine
    >>> X, y = load_wine(return_X_y=True)
    >>> classifier = pk.KernelMachineClassifier(hidden=(16,), epochs=5, random_state=0).fit(X, y)
    >>> bool((classifier.predict(X) == classifier.predict(X, exact=False)).all())
    True
    >>> classifier.explain(X[:2]).shares.shape
    (2, 178)
    """

    def __init__(
        self,
        module: Any = None,
        *,
        hidden: int | Sequence[int] = (100,),
        optimizer: Any = "adamw",
        loss: Loss | None = None,
        epochs: int = 30,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        data: Any = None,
        device: str | torch.device | None = None,
        random_state: Any = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        class_weight: Any = None,
        callbacks: Any = None,
        verbose: bool | int = False,
        warm_start: bool = False,
        schedule: RecordingLevel | None = None,
    ) -> None:
        self._keep(locals())

    @all_or_nothing
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> KernelMachineClassifier:
        """Train the network, and make the machine.

        Parameters
        ----------
        X
            (n, d), or (n, …) for a network of your own; places (n,) with ``data=``.
        y
            Labels (n,), numbers or text.
        sample_weight
            (n,), by which the samples' losses are weighted.

        Raises
        ------
        InputError
            For samples or labels that scikit-learn's own estimators refuse, in their words.
        """
        self._fit(X, y, sample_weight)
        return self

    @all_or_nothing
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> KernelMachineClassifier:
        """Train one epoch on further samples; the machine is a sum over the samples of all calls.

        Parameters
        ----------
        X, y, sample_weight
            As of `fit`.
        classes
            All classes that there will be, needed in the first call.

        Notes
        -----
        The perceptron standardises by the samples of the first call. What the network was given is kept; columns of
        shares are samples with a weight, in the order of their calls. After `fit`, and in a copy that was loaded from a
        pickle, a new record begins: what was learnt before is in the channel ``"initial"``.
        """
        self._know_classes(classes)
        self._make_machine(self._partial_fit(X, y, sample_weight))
        return self

    def decision_function(self, X: Any, exact: bool = True) -> np.ndarray:
        """Logits (n, C), or (n,) for two classes: that of the second, or by how much it exceeds the first.

        Parameters
        ----------
        X
            n samples.
        exact
            True for the machine, False for the network.
        """
        return self._decision(self._outputs_of(X, exact))

    def predict(self, X: Any, exact: bool = True) -> np.ndarray:
        """Labels (n,): of the machine, or of the network where ``exact=False``."""
        return self._labels(self.decision_function(X, exact))

    def predict_proba(self, X: Any, exact: bool = True) -> np.ndarray:
        """Probabilities (n, C) under the loss that the network was trained with.

        Raises
        ------
        InputError
            For losses that define none.
        """
        outputs = torch.from_numpy(self._outputs_of(X, exact))
        return probabilities(self.trajectory_.objective.function("`predict_proba`"), outputs).numpy()


class KernelMachineRegressor(RegressorMixin, KernelMachineEstimator, NetworkRegression):
    """A network trained in ``fit`` that predicts numbers as a kernel machine; see `KernelMachineClassifier`.

    Parameters
    ----------
    module, hidden, optimizer, epochs, batch_size, learning_rate, data, device, random_state, early_stopping
        As of `KernelMachineClassifier`. The perceptron standardises the targets, too: its outputs are in their units.
    validation_fraction, n_iter_no_change, tol, callbacks, verbose, warm_start, schedule
        Of the same.
    loss
        ``(output, target) ->`` a scalar or one number per sample, both (n, k); by default the squared error, for the
        perceptron in units of the targets' variance.

    Examples
    --------
    >>> import pathkernel as pk
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> regressor = pk.KernelMachineRegressor(hidden=(16,), epochs=5, random_state=0).fit(X, y)
    >>> bool(abs(regressor.predict(X) - regressor.predict(X, exact=False)).max() < 1e-6)
    True
    """

    def __init__(
        self,
        module: Any = None,
        *,
        hidden: int | Sequence[int] = (100,),
        optimizer: Any = "adamw",
        loss: Loss | None = None,
        epochs: int = 30,
        batch_size: int = 64,
        learning_rate: float = 1e-3,
        data: Any = None,
        device: str | torch.device | None = None,
        random_state: Any = None,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        callbacks: Any = None,
        verbose: bool | int = False,
        warm_start: bool = False,
        schedule: RecordingLevel | None = None,
    ) -> None:
        self._keep(locals())

    @all_or_nothing
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> KernelMachineRegressor:
        """Train the network, and make the machine; y is (n,) or (n, k), the rest as of `KernelMachineClassifier`."""
        self._fit(X, y, sample_weight)
        return self

    @all_or_nothing
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> KernelMachineRegressor:
        """Train one epoch on further samples; see `KernelMachineClassifier.partial_fit`."""
        self._make_machine(self._partial_fit(X, y, sample_weight))
        return self

    def predict(self, X: Any, exact: bool = True) -> np.ndarray:
        """Numbers (n,) or (n, k): of the machine, or of the network where ``exact=False``."""
        return self._numbers(self._outputs_of(X, exact))
