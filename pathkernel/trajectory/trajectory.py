"""The recorded path θ_0 → θ_1 → … → θ_S of a training run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel._typing import Loss, Parameters, PyTree
from pathkernel.errors import InputError, ModelMismatchError, RecordingError, TrajectoryError, check
from pathkernel.gradients.acceptance import check_finite, not_finite
from pathkernel.gradients.forward_state import device_of
from pathkernel.gradients.losses import Objective
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.gradients.returned import Returns
from pathkernel.runtime.pickling import check_picklable
from pathkernel.trajectory.memory import MemoryStore, with_memory_of_their_own
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.schedule import EVERY_STEP, RecordingLevel
from pathkernel.trajectory.step import Segment, Step
from pathkernel.trajectory.store import Store

if TYPE_CHECKING:
    from pathkernel.trajectory.averages import AverageRecord
    from pathkernel.trajectory.reference_outputs import ReferenceOutputs
    from pathkernel.update_rules.rule import UpdateRule


@dataclass
class Trajectory:
    """The path of a training run, with the live objects that it was recorded with.

    Attributes
    ----------
    model
        The network. Its parameters are read from the record, never from the module.
    objective
        What the loop differentiates: loss, reduction, regularisers.
    data
        Training samples by id.
    layout
        Where each parameter lies in θ.
    initial
        θ_0, (P,).
    constants
        Parameters outside θ and buffers, as they were when recording began.
    rule
        How the optimizer turns gradients into displacement.
    initial_memory
        The optimizer's memory before the first recorded step, by parameter name; empty for a fresh optimizer.
    tail
        Changes made outside the optimizer after its last step; see `Step.changes`.
    final_buffers
        Buffers at the end of the recording that have changed since its beginning.
    averages
        Averages of the weights kept beside training, by name.
    schedule
        What was kept of each step.
    store
        Where the steps are kept.
    lock
        Held by whoever reads the record, or computes with it, one thread at a time.
    reference
        What the network made of a few training samples while it was recorded; None where that is not known.
    returns
        What the network's outputs are among all that it returns; see `pathkernel.gradients.returned`.
    task
        ``"classification"`` or ``"regression"``; None where the loss or the targets tell.
    """

    model: nn.Module
    objective: Objective
    data: Samples
    layout: ParameterLayout
    initial: Tensor
    constants: dict[str, Tensor]
    rule: UpdateRule
    initial_memory: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    store: Store = field(default_factory=MemoryStore)
    tail: tuple[tuple[str, Tensor], ...] = field(default_factory=tuple)
    final_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    averages: dict[str, AverageRecord] = field(default_factory=dict)
    schedule: RecordingLevel = EVERY_STEP
    lock: Any = field(default_factory=threading.RLock, repr=False, compare=False)
    reference: ReferenceOutputs | None = None
    returns: Returns = None
    task: str | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module,
        loss: Loss | str | None = None,
        data: Any,
        rule: UpdateRule | None = None,
        regularizers: Mapping[str, Callable[[Parameters], Tensor]] | None = None,
        optimizer: type[Optimizer] | None = None,
        returns: Returns = None,
    ) -> Trajectory:
        """A trajectory that was recorded with ``store=path``, with the objects that it was recorded with.

        Reads some kilobytes; everything else when it is needed.

        Parameters
        ----------
        path
            The store's folder, which may have been moved.
        model
            The network with its weights at the end of the recording.
        loss, data, regularizers
            As given to the recorder. The loss may be left out where the slopes of all batches are on record; what needs
            it says so.
        rule
            An update rule of your own; those of the package are found by their name.
        optimizer
            The class of an optimizer of your own, for a recording with keyframes; those of torch are found by name.
        returns
            As given to the recorder, where that was a function; a key or an index is on record.

        Raises
        ------
        ModelMismatchError
            For another architecture, other weights, another loss or other data, with what differs; and for a network
            that makes something else of the same weights, as three training samples tell.
        StoreError
            Where there is no store, or in a format that is not known.
        CorruptBlockError
            Where it is damaged.
        """
        from pathkernel.storage.opening import open_trajectory  # not before it is needed

        return open_trajectory(path, model, loss, data, rule, regularizers, optimizer, returns)

    def __getattr__(self, name: str) -> Any:
        """Parts of an opened trajectory that were not read yet."""
        deferred = vars(self).get("_deferred", {})
        if name not in deferred:
            raise AttributeError(f"'Trajectory' object has no attribute {name!r}")
        value = deferred[name]()
        setattr(self, name, value)
        return value

    def __getstate__(self) -> dict[str, Any]:
        """All parts, those that were not read yet included, but the lock; a store on disk travels as its path."""
        objective = self.objective
        check_picklable(
            model=self.model,
            loss=objective.loss,
            regularizers=objective.regularizers,
            data=self.data,
            rule=self.rule,
            returns=self.returns,
        )
        for name in vars(self).get("_deferred", {}):
            getattr(self, name)
        state = {name: value for name, value in vars(self).items() if name not in ("_deferred", "lock")}
        return state | with_memory_of_their_own({name: state[name] for name in ("initial", "initial_memory", "tail")})

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, lock=threading.RLock())

    def __len__(self) -> int:
        """S, the number of optimizer steps."""
        return len(self.store)

    def __repr__(self) -> str:
        return (
            f"Trajectory({len(self)} steps of {self.rule.name}, P = {self.layout.size}, "
            f"N = {len(self.data)}, {str(self.dtype).removeprefix('torch.')})"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the parameters."""
        return self.initial.dtype

    @property
    def device(self) -> torch.device:
        """Where the network is, and arithmetic runs."""
        return device_of(self.model)

    @property
    def precision(self) -> torch.dtype:
        """The coarsest floating type among the parameters: θ has the finest."""
        types = [p.dtype for p in self.model.parameters()] or [self.dtype]
        return max(types, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def final(self) -> Tensor:
        """θ at the end of the path, (P,)."""
        return self.tail[-1][1] if self.tail else self.end_of_steps

    @property
    def end_of_steps(self) -> Tensor:
        """θ after the last optimizer step, (P,)."""
        return self.store.read(len(self) - 1).after if len(self) else self.initial

    @property
    def loss(self) -> Loss | str | None:
        """Batch loss ``(output, target)``; ``"returned"`` or None where it is not a function that is known."""
        return self.objective.loss

    def steps(self) -> Iterator[Step]:
        """The optimizer steps in their order."""
        for index in range(len(self)):
            yield self.store.read(index)

    def segments(self, reverse: bool = False) -> Iterator[Segment]:
        """The straight pieces that join θ_0 to θ_S without a gap, outside changes included.

        Parameters
        ----------
        reverse
            From θ_S back to θ_0.
        """
        last = len(self)
        for index in range(last, -1, -1) if reverse else range(last + 1):
            came_from = self.store.read(index - 1).after if index else self.initial
            pieces = []
            if index < last:
                step = self.store.read(index)
                for name, point in step.changes:
                    pieces.append(Segment(came_from, point, None, name, step.buffers))
                    came_from = point
                if came_from is not step.before and not torch.equal(came_from, step.before):  # a step is missing
                    pieces.append(Segment(came_from, step.before, None, "unexplained", step.buffers))
                pieces.append(Segment(step.before, step.after, step, "", step.buffers))
            else:
                for name, point in self.tail:
                    pieces.append(Segment(came_from, point, None, name, self.final_buffers))
                    came_from = point
            yield from reversed(pieces) if reverse else pieces

    def vector(self, s: int) -> Tensor:
        """θ_s as a flat vector (P,), s from 0 to S; negative s counts from the end."""
        length = len(self)
        check(
            -length - 1 <= s <= length,
            InputError,
            f"θ at step {s} was asked for",
            f"This trajectory has the points 0 to {length}",
            f"Write `parameters({length})` for the trained network and `parameters(0)` for the untrained one",
        )
        s = s + length + 1 if s < 0 else s
        return self.store.vector(s) if s < length else self.final

    def extend(self, new: Mapping[str, Tensor]) -> None:
        """Take further parameters into θ, which so far have been constants.

        Earlier points of the path get their present values, earlier gradients get zeros.
        """
        tail = ParameterLayout.of(new).flatten(new, self.dtype).detach()
        padded: dict[int, Tensor] = {}  # one tensor for the end of a step and the start of the next, as before

        def pad(vector: Tensor) -> Tensor:
            if id(vector) not in padded:
                padded[id(vector)] = torch.cat([vector, tail])
            return padded[id(vector)]

        before, self.layout = self.layout, ParameterLayout(
            (*self.layout.names, *new), (*self.layout.shapes, *(value.shape for value in new.values()))
        )  # which a store on disk writes down
        try:
            self.store.extend(tail, pad)
        except RecordingError:  # not every record can be lengthened
            self.layout = before
            raise
        self.initial = pad(self.initial)
        self.tail = tuple((name, pad(point)) for name, point in self.tail)
        for name in new:
            self.constants.pop(name, None)

    def parameters(self, s: int) -> dict[str, Tensor]:
        """θ_s by parameter name."""
        return self.layout.unflatten(self.vector(s))

    def function(self, dtype: torch.dtype | None = None) -> ModelFunction:
        """The recorded network as a pure function of θ."""
        return ModelFunction(self.model, self.layout, self.constants, dtype or self.dtype, returns=self.returns)

    def queries(self, X: PyTree, asker: str) -> PyTree:
        """Query samples as tensors, shaped and typed as the training samples.

        Raises
        ------
        InputError
            For samples of another form, or that the network makes no finite numbers of, with the row.
        """
        inputs = self.data.queries(X, asker)
        if len(not_finite(inputs)):
            check_finite(self.function(), self.initial, inputs, asker)
        return inputs

    def require_steps(self, asker: str) -> None:
        """Refuse an empty path, one of which too little was kept, and a model that is no longer the recorded one."""
        self.schedule.require(asker)
        check(
            len(self) > 0,
            TrajectoryError,
            f"`{asker}` was given a trajectory with no steps",
            "A path needs at least one recorded optimizer step",
            "Call `optimizer.step()` inside `with KernelRecorder(...) as recorder:` before using "
            "`recorder.trajectory`",
        )
        self.check_model(asker)

    def check_model(self, asker: str) -> None:
        """Compare the live model with the record.

        Raises
        ------
        ModelMismatchError
            When a parameter is missing, has another shape, or has other values than at the last recorded step; when
            a buffer or a parameter outside the record is no longer what it was when recording began; or when the
            outputs of a few training samples are no longer what they were at both ends of the record.
        """
        live = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        problems = []
        for name, recorded in {**self.constants, **self.final_buffers, **self.layout.unflatten(self.final)}.items():
            if name not in live:
                problems.append(f"`{name}` is missing")
            elif live[name].shape != recorded.shape:
                problems.append(f"`{name}` has shape {tuple(live[name].shape)}, not {tuple(recorded.shape)}")
            elif not torch.equal(live[name].detach().to(recorded), recorded):
                moved = (live[name].detach().to(recorded.device).double() - recorded.double()).abs().max().item()
                problems.append(f"`{name}` differs by up to {moved:.2g}")
        check(
            not problems,
            ModelMismatchError,
            f"`{asker}` found a model that is not the recorded one: {'; '.join(problems)}",
            "The model's parameters must be those at the end of the trajectory, and all else what it was throughout, "
            "so that nobody explains one network with another one's history",
            "Put them back with `model.load_state_dict({**trajectory.constants, **trajectory.final_buffers, "
            "**trajectory.parameters(-1)}, strict=False)`, or record the further training too",
        )
        if self.reference is not None:
            function, final = self.function(), None
            if self.reference.final is not None:
                final = function.with_(constants=self.final_buffers), self.final
            self.reference.check(asker, (function, self.initial), final)
