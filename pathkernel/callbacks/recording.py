"""Common ground of the callbacks: a recorder whose life is that of a framework's training."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, Parameters, PyTree
from pathkernel.callbacks.kept_weights import steps_of_weights, weights_now
from pathkernel.errors import CertificateWarning, InputError, PathKernelError, TrajectoryError
from pathkernel.gradients.batch_axes import BatchAxis
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.returned import Returns
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.recording.watched import Watch
from pathkernel.trajectory.observer import StepObserver
from pathkernel.trajectory.schedule import RecordingLevel
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import UpdateRule


class RecorderOptions(TypedDict, total=False):
    """Arguments of `pathkernel.KernelRecorder` that a callback hands on: all but the model and the optimizers."""

    loss: Loss | str | None
    data: Any
    returns: Returns
    outputs: Returns
    watch: Watch
    batch_axis: BatchAxis
    keep: bool | None
    task: str | None
    rule: UpdateRule | str | Sequence[UpdateRule | str | None] | None
    reduction: str
    regularizers: Mapping[str, Callable[[Parameters], Tensor]] | None
    averages: Mapping[str, nn.Module | Mapping[str, Tensor]] | None
    audit_every: int | None
    store: str | os.PathLike[str] | Store | bool | None
    schedule: RecordingLevel | None
    observers: Sequence[StepObserver]


FOLDER = "pathkernel"
"""Name of the store in a run's own folder."""


class FrameworkRecording:
    """The recording of a network that a framework trains, over one or several calls of its ``fit``.

    Parameters
    ----------
    callback
        Name of the callback's class, for messages.
    options
        What its user gave it for `pathkernel.KernelRecorder`.
    certify
        How many training samples are explained when training ends, to measure how exactly.
    record
        The path of an earlier training, where nothing is recorded any more.

    Attributes
    ----------
    recorder
        The recorder, once training has begun.

    Raises
    ------
    InputError
        For an option that the recorder does not have, and for a ``certify`` that is no number of samples.
    """

    def __init__(
        self, callback: str, options: RecorderOptions, certify: int = 0, record: Trajectory | None = None
    ) -> None:
        unknown = sorted(set(options) - set(RecorderOptions.__annotations__))
        if unknown:
            raise InputError(
                f"{callback} was given {', '.join(f'`{name}=`' for name in unknown)}",
                f"It takes what the recorder takes: {', '.join(RecorderOptions.__annotations__)}",
                f'Write for example `{callback}(returns="logits", store="runs/first")`',
            )
        if not isinstance(certify, int) or isinstance(certify, bool) or certify < 0:
            raise InputError(
                f"{callback} was given `certify={certify!r}`",
                "It is the number of training samples that are explained when training ends, to measure how exactly",
                f"Write `{callback}(certify=2)`, or `certify=0` for none",
            )
        self._callback, self._options, self._certify = callback, options, certify
        self.recorder: KernelRecorder | None = None
        self._record = record
        self._machine: KernelMachine | None = None
        self._machine_of: tuple[int, Tensor | None] = 0, None

    def start(self, model: nn.Module, optimizers: Sequence[Optimizer], **found: Any) -> KernelRecorder:
        """Record from here on.

        Parameters
        ----------
        model, optimizers
            What the framework trains.
        found
            Options that follow from what the framework was given; the user's own go before.
        """
        options = {**found, **self._options}
        self._machine = None
        self.recorder = KernelRecorder(model, list(optimizers), **options)
        self.recorder.start()
        return self.recorder

    def close(self) -> None:
        """Let go of the optimizers."""
        if self.recorder is not None:
            self._machine = None
            self.recorder.close()

    @property
    def trajectory(self) -> Trajectory:
        """The path recorded so far.

        Raises
        ------
        TrajectoryError
            Before training.
        """
        if self._record is not None:
            return self._record
        if self.recorder is None:
            raise TrajectoryError(
                f"The {self._callback} has not seen any training yet",
                "What is recorded are the steps of a framework's optimizer",
                f"Give the {self._callback} to the framework's callbacks, and train",
            )
        return self.recorder.trajectory

    @property
    def machine(self) -> KernelMachine:
        """The network as a kernel machine: with the weights that it has now, the last on its path or earlier ones."""
        trajectory = self.trajectory
        theta = weights_now(trajectory)
        steps, known = self._machine_of
        same = steps == len(trajectory) and theta is not None and known is not None and torch.equal(theta, known)
        if self._machine is None or not same:  # looking for weights on the path reads it
            at = steps_of_weights(trajectory)
            self._machine, self._machine_of = KernelMachine(trajectory, at=at), (len(trajectory), theta)
        return self._machine

    def certificate(self, X: PyTree = None, outputs: Any = None) -> dict[str, float]:
        """How far the kernel machine is from the network at some samples: numbers for a logger.

        Parameters
        ----------
        X
            Samples; by default some that were trained on, as many as ``certify`` says.
        outputs
            Which outputs of each, as `KernelMachine.explain` takes them.

        Returns
        -------
        ``residual``, ``quadrature_error`` and ``split_error``, the first two relative to the largest output; without
        those that were not measured.
        """
        with generators_untouched():
            X = some_samples(self.trajectory, self._certify or 1) if X is None else X
            why = self.machine.explain(X, outputs)
        largest = max(float(abs(why.output).max()), 1e-12)
        errors = {
            "residual": why.relative_residual,
            "quadrature_error": float(abs(why.quadrature_error).max()) / largest,
            "split_error": why.split_error,
        }
        return {name: error for name, error in errors.items() if math.isfinite(error)}

    def certificate_at_end(self, outputs: Any = None) -> dict[str, float]:
        """The certificate of some training samples; empty where there is none, with a warning if one was wanted.

        Training has ended well, and what comes after it is to go on.

        Warns
        -----
        CertificateWarning
            With what stood in the way.
        """
        if not (self._certify and self.recorder is not None and len(self.trajectory)):
            return {}
        try:
            return self.certificate(outputs=outputs)
        except Exception as error:  # whatever the user's network raises
            found, expected = f"{type(error).__name__}: {error}", "Some samples are explained when training ends"
            if isinstance(error, PathKernelError):
                found, expected = error.found, f"{error.expected} ({error.write})"
            warnings.warn(
                CertificateWarning(
                    f"The record of this training could not be certified: {found}",
                    expected,
                    f"Write `{self._callback}(certify=0)`, which does not try",
                ),
                stacklevel=3,
            )
            return {}


def some_samples(trajectory: Trajectory, n: int) -> PyTree:
    """Inputs of the first samples of the last batch, as the network was given them.

    Raises
    ------
    InputError
        Where no batch on record holds its inputs.
    """
    for step in reversed(range(len(trajectory))):
        for batch in trajectory.store.read(step).batches:
            if batch.inputs is not None:
                inputs = pytree.tree_map(lambda leaf: leaf[:n], batch.inputs)
                return dict(inputs) if isinstance(inputs, Mapping) else inputs
            if not trajectory.data.announced:
                return trajectory.data[batch.ids[:n]][0]
    raise InputError(
        "No batch on record holds its inputs",
        "Samples that are explained for the logger are those of the last batch on record",
        "Record steps in full, without `schedule=`, or give samples of your own",
    )
