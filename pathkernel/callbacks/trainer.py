"""`TrainerRecorder`: records training inside the Trainer of transformers."""

from __future__ import annotations

import sys
import warnings
import weakref
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset

from pathkernel._typing import PyTree
from pathkernel.callbacks.ids_in_inputs import ENTRY, LoaderWithIds, TakesIds, TakesIdsOfCompiled, base_loader
from pathkernel.callbacks.recording import FOLDER, FrameworkRecording, RecorderOptions
from pathkernel.callbacks.trainer_arguments import check_arguments, found_in, same_samples
from pathkernel.callbacks.versions import check_version
from pathkernel.errors import ModelMismatchError, RecordingError, SampleIdError
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.recording.indexed import IndexedBatch, NumberedBatch, places_in
from pathkernel.recording.optimizers import unwrapped_optimizers
from pathkernel.recording.recorder import KernelRecorder
from pathkernel.trajectory.trajectory import Trajectory

check_version("transformers")

from transformers import Trainer, TrainerCallback  # noqa: E402 - its absence has a message of our own


class TrainerRecorder(TrainerCallback):
    """Callback of the Trainer of transformers that records training.

    Samples have their places in the training dataset as ids. These travel with the batch, as one more entry, from the
    loader to the model's call, where they are taken off again: through samplers, worker processes, the removal of
    unused columns, collators that pad or mask, and the micro-batches of an accumulated step that the Trainer fetches
    ahead. What the model was given is kept. Training goes through the same bits as without the callback.

    Parameters
    ----------
    ids
        Name of a column that holds the samples' ids already (with ``remove_unused_columns=False``, or the Trainer drops
        it). It is taken off before the model sees it. By default ids are places in the dataset, and those of an
        iterable dataset are counted in the order of training.
    certify
        Of how many training samples the residual, the quadrature error and the split error are measured when training
        ends, and put into ``state.log_history``. They are explained for that: 0, or a Trainer that reports to no
        logger (``report_to="none"``), measures nothing.
    options
        Those of `pathkernel.KernelRecorder`, all but model and optimizer. By default ``returns="logits"``,
        ``loss="returned"``, ``data`` the number of samples, and ``task="classification"`` for a network that classifies
        sequences or images. ``store=True`` is a folder in ``args.output_dir``.

    Attributes
    ----------
    recorder
        The recorder, from when training has begun.

    Raises
    ------
    MissingExtraError
        For a version of transformers that is too old or too new.
    InputError
        For an option that the recorder does not have.

    Notes
    -----
    Called twice, ``trainer.train()`` goes on in the same record where model, optimizer and dataset are the same and the
    weights are those that it ended with. Where they are those of a checkpoint, it goes on in its store from there, and
    without a store begins a new record, with a warning: what was trained before is then the untrained network of the
    explanation. With another model, as ``model_init`` makes it, a new record begins.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
    >>> config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> data = [{"input_ids": torch.randint(30, (6,)), "labels": i % 2} for i in range(16)]
    >>> args = TrainingArguments("/tmp/pk-doc", max_steps=3, use_cpu=True, report_to="none", disable_tqdm=True)
    >>> callback = pk.callbacks.TrainerRecorder()
    >>> trainer = Trainer(BertForSequenceClassification(config), args, train_dataset=data, callbacks=[callback])
    >>> done = trainer.train()  # doctest: +ELLIPSIS
    {...
    >>> why = callback.machine.explain({"input_ids": data[0]["input_ids"][None]})
    >>> why.shares.shape
    (1, 16)
    """

    def __init__(self, *, ids: str | None = None, certify: int = 2, **options: Unpack[RecorderOptions]) -> None:
        check_version("transformers")
        self.ids, self.certify = ids, certify
        self._in_run = options.get("store") is True
        if self._in_run or options.get("store") is False:
            options["store"] = None
        self._options = options
        self._recording = FrameworkRecording("TrainerRecorder", options, certify)
        self._loader: LoaderWithIds | None = None
        self._hook: Any = None
        self._dataset: Any = None
        self._places: Tensor | None = None
        self._counted: int | None = None
        self._of: tuple[Any, Any] | None = None
        self._announced: Announced | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies, and pickles in the midst of training, watch nothing.
        return {**vars(self), "_loader": None, "_hook": None, "_dataset": None, "_of": None, "_announced": None}

    # -- what the Trainer calls -----------------------------------------------------------------------------------

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Begin to record, or go on."""
        of = state, kwargs.get("train_dataloader")
        if self._hook is not None and _is_same(self._of, of):
            return  # given to the Trainer twice
        self.close()  # training before this one may have ended with an error, of which nobody is told
        check_arguments(args)
        _check_alone(model, of)
        self._of = of
        try:
            self._begin(args, state, model, optimizer, kwargs.get("train_dataloader"))
        except BaseException:
            self.close()
            raise

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the recording is on the optimizer that will step: hooks are lost in copies.

        Raises
        ------
        RecordingError
            Where another training took this recording away, or it was closed.
        """
        if self.recorder is None or self._hook is None or self._of is None or self._of[0] is not state:
            raise RecordingError(
                "This TrainerRecorder does not record the training that goes on: it was added after its beginning, "
                "closed, or given to another Trainer that has begun since",
                "One TrainerRecorder records one training at a time, from its beginning to its end",
                "Give each Trainer a `TrainerRecorder()` of its own, and call `close()` when training is over",
            )
        (optimizer,) = unwrapped_optimizers(kwargs["optimizer"], self._options.get("rule"))
        if optimizer is not self.recorder.optimizer:
            self.recorder.attach(optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a step whose batch never said whose it is.

        Raises
        ------
        SampleIdError
            Where no call of the model held ids.
        """
        if self._hook is None or self._announced is not None:
            return
        raise SampleIdError(
            "The model was called in training without the ids of its samples",
            f"They are the entry {self.ids or ENTRY!r} of the inputs, which is taken off when the model is called",
            "Write `model(**inputs)` in `compute_loss`, with all entries of the batch"
            + (" and set `remove_unused_columns=False`, or the Trainer drops the column" if self.ids else ""),
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the batches have been used."""
        self._announced = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write all that is on record where a checkpoint is about to be saved: it can only be gone on from if it is."""
        if control.should_save:
            self._flush()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write all that is on record where the Trainer may save its best model next."""
        if control.should_save or str(getattr(args.save_strategy, "value", args.save_strategy)) == "best":
            self._flush()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write all that is on record, where somebody saved by other ways."""
        self._flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write as `on_step_end` does."""
        if control.should_save:
            self._flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the recording, and measure how exactly the machine is the network."""
        self.close()
        loggers = args.report_to if isinstance(args.report_to, (list, tuple)) else [args.report_to]
        logged = any(name not in (None, "none") for name in loggers)
        if logged and (found := self._recording.certificate_at_end(torch.max)):
            state.log_history.append({**found, "epoch": state.epoch, "step": state.global_step})

    # -- what the user asks -----------------------------------------------------------------------------------------

    @property
    def recorder(self) -> KernelRecorder | None:
        """The recorder; None before training."""
        return self._recording.recorder

    @property
    def trajectory(self) -> Trajectory:
        """The path recorded so far."""
        return self._recording.trajectory

    @property
    def machine(self) -> KernelMachine:
        """The trained network as a kernel machine: ``callback.machine(inputs)`` for a dict of the model's inputs."""
        return self._recording.machine

    def certificate(self, X: PyTree = None) -> dict[str, float]:
        """How far the machine is from the network, in its largest output for each sample: numbers for a logger.

        Parameters
        ----------
        X
            A dict of the model's inputs; by default of some that were trained on, as many as ``certify`` says.

        Returns
        -------
        ``residual``, ``quadrature_error`` and ``split_error``; see `FrameworkRecording.certificate`.
        """
        return self._recording.certificate(X, outputs=torch.max)

    def close(self) -> None:
        """End the recording, and put back what carried the ids.

        The Trainer tells no callback of an error in training. The recording ends all the same when the error has been
        dealt with; while somebody holds it, with the frames of the loop in its traceback, this ends it.
        """
        hook, loader, self._hook, self._loader = self._hook, self._loader, None, None
        self._of = self._announced = None
        if hook is not None:
            hook.remove()
        if loader is not None:
            loader.put_back()
        if hook is not None:
            self._recording.close()

    # -- how ids come to the recorder ---------------------------------------------------------------------------------

    def _begin(self, args: Any, state: Any, model: nn.Module, optimizer: Any, loader: Any) -> None:
        """Record the training that is about to begin, in the record of the one before where it goes on."""
        (optimizer,) = unwrapped_optimizers(optimizer, self._options.get("rule"))
        dataset = getattr(base_loader(loader), "dataset", None)
        again = self._goes_on(model, optimizer, dataset)
        self._dataset = dataset
        if not again:
            found = found_in(args, model, dataset, self.ids)
            if self._in_run:
                found["store"] = Path(args.output_dir) / FOLDER
                self._options.pop("store", None)
            recorder = self.recorder
            earlier = recorder is not None and recorder.model is model and len(recorder.trajectory) > 0
            earlier = earlier and "store" not in {**found, **self._options}
            recorder = self._recording.start(model, [optimizer], **found)
            if len(recorder.trajectory) == 0 and (earlier or state.global_step):
                warnings.warn(
                    f"The record begins at step {state.global_step} of a training that had begun before, with weights, "
                    "samples or an optimizer that are not those on record: the network is explained from there on. "
                    "`TrainerRecorder(store=True)` goes on from a checkpoint.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._watch(model, loader)

    def _goes_on(self, model: nn.Module, optimizer: Any, dataset: Any) -> bool:
        """Go on in the record of the training before, where this one does; True if so."""
        recorder = self.recorder
        if recorder is None or recorder.model is not model or recorder.optimizer is not optimizer:
            return False
        if not same_samples(self._dataset, dataset) or not len(recorder.trajectory):
            return False
        try:
            recorder.trajectory.check_model("TrainerRecorder")
            recorder.start()
        except (ModelMismatchError, RecordingError):
            return False
        return True

    def _watch(self, model: nn.Module, loader: Any) -> None:
        """Let ids travel with the batches of a loader, and take them off in the calls of the model."""
        assert self.recorder is not None
        data = self.recorder.trajectory.data
        inner = base_loader(loader)
        has_places = isinstance(inner, DataLoader) and not isinstance(inner.dataset, IterableDataset)
        self._places = self._counted = None
        if self.ids is None and has_places and inner.batch_sampler is not None:
            self._places = places_in(data, inner.dataset)
            myself = weakref.ref(self)
            self._loader = LoaderWithIds(inner, lambda: _let_go(myself))
        elif self.ids is None:
            self._counted = len(data)
            if not isinstance(getattr(inner, "dataset", None), IterableDataset):
                warnings.warn(
                    f"The Trainer trains on the batches of a {type(inner).__name__}, which do not hold places in "
                    "`train_dataset`. Samples are counted in the order of training, each time they come, and that is "
                    "what ids are. Let `get_train_dataloader` return a DataLoader that batches a dataset, or name a "
                    'column of ids: `TrainerRecorder(ids="index")`.',
                    RuntimeWarning,
                    stacklevel=2,
                )
        # Before the recorder's own hook, which sees what the model is given.
        hook = TakesIds(self.ids or ENTRY, self._taken)
        if model._compiled_call_impl is not None:
            self._hook = TakesIdsOfCompiled(model, hook)
        else:
            self._hook = model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)

    def _taken(self, ids: Tensor | None, inputs: dict[str, Any]) -> None:
        """Announce the samples of a call of the model.

        Raises
        ------
        SampleIdError
            Where it is another call with other tensors, and nothing says of which samples.
        """
        assert self.recorder is not None
        again = self._announced is not None and self._announced.is_of(inputs)
        kind = IndexedBatch if self._counted is None else NumberedBatch
        if ids is None:
            if not self.recorder.model.training or (self._counted is None and self._announced is None):
                return
            if again:
                assert self._announced is not None
                ids = self._announced.ids
            elif self._counted is not None:
                first = self._counted
                self._counted += _rows(inputs)
                ids = torch.arange(first, self._counted)
            else:
                name = self.ids or ENTRY
                raise SampleIdError(
                    "The model was called again in training, with other tensors and without the ids of their samples",
                    f"They are the entry {name!r} of the inputs; a row is booked to the sample whose id comes with it",
                    f"Write `model(**inputs)` with all entries, or `model(..., {name}=inputs[{name!r}])` with that of "
                    "the rows that it is given; what is not trained on is computed inside `torch.no_grad()`",
                )
        ids = ids.cpu()
        self._announced = Announced(ids, _tensors(inputs))
        self.recorder.take_ids(kind(ids if self._places is None else self._places[ids], inputs))

    def _flush(self) -> None:
        if self.recorder is not None and self._hook is not None:
            self.recorder.flush()


class Announced(NamedTuple):
    """Inputs that the model was last given, and their ids."""

    ids: Tensor
    tensors: list[Tensor]

    def is_of(self, inputs: dict[str, Any]) -> bool:
        """True for a call with some of the very same tensors, and no others."""
        given = _tensors(inputs)
        return bool(given) and all(any(one is other for other in self.tensors) for one in given)


def _tensors(inputs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]


def _is_same(one: tuple[Any, Any] | None, other: tuple[Any, Any]) -> bool:
    """True for one and the same training: its state and its loader."""
    return one is not None and one[0] is other[0] and one[1] is other[1]


def _check_alone(model: nn.Module | None, of: tuple[Any, Any]) -> None:
    """Silence those that record an earlier training of a model, and refuse to be the second of one training.

    Raises
    ------
    RecordingError
        Where another callback records it.
    """
    for hook in () if model is None else model._forward_pre_hooks.values():
        if not isinstance(hook, TakesIds):
            continue
        other = getattr(hook.taken, "__self__", None)
        if not isinstance(other, TrainerRecorder):
            continue
        if _is_same(other._of, of):
            raise RecordingError(
                "The Trainer was given two TrainerRecorders",
                "Ids of samples are taken off each batch once, and each step is recorded once",
                "Give it one, and take both results from its `trajectory`",
            )
        hook.taken = None  # of a training that ended with an error


def _let_go(callback: weakref.ref[TrainerRecorder]) -> None:
    """Close a recording whose loop has been left by an error: somebody lets go of an epoch outside of the Trainer."""
    found = None if sys.is_finalizing() else callback()
    frame = sys._getframe() if found is not None else None
    while frame is not None:
        if frame.f_globals.get("__name__") == Trainer.__module__:
            return
        frame = frame.f_back
    if found is not None:
        found.close()


def _rows(inputs: dict[str, Any]) -> int:
    """How many samples a batch has.

    Raises
    ------
    SampleIdError
        Where it holds no tensor.
    """
    for leaf in _tensors(inputs):
        return len(leaf)
    raise SampleIdError(
        "The model was called in training without a tensor",
        "Samples of an iterable dataset are counted along the first axis of the model's first input",
        'Write `TrainerRecorder(ids="index")` with the name of an entry that holds their ids',
    )
