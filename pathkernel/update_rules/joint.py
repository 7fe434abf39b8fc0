"""Rules of several optimizers that train one network together: each for the parameters that its optimizer holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import TrajectoryError, UnsupportedOptimizerError
from pathkernel.update_rules.rule import Frozen, Memory, Observation, Settings, UpdateRule, kept_after

OPTIMIZER, RULE = "optimizer", "rule"
"""Keys among the settings of a parameter group where a network has several optimizers: the place of its optimizer among
them, and the place of its rule in `JointRule.rules`."""


class JointRule(UpdateRule):
    r"""Several rules, of which each parameter follows one.

    .. math:: (\Delta_p, m_p^+) = \mathrm{step}_{r(p)}(g_p, m_p)

    Which one, r(p), stands among the settings of its parameter group, under the key `RULE`. A joint rule is as linear
    as its parts are, parameter by parameter.

    Parameters
    ----------
    rules
        The parts, at least one; none of them joint.

    Attributes
    ----------
    memory
        As many slots as the part with the most has: part by part, the first of them are its own, in its order, and the
        others stay zero. `of` tells under which keys they lie in the optimizer's state.

    Raises
    ------
    UnsupportedOptimizerError
        For parts that take their gradients elsewhere than at the start of the step.
    """

    def __init__(self, rules: Sequence[UpdateRule]) -> None:
        self.rules = tuple(rules)
        for rule in self.rules:
            if rule.stages > 1 or type(rule).stage_offsets is not UpdateRule.stage_offsets:
                raise UnsupportedOptimizerError(
                    f"{rule.name} was given beside other optimizers",
                    "Optimizers that train one network together take one gradient each, at the parameters that the "
                    "forward pass was made with; this one looks ahead, or takes several",
                    "Give the recorder this optimizer alone, for all parameters, or one that takes its gradient there",
                )
        *others, last = (rule.name for rule in self.rules)
        self.name = f"{', '.join(others)} and {last}" if others else last
        slots = zip_longest(*(rule.memory for rule in self.rules))
        self.memory = tuple(" or ".join(dict.fromkeys(key for key in slot if key is not None)) for slot in slots)
        self.keep_before = tuple(dict.fromkeys(key for rule in self.rules for key in rule.keep_before))
        self.numbers_after = tuple(dict.fromkeys(key for rule in self.rules for key in rule.numbers_after))
        self.elementwise = all(rule.elementwise for rule in self.rules)

    def of(self, settings: Settings) -> UpdateRule:
        """The part that parameters under these settings follow.

        Raises
        ------
        TrajectoryError
            Where the settings name none.
        """
        place = settings.get(RULE)
        if type(place) is not int or not 0 <= place < len(self.rules):
            raise TrajectoryError(
                f"The settings of a parameter group name the rule {str(place)[:20]!r}",
                f"A step of {self.name} says for each group which of its {len(self.rules)} rules it follows",
                "Look for damage with `pathkernel verify`, or pass the rules of the recording in their order",
            )
        return self.rules[place]

    def step(self, gradient: Any, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """The part's step; slots that it does not have stay zero."""
        part = self.of(settings)
        slots = len(part.memory)
        delta, own = part.step(gradient, memory[:slots], frozen, settings)
        return delta, (*own, *(torch.zeros_like(slot) for slot in memory[slots:]))

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """Constants that the part freezes."""
        return self.of(settings).frozen(observed, settings)

    def keep_after(self, settings: Settings) -> tuple[str, ...] | None:
        """Keys of the tensors that the part keeps."""
        return kept_after(self.of(settings), settings)

    def keeps_memory(self, settings: Settings) -> bool:
        """True where the part does."""
        return self.of(settings).keeps_memory(settings)

    def gradient_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Terms that the part adds to the gradient."""
        return self.of(settings).gradient_sources(parameter, frozen, settings)

    def displacement_sources(self, parameter: Tensor, frozen: Frozen, settings: Settings) -> dict[str, Tensor]:
        """Terms that the part adds to the displacement."""
        return self.of(settings).displacement_sources(parameter, frozen, settings)

    def refusal(self, settings: Settings) -> str | None:
        """Why the part refuses."""
        return self.of(settings).refusal(settings)

    def preconditioner(self, shape: torch.Size, frozen: Frozen, settings: Settings, like: Tensor) -> Tensor:
        """Preconditioner of the part."""
        return self.of(settings).preconditioner(shape, frozen, settings, like)


def joint_rule(rules: Sequence[UpdateRule]) -> UpdateRule:
    """The rule of several optimizers: the only one there is, where all are alike; else a `JointRule` of the others.

    Parameters
    ----------
    rules
        That of each optimizer, in their order.
    """
    distinct: list[UpdateRule] = []
    for rule in rules:
        if not any(alike(known, rule) for known in distinct):
            distinct.append(rule)
    return distinct[0] if len(distinct) == 1 else JointRule(distinct)


def alike(one: UpdateRule, other: UpdateRule) -> bool:
    """True where two rules are known to say the same: one object, or of one class without values of their own."""
    return one is other or (type(one) is type(other) and not vars(one) and not vars(other))
