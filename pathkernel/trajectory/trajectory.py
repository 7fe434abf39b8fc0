"""The recorded path θ_0 → θ_1 → … → θ_S of a training run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel._typing import Loss, Parameters, PyTree
from pathkernel.errors import InputError, ModelMismatchError, TrajectoryError
from pathkernel.gradients.acceptance import check_finite, not_finite
from pathkernel.gradients.forward_state import ForwardState
from pathkernel.gradients.losses import Objective
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.gradients.returned import Returns
from pathkernel.runtime.pickling import with_memory_of_their_own
from pathkernel.runtime.threads import on_the_cpu
from pathkernel.trajectory.averages import AverageRecord
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.reference_outputs import ReferenceOutputs
from pathkernel.trajectory.run import End, Extension, Run, Start
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.schedule import EVERY_STEP, RecordingLevel
from pathkernel.trajectory.step import Segment, Step
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.until import end_after, records_until
from pathkernel.trajectory.weighted_retraining import retrain
from pathkernel.update_rules.rule import UpdateRule


def _part(where: str) -> Any:
    """A property that is an attribute of a part."""
    return property(attrgetter(where))


class Trajectory:
    """The path of a training run, with the live objects that it was recorded with.

    While it is recorded it grows: the recorder replaces its end. Nobody else changes it.

    Parameters
    ----------
    run
        What was fixed when recording began.
    store
        Where the steps are kept; memory by default.
    end
        Where the path stands after its last step, or what reads it from a store when it is first asked for.

    Attributes
    ----------
    model, objective, data, rule, layout, initial, initial_memory, returns, task, schedule
        See `pathkernel.trajectory.run.Run`.
    dtype, device, precision
        Floating type of θ; where arithmetic runs; the coarsest floating type among the parameters.
    tail, final_buffers, averages
        See `pathkernel.trajectory.run.End`.
    lock
        Held by whoever reads the record, or computes with it, one thread at a time.
    """

    model: nn.Module = _part("run.model")
    objective: Objective = _part("run.objective")
    data: Samples = _part("run.data")
    rule: UpdateRule = _part("run.rule")
    layout: ParameterLayout = _part("run.layout")
    initial: Tensor = _part("run.initial")
    initial_memory: dict[str, tuple[Tensor, ...]] = _part("run.initial_memory")
    returns: Returns = _part("run.returns")
    task: str | None = _part("run.task")
    schedule: RecordingLevel = _part("run.schedule")
    dtype: torch.dtype = _part("run.dtype")
    device: torch.device = _part("run.device")
    precision: torch.dtype = _part("run.precision")
    tail: tuple[tuple[str, Tensor], ...] = _part("end.tail")
    final_buffers: Mapping[str, Tensor] = _part("end.final_buffers")
    averages: dict[str, AverageRecord] = _part("end.averages")

    def __init__(self, run: Run, store: Store | None = None, end: End | Callable[[], End] | None = None) -> None:
        self._run = run
        self._store = MemoryStore() if store is None else store
        self._end = End() if end is None else end
        self._arguments: Mapping[str | int, Any] | None = None
        self.lock = threading.RLock()

    @property
    def run(self) -> Run:
        """The run as it was when recording began."""
        return self._run

    @property
    def store(self) -> Store:
        """Where the steps are kept."""
        return self._store

    @property
    def end(self) -> End:
        """Where the path stands after its last step."""
        if not isinstance(self._end, End):
            self._end = self._end()
        return self._end

    @property
    def constants(self) -> dict[str, Tensor]:
        """Parameters outside θ and buffers, as they were when recording began."""
        return dict(self.run.constants)

    @property
    def reference(self) -> ReferenceOutputs | None:
        """Outputs of a few training samples while the run was recorded; None where they are not known."""
        start = self.run.reference
        return None if start is None else replace(start, final=self.end.outputs)

    @classmethod
    def of_step(cls, run: Run, start: Tensor, step: Step, end: End | None = None) -> Trajectory:
        """One step as a path of its own, which is looked at while training goes on, or before it is taken.

        Parameters
        ----------
        run
            The run that it is a step of.
        start
            Where the step before ended, (P,).
        step
            The step. The running statistics that it found are the path's; the first begins with those of the untrained
            network.
        end
            Where its path ends; with the step by default.
        """
        constants = {**run.constants, **(step.buffers if step.index else {})}
        alone = replace(run, start=Start(start, constants), schedule=EVERY_STEP, reference=None, optimizer=None)
        store = MemoryStore([replace(step, index=0)])
        return cls(alone, store, replace(end or End(final_buffers=step.buffers), averages={}, is_live=False))

    def until(self, step: int) -> Trajectory:
        """The path as it was right after its first ``step`` optimizer steps: the checkpoint that was saved there.

        Its end is θ right after step ``step`` − 1, with the buffers as that step's forward pass left them and the
        averages as they had moved by then. It shares the record and reads no more of it than these steps; the network
        itself may stand anywhere.

        Parameters
        ----------
        step
            From 0, the untrained network, to the number of optimizer steps, the network before what was changed after
            the last of them. On a thinned path one of the steps at which θ was kept.

        Raises
        ------
        InputError
            For any other number, with those that there are.
        TrajectoryError
            Where no path was kept.

        Examples
        --------
        >>> import torch, pathkernel as pk
        >>> X, y = torch.randn(32, 4), torch.randn(32, 1)
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer, loss = torch.optim.SGD(model.parameters(), lr=0.1), torch.nn.MSELoss()
        >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
        ...     for x, target in recorder.batches(batch_size=8):
        ...         optimizer.zero_grad()
        ...         loss(model(x), target).backward()
        ...         optimizer.step()
        >>> recorder.trajectory.until(3)
        Trajectory(3 steps of SGD, P = 5, N = 32, float32)
        """
        count = records_until(self, step)
        store = self.store.until(count)
        ends_early = Trajectory(self.run, store, End(is_live=False))
        first = Trajectory(self.run, store, lambda: end_after(self, ends_early))
        first.lock = self.lock
        return first

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        model: nn.Module,
        loss: Loss | str | None = None,
        data: Any = None,
        rule: UpdateRule | None = None,
        regularizers: Mapping[str, Callable[[Parameters], Tensor]] | None = None,
        optimizer: type[Optimizer] | None = None,
        returns: Returns = None,
        at: int | None = None,
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
            it says so. So may the data, where the recorder was given none.
        rule
            An update rule of your own; those of the package are found by their name.
        optimizer
            The class of an optimizer of your own, for a recording with keyframes; those of torch are found by name.
        returns
            As given to the recorder, where that was a function; a key or an index is on record.
        at
            Where the network has the weights of a checkpoint that was kept: after how many steps it was made. The path
            ends there, as that of `until`.

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

        return open_trajectory(path, model, loss, data, rule, regularizers, optimizer, returns, at)

    retrain = retrain
    """θ_S of the run with other weights of its samples; see `pathkernel.trajectory.weighted_retraining.retrain`."""

    def __getstate__(self) -> dict[str, Any]:
        """All parts, those that were not read yet included, but the lock; a store on disk travels as its path."""
        end = replace(self.end, tail=with_memory_of_their_own(self.tail))
        return {"run": self.run, "store": self.store, "end": end, "arguments": self.arguments}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = state if "run" in state else _parts_of_earlier(state)
        self._run, self._store, self._end = parts["run"], parts["store"], parts["end"]
        self._arguments = parts.get("arguments")  # which takes no look into the store
        self.lock = threading.RLock()

    def __len__(self) -> int:
        """S, the number of optimizer steps."""
        return len(self.store)

    def __repr__(self) -> str:
        return (
            f"Trajectory({len(self)} steps of {self.rule.name}, P = {self.layout.size}, "
            f"N = {len(self.data)}, {str(self.dtype).removeprefix('torch.')})"
        )

    @property
    def final(self) -> Tensor:
        """θ at the end of the path, (P,)."""
        return self.tail[-1][1] if self.tail else self.end_of_steps

    @property
    def end_of_steps(self) -> Tensor:
        """θ after the last optimizer step, (P,)."""
        return self.store.end_of_steps() if len(self) else self.initial

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
        """θ_s as a flat vector (P,), s from 0 to S; negative s counts from the end. The record's own: copy to write."""
        length = len(self)
        if not -length - 1 <= s <= length:
            raise InputError(
                f"θ at step {s} was asked for",
                f"This trajectory has the points 0 to {length}",
                f"Write `parameters({length})` for the trained network and `parameters(0)` for the untrained one",
            )
        s = s + length + 1 if s < 0 else s
        return self.store.vector(s) if s < length else self.final

    def begin(self, run: Run, end: End) -> None:
        """Begin to be recorded, or go on: the store takes the steps from now on."""
        self._run = run
        self.stand(end)
        self.store.begin(run)

    def stand(self, end: End) -> None:
        """Note where the path stands now, after its last step."""
        self._end = end
        self.store.note_end(end)

    def extend(self, new: Mapping[str, Tensor]) -> None:
        """Take further parameters into θ, which so far have been constants.

        Earlier points of the path get their present values, earlier gradients get zeros.
        """
        pad = Extension(self.run, new)
        self.store.extend(pad.tail, pad)
        self._run = pad.run
        self.stand(replace(self.end, tail=tuple((name, pad(point)) for name, point in self.tail)))

    def parameters(self, s: int) -> dict[str, Tensor]:
        """θ_s by parameter name: copies, which may be trained on or pruned in place."""
        return self.layout.unflatten(self.vector(s).clone())

    def function(self, dtype: torch.dtype | None = None) -> ModelFunction:
        """The recorded network as a pure function of θ, called as in its last recorded pass: see `arguments`."""
        function, shared = self.run.function(dtype), self.arguments
        return function.with_(state=ForwardState(arguments=shared)) if shared else function

    @property
    def arguments(self) -> Mapping[str | int, Any]:
        """Arguments of the last recorded pass that are of no sample; queries are given them, too."""
        if self._arguments is not None:
            return self._arguments
        if not len(self):
            return {}
        batches = self.store.summary(len(self) - 1).record.batches
        return batches[-1].state.arguments if batches else {}

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
        if not len(self):
            record = "Call `optimizer.step()` inside `with KernelRecorder(...) as recorder:` before using "
            raise TrajectoryError(
                f"`{asker}` was given a trajectory with no steps",
                "A path needs at least one recorded optimizer step",
                f"{record}`recorder.trajectory`"
                if self.end.is_live
                else "Write `until(1)` or `at=1`, or a later "
                "step: at 0 the network is the untrained one, in whose outputs no sample has a share",
            )
        self.check_model(asker)

    def check_model(self, asker: str) -> None:
        """Compare the live model with the record.

        Raises
        ------
        ModelMismatchError
            When a parameter is missing, has another shape, or has other values than at the last recorded step; when
            a buffer or a parameter outside the record is no longer what it was when recording began; or when the
            outputs of a few training samples are no longer what they were at both ends of the record. Of the first part
            of a path, the network's present weights say nothing, and outputs are compared at its start.
        """
        with on_the_cpu():
            self._check_model(asker)

    def _check_model(self, asker: str) -> None:
        function, live_end = self.run.function(), self.end.is_live
        if live_end:
            self._check_weights(asker)
        if (reference := self.reference) is not None:
            final = None
            if live_end and reference.final is not None:
                final = function.with_(constants=self.final_buffers), self.final
            reference.check(asker, (function, self.initial), final)

    def _check_weights(self, asker: str) -> None:
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
        if problems:
            raise ModelMismatchError(
                f"`{asker}` found a model that is not the recorded one: {'; '.join(problems)}",
                "The model's parameters must be those at the end of the trajectory, and all else what it was "
                "throughout, so that nobody explains one network with another one's history",
                "Put them back with `model.load_state_dict({**trajectory.constants, **trajectory.final_buffers, "
                "**trajectory.parameters(-1)}, strict=False)`, record the further training too, or take the path up to "
                "a checkpoint with `trajectory.until(step)` (`KernelMachine(trajectory, at=step)`)",
            )


def _parts_of_earlier(state: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a trajectory that was saved by a version in which it held everything itself."""
    reference = state.get("reference")
    start = Start(state["initial"], state["constants"], state["initial_memory"])
    known = {each.name: state[each.name] for each in fields(Run) if each.name in state}
    known["reference"] = None if reference is None else replace(reference, final=None)
    end = End(state["tail"], state["final_buffers"], state["averages"], None if reference is None else reference.final)
    return {"run": Run(**known, start=start), "store": state["store"], "end": end}
