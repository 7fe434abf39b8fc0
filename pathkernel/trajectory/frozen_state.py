"""The optimizer's state around a step, from which its rule finds what is frozen when the step is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.update_rules.rule import Declared, Observation, UpdateRule


@dataclass(frozen=True)
class OptimizerState:
    """Optimizer's state around a step, as far as its rule finds what is frozen from it.

    Attributes
    ----------
    before, after
        State tensors before and after the step by their key, (P,) each, zero where a parameter has none.
    numbers
        Numbers after the step by their key, one for each active parameter in the order of θ.
    fresh
        Active parameters that had no linear memory before the step.
    device
        Type of the device on which the step was taken.
    """

    before: Mapping[str, Tensor] = field(default_factory=dict)
    after: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: Mapping[str, Tensor] = field(default_factory=dict)
    fresh: frozenset[str] = frozenset()
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class FrozenOnReading(Mapping[str, Mapping[str, Any]]):
    """Tensors that a rule freezes in a step by parameter name, found when they are read rather than kept.

    Only the step that was read last is remembered: reading a trajectory takes no memory in proportion to its length.

    Attributes
    ----------
    state
        The optimizer's state around the step.
    evaluate
        Finds what is frozen: `frozen_in` with rule and layout filled in.
    before, gradient, after, active, groups, hyperparameters
        As in `Step`.
    """

    state: OptimizerState
    evaluate: Callable[[FrozenOnReading], Mapping[str, Mapping[str, Any]]] = field(repr=False)
    before: Tensor = field(repr=False)
    gradient: Tensor = field(repr=False)
    after: Tensor = field(repr=False)
    active: frozenset[str] = field(repr=False)
    groups: Mapping[str, int] = field(repr=False)
    hyperparameters: tuple[Mapping[str, Any], ...] = field(repr=False)

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        return _evaluated(self)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_evaluated(self))

    def __len__(self) -> int:
        return len(self.active)

    __hash__ = object.__hash__  # one step is not another


@lru_cache(maxsize=1)
def _evaluated(frozen: FrozenOnReading) -> Mapping[str, Mapping[str, Any]]:
    return frozen.evaluate(frozen)


class _Vectors:
    """The vectors that observations are cut out of, (P,) each; Δ is formed where a rule asks for it, which few do."""

    def __init__(self, taken: FrozenOnReading) -> None:
        self.parameter, self.gradient, self._after = taken.before, taken.gradient, taken.after

    @cached_property
    def displacement(self) -> Tensor:
        """Δ_s."""
        return self._after - self.parameter


class _ObservedOnReading(Observation):
    """Observation whose tensors are cut out of the step's vectors when they are asked for."""

    def __init__(
        self,
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        device: str,
        vectors: _Vectors,
        where: slice,
        shape: torch.Size,
    ) -> None:
        vars(self).update(before=before, after=after, device=device, _cut=(vectors, where, shape))

    def __getattr__(self, name: str) -> Tensor:
        if name not in ("parameter", "gradient", "displacement"):
            raise AttributeError(name)
        vectors, where, shape = self._cut
        found: Tensor = getattr(vectors, name)[where].reshape(shape)
        return found


def frozen_in(rule: UpdateRule, layout: ParameterLayout, taken: FrozenOnReading) -> dict[str, dict[str, Any]]:
    """Tensors and numbers held fixed in a step, by parameter name, from what was kept of it.

    Parameters
    ----------
    rule
        The optimizer's.
    layout
        Where each parameter lay in θ.
    taken
        The step, and the optimizer's state around it.
    """
    state, vectors = taken.state, _Vectors(taken)
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    before = {key: layout.unflatten(vector) for key, vector in state.before.items()}
    after = {key: layout.unflatten(vector) for key, vector in state.after.items()}
    frozen = {}
    for row, name in enumerate(name for name in layout.names if name in taken.active):
        settings = taken.hyperparameters[taken.groups[name]]
        own = rule.of(settings)
        if own is rule:
            kept_before, kept_after, numbered = list(before), list(after), list(state.numbers)
        else:  # vectors hold zeros, or numbers of the same name, where another optimizer's parameters are
            kept_before, kept_after = list(own.keep_before), list(own.keep_after(settings) or ())
            numbered = list(own.numbers_after)
        memory = {} if name in state.fresh else dict.fromkeys(own.memory, True)
        observed = _ObservedOnReading(
            before=Declared({**memory, **{key: before[key][name] for key in kept_before}}, own, "before"),
            after=Declared(
                {
                    **{key: state.numbers[key][row] for key in numbered},
                    **{key: after[key][name] for key in kept_after},
                },
                own,
                "after",
            ),
            device=state.device,
            vectors=vectors,
            where=layout.slices[name],
            shape=shapes[name],
        )
        frozen[name] = own.frozen(observed, settings)
    return frozen
