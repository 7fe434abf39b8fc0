"""`LightningRecorder`: records training inside Lightning."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

from torch import nn

from pathkernel.callbacks.kept_weights import is_at_end
from pathkernel.callbacks.lightning_averages import BeforeAverages, averages_of, refuse_averages
from pathkernel.callbacks.lightning_loaders import Arrived, Numbering, TrainLoaders, Wrapped, flattened
from pathkernel.callbacks.lightning_network import (
    Network,
    held,
    network_of,
    refuse_what_is_not_seen,
    without_empty_closure,
)
from pathkernel.callbacks.lightning_passes import CalledParts, PassesOfBatches
from pathkernel.callbacks.recording import FOLDER, FrameworkRecording, RecorderOptions
from pathkernel.callbacks.versions import check_version
from pathkernel.errors import PathKernelError, SampleIdError
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.recording.indexed import IdsOf
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.trajectory import Trajectory

DISTRIBUTION = "lightning" if find_spec("lightning") or not find_spec("pytorch_lightning") else "pytorch-lightning"
"""Lightning comes under two names. Either's callbacks serve either's trainer, which calls them by their methods."""

check_version(DISTRIBUTION)

if DISTRIBUTION == "lightning":
    from lightning.pytorch import Callback, utilities
else:
    from pytorch_lightning import Callback, utilities


class LightningRecorder(Callback):
    r"""Callback of Lightning that records training, and expresses the trained network as a kernel machine.

    .. math:: f(x; \theta_S) = f(x; \theta_0) + \sum_i \mathrm{share}_i(x) + \sum_{\text{channels}} \mathrm{channel}(x)

    The data, the samples' ids, the optimizers and the slopes of the loss are found by the callback: ids are places in
    the dataset of the train loader, and travel through samplers, shuffling and worker processes.

    Parameters
    ----------
    certify
        How many training samples' residual, error of the quadrature and error of the split are given to the trainer's
        loggers when training ends; 0 for none. Takes the time of one explanation, which goes through all steps.
    ids
        Where ids are in a batch, for loaders whose samples have no places: a key, a place, or a function of the batch.
        Such samples are counted as they come otherwise.
    source
        Name of the source that passes are of whose inputs are not the batch's own tensors, such as what a generator
        made, or noise; see `pathkernel.KernelRecorder.source`. By default these are passes of the batch.
    **options
        Arguments of `pathkernel.KernelRecorder` but the model and the optimizers. ``data`` is the train loader's
        dataset by default, ``keep`` is True: what the network was given is kept where it is not what the dataset
        holds. ``watch`` names the part of the module that ``training_step`` calls, where that is not the module
        itself: found where the module has no ``forward`` and one part that is trained; it takes the optimizers that
        hold its parameters, so that each network of a GAN has a callback of its own. ``store`` is a path, or True
        for a folder in the run's own (``trainer.log_dir``).

    Attributes
    ----------
    recorder
        The `pathkernel.KernelRecorder`, once training has begun.

    Raises
    ------
    MissingExtraError
        Where Lightning is too old or too new.
    InputError
        For options that there are not.

    Notes
    -----
    *A second fit* goes on in the same record where it trains the same network on the same dataset from the weights that
    the record ends with; momentum that a new optimizer does not have is forgotten, by the record too. Otherwise, and
    where weights are averaged, a new record begins.

    *Checkpoints*: what was recorded is on disk before a checkpoint is saved, which says where the store is. A fit from
    the checkpoint (``ckpt_path=``) goes on in that store, with ``store=True`` in a new run, too.

    *Averages* of `StochasticWeightAveraging` and of `WeightAveraging` are on record under the name of the callback's
    class, and `machine` is that of the averaged network, which training ends with.

    *Validation*, sanity checks and the trial runs of the tuner are not recorded.

    Examples
    --------
    >>> import lightning as L, torch, pathkernel as pk
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> class Classifier(L.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = torch.nn.Linear(4, 3)
    ...     def training_step(self, batch, index):
    ...         return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    ...     def configure_optimizers(self):
    ...         return torch.optim.Adam(self.parameters(), lr=0.1)
    >>> X, y = torch.randn(12, 4), torch.randint(3, (12,))
    >>> loader = DataLoader(TensorDataset(X, y), batch_size=4, shuffle=True)
    >>> callback = pk.callbacks.LightningRecorder(task="classification")
    >>> L.Trainer(max_epochs=2, callbacks=[callback], accelerator="cpu", barebones=True).fit(Classifier(), loader)
    >>> len(callback.trajectory)
    6
    >>> callback.machine.explain(X[:2]).shares.shape
    (2, 12)
    """

    def __init__(
        self, *, certify: int = 2, ids: IdsOf = None, source: str | None = None, **options: Unpack[RecorderOptions]
    ) -> None:
        check_version(DISTRIBUTION)
        self._recording = FrameworkRecording("LightningRecorder", options, certify)
        self._options, self._certify, self._ids, self._source = options, certify, ids, source
        self._begun: tuple[Network, Any] | None = None
        self._average: str | None = None
        self._averaged: KernelMachine | None = None
        self._store_on_record: str | None = None
        self._data: Samples | None = None
        self._forget_fit()

    def __getstate__(self) -> dict[str, Any]:
        """All but what belongs to a fit that is under way: a copy has the record, and takes part in none."""
        again = object.__new__(type(self))
        again.__dict__.update(self.__dict__)
        again._forget_fit()
        return again.__dict__

    def _forget_fit(self) -> None:
        self._loaders: TrainLoaders | None = None
        self._network: Network | None = None
        self._numbering: Numbering | None = None
        self._train_loaders: Any = None
        self._passes: PassesOfBatches | None = None
        self._called: CalledParts | None = None
        self._arrived: list[Arrived] = []
        self._optimizers: list[Any] = []
        self._undone: list[Any] = []
        self._runs = False

    # -- results --------------------------------------------------------------------------------------------------

    @property
    def recorder(self) -> KernelRecorder | None:
        """The recorder, once training has begun."""
        return self._recording.recorder

    @property
    def trajectory(self) -> Trajectory:
        """The path recorded so far.

        Raises
        ------
        TrajectoryError
            Before training.
        """
        return self._recording.trajectory

    @property
    def machine(self) -> KernelMachine:
        """The network that training ended with, as a kernel machine: the averaged one, where a callback averages."""
        if self._average is None or self._average not in self.trajectory.averages:
            return self._recording.machine
        if self._averaged is None or len(self._averaged.trajectory) != len(self.trajectory):
            steps = len(self.trajectory)
            # At the end of the steps: afterwards, the average was copied into the network.
            self._averaged = KernelMachine(self.trajectory.until(steps), average=self._average)
        return self._averaged

    # -- the life of a fit ----------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Make train loaders carry ids, before the trainer goes through them."""
        if stage != "fit":
            return
        refuse_what_is_not_seen(trainer, pl_module)
        self._end_fit()
        self._loaders = TrainLoaders(self._ids, anew=self._options.get("data") is not None)
        self._undone = [
            Wrapped(trainer.strategy, "process_dataloader", partial(self._process, trainer)),
            Wrapped(trainer.precision_plugin, "convert_input", self._convert),
            BeforeAverages(trainer, self),
        ]

    def _process(self, trainer: Any, process: Any, loader: Any) -> Any:
        """A loader as the strategy processes it; one for training with ids."""
        loader = process(loader)
        return self._loaders.carrying(loader) if trainer.training and self._loaders is not None else loader

    def _convert(self, convert: Any, batch: Any) -> Any:
        """A batch as the precision converts it: the first that a trainer does with it."""
        if self._loaders is not None and (arrived := self._loaders.arrived(batch)):
            self._arrived = arrived
        return convert(batch)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Find out what is trained."""
        self._network = network_of(pl_module, trainer.optimizers, self._options.get("watch"))
        refuse_averages(trainer, pl_module)
        assert self._loaders is not None
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            self._loaders.fetched = partial(self._fetched, trainer)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Announce the samples of a batch; the first begins the record."""
        if not self._runs:
            self._begin(trainer, pl_module)
        else:
            self._follow(trainer)
        if self._loaders is not None and self._loaders.fetched is None:
            arrived, self._arrived = self._arrived, []
            self._announce(trainer, [(one, one.in_(batch)) for one in arrived])

    def _fetched(self, trainer: Any, one: Arrived) -> None:
        """Called with a batch that a training step asks its loader for."""
        if self._runs:
            self._announce(trainer, [(one, one.found.batch)])

    def _announce(self, trainer: Any, arrived: list[tuple[Arrived, Any]]) -> None:
        recorder, loaders = self.recorder, flattened(trainer.train_dataloader)
        assert recorder is not None and self._data is not None
        if self._numbering is None or loaders != self._train_loaders:  # loaders may be made anew between epochs
            self._numbering, self._train_loaders = Numbering(loaders), loaders
        if not arrived and self._source is None:
            raise SampleIdError(
                "A batch reached the training step that is none of those that the train loaders gave",
                "Ids are known of the batches that `train_dataloader` yields, each as it is or in a dict, list or "
                "tuple of several",
                "Let the loader yield the batches that are trained on, or change them in `on_before_batch_transfer`",
            )
        batches = [self._numbering.batch(one, batch, self._data) for one, batch in arrived]
        came = [one.found.batch for one, _ in arrived]
        if self._passes is not None:
            self._passes.expect(batches, came)
        else:
            recorder.take_ids(batches[0], rows=came[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of the batch."""
        if self._passes is not None:
            self._passes.leave()
        if self._called is not None:
            self._called.remove()
            self._called = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """End the record, and log how right it is."""
        began = self._runs
        self._end_fit()
        if began:
            self._log(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """End the record with what it holds."""
        called, network = self._called, self._network
        if isinstance(exception, PathKernelError) and called is not None and network is not None and called.names:
            self._explain(exception, pl_module, network, called.names)
        with _told(exception):
            self._end_fit()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put back what was wrapped, where training never began."""
        if stage == "fit":
            self._end_fit()

    def _end_fit(self) -> None:
        """Close the recorder, and put back all that was hooked or wrapped."""
        try:
            if self._runs:
                self._recording.close()
        finally:
            for hooked in (self._passes, self._called, *self._undone):
                if hooked is not None:
                    hooked.remove()
            self._forget_fit()

    # -- the recorder ---------------------------------------------------------------------------------------------

    def _begin(self, trainer: Any, module: nn.Module) -> None:
        """Begin to record, or go on."""
        network = self._network = network_of(module, trainer.optimizers, self._options.get("watch"))
        loaders = flattened(trainer.train_dataloader)
        self._numbering, self._train_loaders = Numbering(loaders), loaders
        data = self._options.get("data", self._numbering.data)
        self._step_plainly(network.optimizers)
        averages = averages_of(trainer, module, network.model)
        if averages or self._average or not self._goes_on(network, data):
            self._average, self._averaged = next(iter(averages), None), None
            found = {"data": data, "keep": True, "averages": averages}
            given = {"watch": network.watch, "store": self._store(trainer)}
            options: Any = {**self._options, **given}
            recording = FrameworkRecording("LightningRecorder", options, self._certify)
            recording.start(network.model, network.optimizers, **found)
            self._recording = recording
        self._runs, self._begun = True, (network, data)
        recorder = self.recorder
        assert recorder is not None
        self._data, self._optimizers = recorder.trajectory.data, list(trainer.optimizers)
        if self._source is not None or len(loaders) > 1:
            self._passes = PassesOfBatches(recorder, network.first, self._source)
        self._called = CalledParts(module)

    def _goes_on(self, network: Network, data: Any) -> bool:
        """Record on where the record ends, if that is where training begins; False where it is not."""
        if self._begun is None or self.recorder is None:
            return False
        before, known = self._begun
        recorder, same = self.recorder, before.watch == network.watch and known is data
        kinds = [[type(one) for one in each.optimizers] for each in (before, network)]
        if before.watch is None or before.model is network.model:
            same = same and before.model is network.model
        if not same or kinds[0] != kinds[1] or not is_at_end(recorder.trajectory, network.model):
            return False
        recorder.start()
        recorder.attach(list(network.optimizers))
        return True

    def _follow(self, trainer: Any) -> None:
        """Attach optimizers that have taken the place of others."""
        assert self._network is not None and self.recorder is not None
        if all(any(one is known for known in self._optimizers) for one in trainer.optimizers):
            return
        own = {id(p) for p in self._network.model.parameters()}
        found = [one for one in trainer.optimizers if not any(one is known for known in self._optimizers)]
        self._optimizers = list(trainer.optimizers)
        if new := [one for one in found if held(one) & own]:
            self._step_plainly(new)
            self.recorder.attach(new)

    def _step_plainly(self, optimizers: Sequence[Any]) -> None:
        """Have optimizers step without a closure where that has no passes in it."""
        self._undone += [one.register_step_pre_hook(without_empty_closure) for one in optimizers]

    def _store(self, trainer: Any) -> Any:
        given: Any = self._options.get("store")
        if given is True:
            last, self._store_on_record = self._store_on_record, None
            if last is not None and Path(last).exists():
                return last
            watch = self._options.get("watch")
            name = FOLDER if not isinstance(watch, str) else f"{FOLDER}-{watch}"
            return str(Path(trainer.log_dir or trainer.default_root_dir).absolute() / name)
        return given or None

    @property
    def state_key(self) -> str:
        """Name of the callback's state in a checkpoint: each watched network has its own."""
        watch = self._options.get("watch")
        return type(self).__qualname__ if watch is None else f"{type(self).__qualname__}[{_named(watch)}]"

    def state_dict(self) -> dict[str, Any]:
        """How many steps are on record, and where; written before the checkpoint is."""
        if self.recorder is None:
            return {}
        store = getattr(self.trajectory.store, "path", None)
        steps = self.recorder.flush() if self._runs else len(self.trajectory)
        return {"steps": steps, "store": None if store is None else str(Path(store).resolve())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take note of the store of the run that is gone on with."""
        self._store_on_record = state_dict.get("store")

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write what was recorded to disk."""
        if self._runs and self.recorder is not None:
            self.recorder.flush()

    # -- messages -------------------------------------------------------------------------------------------------

    def _log(self, trainer: Any) -> None:
        """Give the certificate of some training samples to the loggers."""
        if not (trainer.loggers and self._certify and len(self.trajectory)):
            return
        n, steps = self._certify, len(self.trajectory)
        utilities.rank_zero_info(
            f"LightningRecorder explains {n} training sample{'s' * (n > 1)} for the logger, and goes through all "
            f"{steps} step{'s' * (steps > 1)} to do so: this may take a while. `LightningRecorder(certify=0)` leaves "
            "it out."
        )
        found = self._recording.certificate_at_end()
        for logger in trainer.loggers if found else ():
            logger.log_metrics({f"{FOLDER}/{name}": value for name, value in found.items()}, step=trainer.global_step)

    def _explain(self, error: BaseException, module: nn.Module, network: Network, called: list[str]) -> None:
        """Say which parts of the module a training step calls, where it does not call what is watched."""
        names = {id(child): name for name, child in [("", module), *module.named_children()]}
        if names.get(id(network.first)) in called or id(network.first) not in names:
            return
        parts = [name for name in called if name]
        what = ", ".join(f"`self.{name}`" for name in parts)
        watch = repr(parts[0]) if len(parts) == 1 else f"({', '.join(map(repr, parts))})"
        error.add_note(
            f"`training_step` of the {type(module).__name__} called {what}, and not what is watched: "
            f"write `LightningRecorder(watch={watch})`, or call `self(x)`."
        )


@contextmanager
def _told(exception: BaseException) -> Iterator[None]:
    """Leave the first error the one that is told."""
    try:
        yield
    except Exception as error:
        exception.add_note(f"The recorder was closed with an error of its own: {error}")


def _named(watch: Any) -> str:
    parts = watch if isinstance(watch, (list, tuple)) else [watch]
    return ",".join(part if isinstance(part, str) else type(part).__name__ for part in parts)
