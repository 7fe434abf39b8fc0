"""A step before it is taken, as far as it is known then, and what its rule freezes once it has been taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.readings import Reading
from pathkernel.trajectory.frozen_state import FrozenOnReading, OptimizerState, frozen_in
from pathkernel.trajectory.step import Settings
from pathkernel.update_rules.rule import Frozen, Memory, Observation, UpdateRule


@dataclass(frozen=True)
class OpenStep:
    """A step that is being taken: all that is known of it before.

    Attributes
    ----------
    before
        θ_s, (P,).
    keys
        Keys of the state tensors to keep after the step; None where the rule looks at the live state.
    vectors, fresh
        Of the state before the step, where it does not; see `pathkernel.trajectory.frozen_state.OptimizerState`. Those
        without a gradient are among the fresh: it may only arrive inside the step.
    states
        Where it does: the optimizer's state by parameter; see `pathkernel.update_rules.rule.Observation`.
    active
        Parameters with a gradient.
    gradient
        (P,), or None where it only arrives inside the step.
    settings
        Numbers and flags of every parameter group, as the pre-hook found them.
    memory
        The optimizer's memory, where another pre-hook ran after the recorder's; else None.
    """

    before: Tensor
    keys: tuple[str, ...] | None
    vectors: Mapping[str, Tensor]
    fresh: frozenset[str]
    states: Mapping[str, Mapping[str, Any]]
    active: frozenset[str]
    gradient: Tensor | None
    settings: Settings
    memory: Mapping[str, Memory] | None

    @classmethod
    def of(
        cls, live: LiveParameters, rule: UpdateRule, before: Tensor, gradient: Tensor | None, last: bool
    ) -> OpenStep:
        """The step that an optimizer is about to take; ``last`` tells that no other pre-hook comes after this."""
        keys = live.kept_keys(rule)
        vectors = {} if keys is None else live.state_vectors(rule.keep_before)
        fresh = frozenset() if keys is None else live.fresh(rule)
        states = live.states(rule) if keys is None else {}
        memory, settings = None if last else live.memory(rule), live.settings()
        return cls(before, keys, vectors, fresh, states, live.active(), gradient, settings, memory)

    def frozen(
        self, live: LiveParameters, rule: UpdateRule, layout: ParameterLayout, after: Tensor, reading: Reading
    ) -> Mapping[str, Frozen]:
        """Constants of the step: found now from the live state, or kept as what they are found from on reading."""
        before, device = self.before, self.before.device.type
        gradient, active, settings = reading
        if self.keys is not None:
            vectors = live.state_vectors(self.keys)
            numbers = live.state_numbers(rule.numbers_after, active)
            # One set for many steps: most often all have a memory, or none.
            fresh = active if self.fresh >= active else self.fresh & active
            state = OptimizerState(self.vectors, vectors, numbers, fresh, device)
            evaluate = partial(frozen_in, rule, layout)
            return FrozenOnReading(state, evaluate, before, gradient, after, active, live.groups, settings)
        at, received, moved = (layout.unflatten(v) for v in (before, gradient, after - before))
        observed = {
            name: Observation(
                before=self.states.get(name, {}),
                after=live.optimizer.state[live.named[name]],
                parameter=at[name],
                gradient=received[name],
                displacement=moved[name],
                device=device,
            )
            for name in active
        }
        return {name: rule.frozen(seen, settings[live.groups[name]]) for name, seen in observed.items()}
