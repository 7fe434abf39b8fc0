"""What estimators share that train a network inside ``fit``."""

from __future__ import annotations

import copy
import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from sklearn.base import BaseEstimator, _clone_parametrized
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, PyTree
from pathkernel.errors import InputError, check_number, is_number
from pathkernel.estimators.networks import (
    Moments,
    check_hidden,
    made_network,
    made_optimizer,
    multilayer_perceptron,
    seeded,
)
from pathkernel.estimators.samples import IndexedRows, Rows, checked_weights, in_three_parts
from pathkernel.estimators.targets import beside, loss_per_sample
from pathkernel.estimators.training import Course, Stopping, Trainer, called
from pathkernel.gradients.acceptance import with_floats
from pathkernel.gradients.losses import check_loss
from pathkernel.gradients.pytrees import as_tensors, moved, take
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.trajectory.schedule import RecordingLevel, RunSize
from pathkernel.trajectory.trajectory import Trajectory

Encoding = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, np.ndarray | None]]
"""Turns checked targets and weights of samples into numbers and weights."""


@dataclass(frozen=True)
class FittedOn:
    """Samples that an estimator was fitted on, as its network takes them.

    Attributes
    ----------
    inputs
        Along their first axis, all that were given.
    values
        Places of classes or numbers, (n,) or (n, k).
    weights
        (n,), or None.
    ids
        Samples with a weight.
    """

    inputs: PyTree
    values: np.ndarray
    weights: np.ndarray | None
    ids: np.ndarray


M = TypeVar("M", bound=Callable[..., Any])


def all_or_nothing(method: M) -> M:
    """A method that leaves the estimator as it was where it fails: with what it had learnt before, or nothing."""

    @functools.wraps(method)
    def whole(self: NetworkEstimator, *arguments: Any, **options: Any) -> Any:
        before = dict(vars(self))
        try:
            return method(self, *arguments, **options)
        except BaseException:
            self.__dict__.clear()
            self.__dict__.update(before)
            raise

    return whole  # type: ignore[return-value]


class NetworkEstimator(BaseEstimator):
    """Estimator that trains its network on the samples of ``fit``, recorded.

    Cross-validation trains it anew on every fold, so that labels that are held out do not leak into a kernel.
    """

    module: Any
    hidden: Any
    optimizer: Any
    loss: Loss | None
    epochs: int
    batch_size: int
    learning_rate: float
    data: Any
    device: str | torch.device | None
    random_state: Any
    early_stopping: bool
    validation_fraction: float
    n_iter_no_change: int
    tol: float
    callbacks: Any
    verbose: bool | int
    warm_start: bool

    network_: nn.Module
    trajectory_: Trajectory
    loss_curve_: list[float]
    validation_curve_: list[float]
    n_iter_: int

    _moments: Moments | None
    _outputs: int
    _floats: bool = False

    def _keep(self, parameters: Mapping[str, Any]) -> None:
        """Keep the arguments of the constructor, as they are."""
        self.__dict__.update({n: value for n, value in parameters.items() if n not in ("self", "__class__")})

    # -- what kinds of estimators say of themselves -----------------------------------------------------------

    task: ClassVar[str]
    _target_checks: ClassVar[Mapping[str, Any]]

    @abstractmethod
    def _encoded(self, y: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Targets as numbers, and the weights of the samples with those of their classes."""

    def _encoded_again(self, y: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        """Targets of ``partial_fit`` as numbers, and weights."""
        return self._encoded(y, weights)

    @abstractmethod
    def _wanted_outputs(self, values: np.ndarray) -> int:
        """Outputs of a network that is made for such targets."""

    @abstractmethod
    def _loss_of(self, outputs: int, targets: Moments | None) -> Loss:
        """The loss that was given, or the one of this kind of estimator."""

    @abstractmethod
    def _targets(self, values: np.ndarray, outputs: int, dtype: torch.dtype) -> Tensor:
        """Targets as the loss takes them."""

    @abstractmethod
    def _schedule(self, run: RunSize) -> RecordingLevel:
        """What is kept of each step."""

    # -- fitting ----------------------------------------------------------------------------------------------

    @property
    def _samples(self) -> Rows | IndexedRows:
        return Rows(any_dimension=self.module is not None) if self.data is None else IndexedRows(self.data)

    def _fit_network(self, X: Any, y: Any, sample_weight: Any) -> FittedOn:
        """Train the network; sets everything that is learnt of it."""
        self._check_parameters()
        fitted = self._checked(X, y, sample_weight)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        with seeded(seed):
            network, loss = self._made(fitted, go_on=self.warm_start)
            trainer = self._trainer(network, loss, fitted.weights, seed)
            stopping = self._stopping(fitted, seed)
            trained = fitted.ids if stopping is None else np.setdiff1d(fitted.ids, stopping.held_out.numpy())
            recorder = self._recorder(trainer, fitted, len(trained))
            with recorder:
                course = trainer.train(recorder, torch.from_numpy(trained), self.epochs, stopping)
        network.eval()
        trajectory = recorder.trajectory
        if course.best is not None and course.best < len(trajectory):
            trajectory = trajectory.until(course.best)
            weights = trajectory.layout.unflatten(trajectory.final.clone())
            network.load_state_dict({**weights, **trajectory.final_buffers}, strict=False)
        self.trajectory_ = trajectory
        self._note(course)
        return fitted

    def _checked(
        self, X: Any, y: Any, sample_weight: Any, reset: bool = True, encode: Encoding | None = None
    ) -> FittedOn:
        samples = self._samples
        X, y = samples.checked(self, X, self._required(y), reset=reset, **self._target_checks)
        # Copies: the record holds the samples, and outlives what the user does with the arrays.
        X = np.array(X, order="K")
        values, weights = (encode or self._encoded)(y, checked_weights(sample_weight, X))
        ids = np.arange(len(values)) if weights is None else np.flatnonzero(weights)
        return FittedOn(samples.inputs(X), values, weights, ids)

    def _required(self, y: Any) -> Any:
        if y is None:
            raise InputError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y is None",
                "The network is trained on samples with their targets",
                "Write `fit(X, y)`",
            )
        return y

    def _made(self, fitted: FittedOn, go_on: bool) -> tuple[nn.Module, Loss]:
        """The network, which goes on from the last one if there is one, and its loss as a function of a batch."""
        outputs = self._wanted_outputs(fitted.values)
        if go_on and hasattr(self, "network_"):
            network = copy.deepcopy(self.network_)  # the last path has the other
        elif self.module is None:
            X = self._columns(fitted.inputs)
            values = fitted.values.reshape(len(fitted.values), -1)
            self._moments = targets = _moments(values, fitted.weights) if self.task == "regression" else None
            network = multilayer_perceptron(_moments(X, fitted.weights), check_hidden(self.hidden), outputs, targets)
        else:
            leaf = fitted.inputs
            features = leaf.shape[1] if isinstance(leaf, np.ndarray) and leaf.ndim == 2 else None
            network, self._moments = made_network(self.module, features, outputs), None
        self.network_ = network.to(self.device or "cpu")
        self._outputs = self._found_outputs(fitted.inputs)
        loss = self._loss_of(self._outputs, self._moments)
        return network, beside(loss, self._dtype, torch.device(self.device or "cpu"))

    def _columns(self, inputs: PyTree) -> np.ndarray:
        """Samples as rows of numbers, for the multilayer perceptron."""
        X = np.asarray(inputs) if isinstance(inputs, (np.ndarray, Tensor)) else None
        if X is None or X.ndim != 2:
            raise InputError(
                f"{type(self).__name__} was given no `module`, and samples of "
                f"{'shape ' + str(X.shape) if X is not None else 'a ' + type(inputs).__name__}",
                "The network that it makes by itself takes rows of numbers, (n_samples, n_features)",
                f"Write `{type(self).__name__}(module=nn.Sequential(...))`",
            )
        return X

    def _tensors(self, inputs: PyTree) -> PyTree:
        """Samples on the network's device, in its floating type."""
        tensors = as_tensors(inputs, self._dtype)
        tensors = with_floats(tensors, self._dtype) if self._floats else tensors
        return moved(tensors, torch.device(self.device or "cpu"))

    def _found_outputs(self, inputs: PyTree) -> int:
        """How many outputs the network has, tried on two samples; integers become floating where it takes none.

        Raises
        ------
        InputError
            Where it takes neither, or returns no tensor.
        """
        self._floats = False
        if self.module is None:
            return next(m.out_features for m in reversed(list(self.network_.modules())) if isinstance(m, nn.Linear))
        few = self._tensors(take(inputs, slice(0, 2)))
        self.network_.eval()
        found: Any = None
        with torch.no_grad():
            try:
                found = called(self.network_, few)
            except Exception as error:  # whatever the user's network raises
                try:
                    found = called(self.network_, with_floats(few, self._dtype))
                except Exception:
                    shapes = ", ".join(str(tuple(leaf.shape[1:])) for leaf in pytree.tree_leaves(few))
                    raise InputError(
                        f"The network could not be run on samples of shape {shapes} ({type(error).__name__}: {error})",
                        "It takes a batch of samples as they are in X, along the first axis",
                        "Give a `module` for samples of this shape, or reshape X",
                    ) from error
                self._floats = True
        if not isinstance(found, Tensor):
            raise InputError(
                f"The network returned a {type(found).__name__}",
                "Estimators train networks that return one tensor, a row of outputs for each sample",
                "Wrap the network in a module that returns the one, or train it with `pathkernel.KernelRecorder`",
            )
        return int(found.shape[1:].numel())

    def _trainer(self, network: nn.Module, loss: Loss, weights: np.ndarray | None, seed: int) -> Trainer:
        return Trainer(
            network=network,
            optimizer=made_optimizer(self.optimizer, network, self.learning_rate),
            loss=loss if weights is None else loss_per_sample(loss),
            weights=None if weights is None else torch.from_numpy(weights),
            batch_size=self.batch_size,
            generator=torch.Generator().manual_seed(seed),
            after_epoch=self._after_epoch,
        )

    def _recorder(self, trainer: Trainer, fitted: FittedOn, trained: int) -> KernelRecorder:
        run = RunSize(
            parameters=sum(p.numel() for p in trainer.network.parameters() if p.requires_grad),
            steps=self.epochs * math.ceil(trained / self.batch_size),
            batch_size=min(self.batch_size, trained),
            bytes_per_number=self._dtype.itemsize,
        )
        # Copies: the user may fill the same array anew, and the record refers to its samples.
        inputs = pytree.tree_map(torch.clone, self._tensors(fitted.inputs))
        data = inputs, self._target_tensor(fitted.values)
        return self._recorded(trainer, data, self._schedule(run))

    def _recorded(self, trainer: Trainer, data: Any, schedule: RecordingLevel | None) -> KernelRecorder:
        return KernelRecorder(
            trainer.network,
            trainer.optimizer,
            trainer.loss,
            data=data,
            task=self.task,
            schedule=schedule,
            # The network that is made here is known to be recorded right; those of users are tried.
            audit_every=0 if self.module is None else None,
        )

    @property
    def _dtype(self) -> torch.dtype:
        """Floating type of the network."""
        first = next(self.network_.parameters(), None)
        return torch.get_default_dtype() if first is None else first.dtype

    def _target_tensor(self, values: np.ndarray) -> Tensor:
        """Targets as the loss takes them, on the network's device."""
        return self._targets(values, self._outputs, self._dtype).to(torch.device(self.device or "cpu"))

    def _stopping(self, fitted: FittedOn, seed: int) -> Stopping | None:
        if not self.early_stopping:
            return None
        labels = fitted.values[fitted.ids] if self.task == "classification" else None
        try:
            _, held_out = train_test_split(
                fitted.ids, test_size=self.validation_fraction, random_state=seed, stratify=labels
            )
        except ValueError as error:
            raise InputError(
                f"`validation_fraction={self.validation_fraction}` of {len(fitted.ids)} samples cannot be held out "
                f"({str(error).rstrip('.')})",
                "Early stopping holds out samples of every class, and trains on others of every class",
                f"Write `{type(self).__name__}(early_stopping=False)`, or give more samples",
            ) from error
        return Stopping(torch.from_numpy(np.sort(held_out)), self.n_iter_no_change, self.tol)

    def _after_epoch(self, course: Course) -> bool:
        self._note(course)
        if self.verbose:
            held_out = f", validation loss = {course.validation_curve[-1]:.6f}" if course.validation_curve else ""
            print(f"Epoch {self.n_iter_}, loss = {self.loss_curve_[-1]:.6f}{held_out}")
        return any([bool(callback(self)) for callback in self.callbacks or ()])

    def _note(self, course: Course) -> None:
        self.loss_curve_, self.validation_curve_ = course.loss_curve, course.validation_curve
        self.n_iter_ = len(course.loss_curve)

    def _check_parameters(self) -> None:
        """Refuse settings that no training can be made of.

        Raises
        ------
        InputError
            For the first of them.
        """
        check_hidden(self.hidden)
        for name in ("epochs", "batch_size", "n_iter_no_change"):
            check_number(name, getattr(self, name), positive=True, whole=True, example=20)
        check_number("learning_rate", self.learning_rate, positive=True, example=1e-3)
        check_number("tol", self.tol, example=1e-4)
        fraction = self.validation_fraction
        if self.early_stopping and not (is_number(fraction) and 0 < fraction < 1):
            raise InputError(
                f"`validation_fraction={fraction!r}` was given",
                "It is the part of the samples that is held out, between 0 and 1",
                "Write `validation_fraction=0.1`",
            )
        callbacks = () if self.callbacks is None else self.callbacks
        if not isinstance(callbacks, Iterable) or not all(map(callable, callbacks)):
            raise InputError(
                f"`callbacks={self.callbacks!r}` was given",
                "It is a list of functions, each of which is called with the estimator after every epoch",
                "Write `callbacks=[function]`",
            )
        if self.loss is not None:
            check_loss(self.loss)
        with in_three_parts():
            check_random_state(self.random_state)
        try:
            torch.device(self.device or "cpu")
        except (RuntimeError, TypeError) as error:
            raise InputError(
                f"`device={self.device!r}` was given",
                "It is a device of torch, or None for the processor",
                'Write `device="cuda"`',
            ) from error

    # -- asking -----------------------------------------------------------------------------------------------

    def _check_fitted(self) -> None:
        check_is_fitted(self)

    def _queries(self, X: Any) -> PyTree:
        """Samples that are asked about, checked as those of ``fit`` were, as the network takes them."""
        self._check_fitted()
        samples = self._samples
        return samples.inputs(samples.checked(self, X))

    def _network_outputs(self, inputs: PyTree) -> np.ndarray:
        """What the network returns, (n, C) float64."""
        path = self.trajectory_
        function = path.function().with_(constants=dict(path.final_buffers))
        found = function.outputs(path.final, path.queries(inputs, type(self).__name__))
        return found.double().cpu().numpy()

    # -- scikit-learn -----------------------------------------------------------------------------------------

    def __sklearn_clone__(self) -> Any:
        """A clone that shares the data set: a copy of it would take its memory once more for every fold."""
        other = object.__new__(type(self))
        other.__dict__.update(vars(self), data=None)
        cloned = _clone_parametrized(other)
        cloned.data = self.data
        return cloned

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array = self.data is not None
        tags.input_tags.three_d_array = self.data is None and self.module is not None
        return tags


def _moments(X: np.ndarray, weights: np.ndarray | None) -> Moments:
    scaler = StandardScaler().fit(np.asarray(X, dtype=np.float64), sample_weight=weights)
    return Moments(torch.from_numpy(scaler.mean_), torch.from_numpy(scaler.scale_))
