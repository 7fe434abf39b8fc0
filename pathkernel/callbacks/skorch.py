"""`SkorchRecorder`: records training inside skorch."""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Unpack

from pathkernel.callbacks.kept_weights import is_at_end
from pathkernel.callbacks.recording import FrameworkRecording, RecorderOptions
from pathkernel.callbacks.skorch_net import check_optimizers, found_data, loss_of, same_data, task_of
from pathkernel.callbacks.versions import check_version
from pathkernel.errors import InputError, RecordingError, TrajectoryError
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.recording.indexed import PartOfData, indexed, is_map_style
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.trajectory.trajectory import Trajectory

check_version("skorch")

from skorch.callbacks import Callback  # noqa: E402 - its absence has a message of our own


class SkorchRecorder(Callback):
    """Callback of skorch that records training.

    Ids of samples are their places in the ``X`` that ``fit`` was given. Samples that skorch holds out for validation
    are among them, with shares of 0.

    Parameters
    ----------
    certify
        For how many of those trained on last, residual, quadrature error and split error are written into
        ``net.history[-1]`` at the end of training, which takes one explanation; by default none, as searches train many
        nets.
    **options
        Arguments of `pathkernel.KernelRecorder`, all but the model and the optimizer. The data, the loss and the task
        are those of the net where they are not given. ``data=None`` keeps what the network is given, and counts samples
        over all calls of ``partial_fit``.

    Attributes
    ----------
    recorder
        The recorder of the last training.

    Raises
    ------
    InputError
        For an option that the recorder does not have.
    MissingExtraError
        Where skorch is too old or too new.

    Notes
    -----
    skorch uses a callback that it is given as it is: after ``net.fit``, ``callback.machine`` is at hand. Where
    scikit-learn clones the net, as `sklearn.model_selection.GridSearchCV` does, each clone has a callback of its own,
    ``dict(net.callbacks_)["SkorchRecorder"]``.

    A net that is trained further, by ``partial_fit`` or ``fit`` with ``warm_start``, is recorded further where its
    module with its weights, its optimizer and the data are the same. Otherwise, and in each ``fit`` that begins anew, a
    new record begins; the one before is the user's who kept ``callback.trajectory``.

    A copy or a pickle of a fitted net holds the record, if it can be pickled, with the data that it was trained on, and
    no recorder: after ``net.trim_for_prediction()`` a pickle holds neither.

    Examples
    --------
    >>> import numpy as np, torch, pathkernel as pk, skorch
    >>> X, y = np.random.randn(60, 4).astype("float32"), np.random.randint(2, size=60)
    >>> callback = pk.callbacks.SkorchRecorder()
    >>> net = skorch.NeuralNetClassifier(
    ...     torch.nn.Linear(4, 2), criterion=torch.nn.CrossEntropyLoss, max_epochs=2, callbacks=[callback], verbose=0
    ... )
    >>> net = net.fit(X, y)
    >>> bool((callback.machine.predict(X) == net.predict(X)).all())
    True
    >>> callback.machine.explain(X[:3]).shares.shape
    (3, 60)
    """

    def __init__(self, *, certify: int = 0, **options: Unpack[RecorderOptions]) -> None:
        check_version("skorch")
        FrameworkRecording(type(self).__name__, options, certify)  # checks them
        if isinstance(options.get("store"), bool):
            raise InputError(
                f"SkorchRecorder was given `store={options['store']}`",
                "A net of skorch has no folder of its own",
                'Write a path, `SkorchRecorder(store="runs/first")`',
            )
        self.certify = certify
        self._options = options
        self._forget()

    def _forget(self) -> None:
        """Be as before any training."""
        self._recording: FrameworkRecording | None = None
        self._of: Trained | None = None
        self._handed: Any = None
        self._training, self._net = False, None
        self._waiting: Callable[..., Any] | None = None
        self._anew, self._offset = True, 0
        self._saved: bytes | None = None
        self._lost = ""

    # -- parameters, as scikit-learn has them -------------------------------------------------------------------

    def _get_param_names(self) -> list[str]:
        return ["certify", *self._options]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments that the callback was made with, by name."""
        return {"certify": self.certify, **self._options}

    def set_params(self, **params: Any) -> SkorchRecorder:
        """Change some of the arguments; the next record is made with them.

        Raises
        ------
        InputError
            For one that there is none of.
        """
        made = SkorchRecorder(**{**self.get_params(), **params})
        self.certify, self._options = made.certify, made._options
        return self

    # -- what is recorded ---------------------------------------------------------------------------------------

    @property
    def recorder(self) -> KernelRecorder | None:
        """The recorder of the last training; None before it, and in a copy."""
        return None if self._recording is None else self._recording.recorder

    @property
    def trajectory(self) -> Trajectory:
        """The path recorded so far.

        Raises
        ------
        TrajectoryError
            Before training; in a copy of a net whose record could not be copied.
        """
        return self._recorded.trajectory

    @property
    def machine(self) -> KernelMachine:
        """The trained network as a kernel machine; that of the step whose weights the module has.

        Callbacks such as `skorch.callbacks.Checkpoint` give the module its best weights back when training has ended.
        """
        return self._recorded.machine

    @property
    def _recorded(self) -> FrameworkRecording:
        if self._recording is None and self._saved is not None:
            self._recording, self._saved = (
                FrameworkRecording(type(self).__name__, self._options, self.certify, pickle.loads(self._saved)),
                None,
            )
        if self._recording is None and self._lost:
            raise TrajectoryError(
                f"The record of this net could not be copied: {self._lost}",
                "A copy of a net holds the record of its training where that can be pickled",
                "Give SkorchRecorder a `store=`, and open it with `pathkernel.Trajectory.open`; or ask the callback of "
                "the net that was trained",
            )
        return self._recording or FrameworkRecording(type(self).__name__, self._options, self.certify)

    # -- hooks of skorch ----------------------------------------------------------------------------------------

    def initialize(self) -> SkorchRecorder:
        """Begin a new record with the next training: the net's module is made anew."""
        self._anew = True
        return self

    def on_train_begin(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """Wait for the loader of the training data, which the net makes next.

        Raises
        ------
        RecordingError
            Where another net is being trained with the callback.
        """
        if self._training and self._net is not net:
            raise RecordingError(
                f"SkorchRecorder was given to a {type(net).__name__} that begins while another net is trained with it",
                "A callback has one record, that of the net that is trained",
                "Write `SkorchRecorder()` for each of the two nets",
            )
        self._training, self._net = False, net
        if self._anew:
            self._recording, self._saved, self._lost = None, None, ""
        if self._waiting is not None and vars(net).get("fit_loop") is self._waiting:  # nothing came of it
            del vars(net)["fit_loop"]
        loop = net.fit_loop

        # skorch calls nobody when training ends by an error: this is the place where that is seen.
        def fit_loop(X: Any, y: Any = None, *args: Any, **kwargs: Any) -> Any:
            _restore(net, "fit_loop", loop)
            iterator = net.get_iterator

            def get_iterator(dataset: Any, training: bool = False) -> Any:
                if not training:
                    return iterator(dataset, training=training)
                _restore(net, "get_iterator", iterator)
                loader = iterator(dataset, training=True)
                if isinstance(loader, RecordedBatches):
                    raise RecordingError(
                        f"The {type(net).__name__} has two different callbacks of type SkorchRecorder",
                        "One of them records all that is trained",
                        "Give the net one of them; what is to be kept of steps is said by `schedule=` and `observers=`",
                    )
                return RecordedBatches(loader, lambda: self._begin(net, X, dataset, loader), self._hand_out)

            vars(net)["get_iterator"] = get_iterator
            self._training = True
            try:
                return loop(X, y, *args, **kwargs)
            except BaseException:
                self._close()
                raise
            finally:
                self._training, self._net = False, None
                if vars(net).get("get_iterator") is get_iterator:
                    _restore(net, "get_iterator", iterator)

        vars(net)["fit_loop"] = self._waiting = fit_loop

    def on_batch_begin(self, net: Any, batch: Any = None, training: bool = False, **kwargs: Any) -> None:
        """Check that a training batch came from the loader that carries ids.

        Raises
        ------
        RecordingError
            Where it did not.
        """
        if training and self._training and batch is not self._handed:
            raise RecordingError(
                "A training batch came from a loader that SkorchRecorder has not seen",
                "Ids travel in the batches of the loader that `net.get_iterator(dataset, training=True)` returns first "
                "in a call of `fit`",
                "Take batches in `fit_loop` from `self.get_iterator(dataset_train, training=True)`, made once, as they "
                "are; or train outside of skorch with `pathkernel.KernelRecorder`",
            )

    def on_epoch_end(self, net: Any, dataset_train: Any = None, dataset_valid: Any = None, **kwargs: Any) -> None:
        """Write what was recorded to disk, where there is a store: checkpoints are made now."""
        if self.recorder is not None and self._training:
            self.recorder.flush()

    def on_train_end(self, net: Any, X: Any = None, y: Any = None, **kwargs: Any) -> None:
        """End the record, and write its certificate into the net's history."""
        self._close()
        for name, error in self._recorded.certificate_at_end().items() if len(net.history) else ():
            net.history.record(name, error)

    # -- recording ----------------------------------------------------------------------------------------------

    def _begin(self, net: Any, X: Any, dataset: Any, loader: Any) -> tuple[KernelRecorder, Any]:
        """Start recording, or go on, and say what the recorder is to go through."""
        optimizers = [getattr(net, f"{name}_") for name in net._optimizers]
        check_optimizers(net, optimizers)
        data, places = found_data(dataset, X)
        trained, now = self._of, Trained(net.module_, optimizers, data)
        self._of = now
        counted = "data" in self._options and self._options["data"] is None
        again = trained is not None and same_data(trained.data, data)
        same = trained is not None and trained.is_same_network(now)
        recorder = self._go_on() if same and (again or counted) and not self._anew else None
        if recorder is None:
            found = {"data": data, "loss": loss_of(net), "task": task_of(net)}
            self._recording = FrameworkRecording(type(self).__name__, self._options, self.certify)
            recorder = self._recording.start(net.module_, optimizers, **found)
            self._anew, self._offset = False, 0
        elif counted and not again:
            self._offset = len(recorder.trajectory.data)
        if counted and places is not None and is_map_style(loader):
            return recorder, PartOfData(indexed(loader), places + self._offset)
        return recorder, loader

    def _go_on(self) -> KernelRecorder | None:
        """The recorder of the last training, started again; None where the net is not as that left it."""
        recorder = self.recorder
        if recorder is None or not is_at_end(recorder.trajectory):
            return None
        try:
            recorder.start()
        except RecordingError:  # steps were taken without it
            return None
        return recorder

    def _hand_out(self, batch: Any) -> None:
        self._handed = batch

    def _close(self) -> None:
        self._handed = None
        if self._recording is not None:
            self._recording.close()

    # -- copies -------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """The arguments, and the record if training has ended and it can be pickled."""
        state = {"certify": self.certify, "_options": self._options, "_saved": self._saved, "_lost": self._lost}
        if self._training:
            state["_lost"] = "it was copied while it was trained"
        elif self._recording is not None:
            try:
                state["_saved"] = pickle.dumps(self.trajectory)
            except Exception as error:  # whatever objects of the user raise
                state["_lost"] = str(error)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        self.__dict__.update(state)


@dataclass(frozen=True)
class Trained:
    """Module, optimizers and data that a call of ``fit`` trains.

    Attributes
    ----------
    module, optimizers, data
        The objects themselves.
    """

    module: Any
    optimizers: list[Any]
    data: Any

    def is_same_network(self, other: Trained) -> bool:
        """Test that another call trained the same module by the same optimizers."""
        own, its = (self.module, *self.optimizers), (other.module, *other.optimizers)
        return len(own) == len(its) and all(map(operator.is_, own, its))


class RecordedBatches:
    """A net's loader whose batches are announced as they come.

    Recording starts with the first of them: callbacks that make the weights anew have had their turn.

    Parameters
    ----------
    loader
        As the net made it.
    begin
        Starts recording, and returns the recorder and what it is to go through.
    hand_out
        Is told each batch.
    """

    def __init__(
        self, loader: Any, begin: Callable[[], tuple[KernelRecorder, Any]], hand_out: Callable[[Any], None]
    ) -> None:
        self._loader, self._begin, self._hand_out = loader, begin, hand_out
        self._begun: tuple[KernelRecorder, Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        self._begun = self._begun or self._begin()
        recorder, source = self._begun
        for batch in recorder.track(source):
            self._hand_out(batch)
            yield batch

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_loader"], name)


def _restore(net: Any, name: str, method: Callable[..., Any]) -> None:
    """Give a net its method back: that of its class, or what another one had put there."""
    del vars(net)[name]
    if getattr(net, name) != method:
        vars(net)[name] = method
