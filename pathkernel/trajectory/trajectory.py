"""The recorded path θ_0 → θ_1 → … → θ_S of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pathkernel._typing import Loss
from pathkernel.errors import InputError, ModelMismatchError, TrajectoryError, check
from pathkernel.functional import ModelFunction, ParameterLayout
from pathkernel.trajectory.memory import MemoryStore
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.step import Segment, Step

if TYPE_CHECKING:
    from pathkernel.update_rules.rule import UpdateRule


@dataclass
class Trajectory:
    """The path of a training run, with the live objects that it was recorded with.

    Attributes
    ----------
    model
        The network. Its parameters are read from the record, never from the module.
    loss
        Batch loss ``(output, target)``.
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
    reduction
        How a loss that returns one number per sample was reduced in the loop, ``"mean"`` or ``"sum"``.
    initial_memory
        The optimizer's memory before the first recorded step, by parameter name; empty for a fresh optimizer.
    """

    model: nn.Module
    loss: Loss
    data: Samples
    layout: ParameterLayout
    initial: Tensor
    constants: dict[str, Tensor]
    rule: UpdateRule
    reduction: str = "mean"
    initial_memory: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    store: MemoryStore = field(default_factory=MemoryStore)

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
    def final(self) -> Tensor:
        """θ_S, (P,)."""
        return self.store.read(len(self) - 1).after if len(self) else self.initial

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
        indices = range(len(self) - 1, -1, -1) if reverse else range(len(self))
        for index in indices:
            step = self.store.read(index)
            came_from = self.store.read(index - 1).after if index else self.initial
            pieces = [Segment(step.before, step.after, step)]
            if came_from is not step.before and not torch.equal(came_from, step.before):
                pieces.insert(0, Segment(came_from, step.before, None))
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
        return self.store.read(s).before if s < length else self.final

    def parameters(self, s: int) -> dict[str, Tensor]:
        """θ_s by parameter name."""
        return self.layout.unflatten(self.vector(s))

    def function(self, dtype: torch.dtype | None = None) -> ModelFunction:
        """The recorded network as a pure function of θ."""
        return ModelFunction(self.model, self.layout, self.constants, dtype or self.dtype)

    def require_steps(self, asker: str) -> None:
        """Refuse an empty path, and a model that is no longer the recorded one."""
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
        """Compare the live model with the end of the record.

        Raises
        ------
        ModelMismatchError
            When a parameter is missing, has another shape, or has other values than at the last recorded step; or
            when a buffer or a parameter outside the record is no longer what it was when recording began.
        """
        live = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        problems = []
        for name, recorded in {**self.constants, **self.layout.unflatten(self.final)}.items():
            if name not in live:
                problems.append(f"`{name}` is missing")
            elif live[name].shape != recorded.shape:
                problems.append(f"`{name}` has shape {tuple(live[name].shape)}, not {tuple(recorded.shape)}")
            elif not torch.equal(live[name].detach().to(recorded), recorded):
                moved = (live[name].detach().double() - recorded.double()).abs().max().item()
                problems.append(f"`{name}` differs by up to {moved:.2g}")
        check(
            not problems,
            ModelMismatchError,
            f"`{asker}` found a model that is not the recorded one: {'; '.join(problems)}",
            "The model's parameters must be those at the end of the trajectory, and all else what it was throughout, "
            "so that nobody explains one network with another one's history",
            "Put them back with `model.load_state_dict({**trajectory.constants, **trajectory.parameters(-1)}, "
            "strict=False)`, or record the further training too",
        )
