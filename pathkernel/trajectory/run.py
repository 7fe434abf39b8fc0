"""`Run`: what is fixed when the recording of a training run begins; `End`: where it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pathkernel._typing import Parameters
from pathkernel.gradients.batch_axes import BatchAxis
from pathkernel.gradients.forward_state import device_of
from pathkernel.gradients.losses import Objective
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.gradients.returned import Returns
from pathkernel.runtime.pickling import check_picklable, with_memory_of_their_own
from pathkernel.trajectory.averages import AverageRecord
from pathkernel.trajectory.reference_outputs import ReferenceOutputs
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.schedule import EVERY_STEP, RecordingLevel
from pathkernel.update_rules.rule import UpdateRule


@dataclass(frozen=True, eq=False)
class Start:
    """Where a path begins.

    Attributes
    ----------
    initial
        θ_0, (P,).
    constants
        Parameters outside θ and buffers, as they were when recording began.
    memory
        The optimizer's memory before the first recorded step, by parameter name; empty for a fresh optimizer.
    """

    initial: Tensor
    constants: dict[str, Tensor]
    memory: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class End:
    """Where a path stands after its last step.

    Attributes
    ----------
    tail
        Changes made outside the optimizer after its last step; see `pathkernel.trajectory.step.Step.changes`.
    final_buffers
        Buffers that have changed since recording began.
    averages
        Averages of the weights kept beside training, by name.
    outputs
        (n, K), what the network makes of the samples of `Run.reference` there; None where that is not known.
    is_live
        Whether the network stands there, so that it can be compared with the record.
    """

    tail: tuple[tuple[str, Tensor], ...] = ()
    final_buffers: Mapping[str, Tensor] = field(default_factory=dict)
    averages: dict[str, AverageRecord] = field(default_factory=dict)
    outputs: Tensor | None = None
    is_live: bool = True


@dataclass(frozen=True, eq=False)
class RecordedOptimizer:
    """Class and constants of the optimizer of a run with keyframes, for steps to be trained again.

    Attributes
    ----------
    kind
        Its class.
    constants
        See `pathkernel.trajectory.replay.Replay.constants`.
    threads
        How many threads torch computed with; None where that is not known.
    """

    kind: type[Optimizer]
    constants: Mapping[str, Any]
    threads: int | None


@dataclass(frozen=True, eq=False)
class Run:
    """A training run as it was when its recording began, with the live objects that it was recorded with.

    Attributes
    ----------
    model
        The network. Its parameters are read from the record, never from the module.
    objective
        What the loop differentiates: loss, reduction, regularisers.
    data
        Training samples by id.
    rule
        How the optimizer turns gradients into displacement.
    layout
        Where each parameter lies in θ.
    start
        Where the path begins, or what reads it from a store when it is first asked for.
    returns
        What the network's outputs are among all that it returns; see `pathkernel.gradients.returned`.
    task
        ``"classification"`` or ``"regression"``; None where the loss or the targets tell.
    schedule
        What is kept of each step.
    reference
        What the network made of a few training samples at θ_0; None where that is not known.
    optimizer
        Where steps are trained again when they are read: by what.
    watch
        Names of the submodules that the loop calls in place of the network, one after the other.
    batch_axis
        Where samples lie in what the network takes and returns; see `pathkernel.gradients.batch_axes`.
    """

    model: nn.Module
    objective: Objective
    data: Samples
    rule: UpdateRule
    layout: ParameterLayout
    start: Start | Callable[[], Start]
    returns: Returns = None
    task: str | None = None
    schedule: RecordingLevel = EVERY_STEP
    reference: ReferenceOutputs | None = None
    optimizer: RecordedOptimizer | None = None
    watch: tuple[str, ...] = ()
    batch_axis: BatchAxis = 0

    def __getstate__(self) -> dict[str, Any]:
        """All parts, the start included where it was not read yet."""
        objective = self.objective
        check_picklable(
            model=self.model,
            loss=objective.loss,
            regularizers=objective.regularizers,
            data=self.data,
            rule=self.rule,
            returns=self.returns,
        )
        parts = {each.name: getattr(self, each.name) for each in fields(self)}
        return {**parts, "start": with_memory_of_their_own(self._begun)}

    @cached_property
    def _begun(self) -> Start:
        return self.start if isinstance(self.start, Start) else self.start()

    @property
    def has_read_start(self) -> bool:
        """True where θ_0 is at hand."""
        return isinstance(self.start, Start) or "_begun" in vars(self)

    @property
    def initial(self) -> Tensor:
        """θ_0, (P,)."""
        return self._begun.initial

    @property
    def constants(self) -> dict[str, Tensor]:
        """Parameters outside θ and buffers, as they were when recording began."""
        return self._begun.constants

    @property
    def initial_memory(self) -> dict[str, tuple[Tensor, ...]]:
        """The optimizer's memory before the first recorded step, by parameter name."""
        return self._begun.memory

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of θ."""
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

    def function(self, dtype: torch.dtype | None = None) -> ModelFunction:
        """The network as a pure function of θ."""
        return self.function_of(self.constants, dtype)

    def function_of(self, constants: Parameters, dtype: torch.dtype | None = None) -> ModelFunction:
        """The network with other constants."""
        return ModelFunction(
            self.model,
            self.layout,
            constants,
            dtype or self.dtype,
            returns=self.returns,
            watch=self.watch,
            batch_axis=self.batch_axis,
        )

    def live_parameters(self, dtype: torch.dtype | None = None) -> Tensor:
        """θ as it is in the network now, (P,)."""
        live = dict(self.model.named_parameters(remove_duplicate=False))
        named = {name: live[name].detach() for name in self.layout.names}
        return self.layout.flatten(named, dtype or self.dtype)


class Extension:
    """Parameters that join θ, of which they have been constants so far: lengthens points of the path by their values.

    Parameters
    ----------
    run
        The run as it was.
    new
        The values of the parameters by name.

    Attributes
    ----------
    tail
        The values as a vector.
    run
        The run as if they had been part of θ from the beginning.
    """

    def __init__(self, run: Run, new: Mapping[str, Tensor]) -> None:
        self.tail = ParameterLayout.of(new).flatten(new, run.dtype).detach()
        # One tensor for the end of a step and the start of the next, as before; the short ones keep their identities.
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        layout = ParameterLayout(
            (*run.layout.names, *new), (*run.layout.shapes, *(value.shape for value in new.values()))
        )
        constants = {name: value for name, value in run.constants.items() if name not in new}
        self.run = replace(run, layout=layout, start=Start(self(run.initial), constants, run.initial_memory))

    def __call__(self, point: Tensor) -> Tensor:
        """The longer point; the same result for the same tensor, so that shared ends stay shared."""
        if id(point) not in self._known:
            self._known[id(point)] = point, torch.cat([point, self.tail])
        return self._known[id(point)][1]
