"""The optimizers that train one network: one, or several that are read as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from pathkernel.errors import InputError, RecordingError, UnsupportedOptimizerError
from pathkernel.update_rules.joint import OPTIMIZER, RULE, JointRule, alike, joint_rule
from pathkernel.update_rules.rule import UpdateRule
from pathkernel.update_rules.table import rule_of


class JointState(Mapping[Tensor, Any]):
    """The state of several optimizers, by parameter.

    Parameters
    ----------
    optimizers
        The optimizers; no parameter is held by two of them.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def __getitem__(self, parameter: Tensor) -> Any:
        # Asked first: theirs make an entry of what is missing.
        held = [optimizer.state for optimizer in self._optimizers if parameter in optimizer.state]
        nothing: dict[Tensor, Any] = {}
        return (held[0] if held else nothing)[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for optimizer in self._optimizers for parameter in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


class JointOptimizer:
    """Several optimizers of one network as one.

    Parameters
    ----------
    optimizers
        The optimizers.
    rules
        Their rules, in the same order.
    rule
        The rule of all of them that a record has begun with; by default, that follows from theirs.

    Attributes
    ----------
    rule
        The rule of all of them; see `pathkernel.update_rules.joint.joint_rule`.
    places
        For each optimizer the place of its rule in a joint one.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], rules: Sequence[UpdateRule], rule: UpdateRule | None = None
    ) -> None:
        self.optimizers, self.rules = tuple(optimizers), tuple(rules)
        self.rule = joint_rule(rules) if rule is None else rule
        known = self.rule.rules if isinstance(self.rule, JointRule) else (self.rule,)
        self.places = tuple(next(k for k, one in enumerate(known) if alike(one, own)) for own in rules)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All parameter groups, each with what tells whose it is."""
        return [
            {**group, **self.marks(place)}
            for place, optimizer in enumerate(self.optimizers)
            for group in optimizer.param_groups
        ]

    def marks(self, place: int) -> dict[str, int]:
        """Marks that join the settings of an optimizer's groups."""
        own = {OPTIMIZER: place}
        return {**own, RULE: self.places[place]} if isinstance(self.rule, JointRule) else own

    @property
    def state(self) -> JointState:
        """The state of all of them."""
        return JointState(self.optimizers)


def unwrapped_optimizers(given: Any, rule: Any = None) -> list[Optimizer]:
    """The optimizers that a recorder was given: one or a list of them, without what frameworks wrap around them.

    Raises
    ------
    InputError
        For anything else.
    UnsupportedOptimizerError
        For a method that moves the parameters to take its gradient elsewhere (SAM), by name.
    """
    several = list(given) if isinstance(given, (list, tuple)) else [given]
    found = [_unwrapped(one) for one in several]
    for one in found:
        if not isinstance(one, Optimizer):
            raise InputError(
                f"`optimizer` is, or holds, a {type(one).__name__}",
                "Optimizers are those of `torch.optim`, and classes made from `torch.optim.Optimizer`",
                "Write `KernelRecorder(model, optimizer, ...)`, or `KernelRecorder(model, [muon, adamw], ...)` for "
                "several",
            )
        if not isinstance(rule, UpdateRule):
            _refuse_two_passes(one)
    if not found or len({id(one) for one in found}) < len(found):
        raise InputError(
            f"`optimizer` is a list of {len(found)}" + (", one of them twice" if found else ""),
            "Several optimizers are given as a list with each of them once",
            "Write `KernelRecorder(model, [muon, adamw], ...)`",
        )
    refuse_shared(found)
    return found


def _unwrapped(given: Any) -> Any:
    """The optimizer inside wrappers that only hand it on, as accelerate's, Fabric's: hooks do not go on those."""
    met: list[int] = []
    while id(given) not in met:
        met.append(id(given))
        inner = getattr(given, "optimizer", None)
        hooks = getattr(given, "_optimizer_step_pre_hooks", None)
        own = isinstance(given, Optimizer) and hooks is not None
        # One with hooks of its own does something of its own; Fabric's shares those of the one inside.
        if inner is None or (own and hooks is not getattr(inner, "_optimizer_step_pre_hooks", None)):
            break
        given = inner
    return given


def _refuse_two_passes(optimizer: Optimizer) -> None:
    inner = getattr(optimizer, "base_optimizer", None)
    two_passes = hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")
    if two_passes or (isinstance(inner, Optimizer) and "SAM" in type(optimizer).__name__.upper()):
        alone = type(inner).__name__ if isinstance(inner, Optimizer) else "SGD"
        raise UnsupportedOptimizerError(
            f"`{type(optimizer).__name__}` takes two passes for a step, the second at other parameters than those that "
            "the step begins with (sharpness-aware minimisation)",
            "The gradient of a step on record is taken at the parameters that the step begins with",
            f"Train with the optimizer inside alone, `KernelRecorder(model, torch.optim.{alone}(...), ...)`; or pass "
            "`rule=` with an `UpdateRule` whose `stage_offsets` say where the gradient was taken",
        )


def refuse_shared(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimizers that hold a parameter together.

    Raises
    ------
    RecordingError
        For a parameter in two of them.
    """
    holders: dict[int, Optimizer] = {}
    for optimizer in optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            other = holders.setdefault(id(p), optimizer)
            if other is not optimizer:
                raise RecordingError(
                    f"A parameter of shape {tuple(p.shape)} is held by two of the optimizers, {type(other).__name__} "
                    f"and {type(optimizer).__name__}",
                    "Each parameter has one optimizer, whose memory it has on record",
                    "Split the parameters among the optimizers, or add the losses and let one of them step",
                )


def rules_of(optimizers: Sequence[Optimizer], rule: Any) -> list[UpdateRule]:
    """The rule of each optimizer.

    Parameters
    ----------
    optimizers
        The optimizers.
    rule
        As `pathkernel.KernelRecorder` takes it: None, a name or a rule for all of them; or one of these for each, as a
        list or as a `JointRule`.
    """
    if isinstance(rule, JointRule) and len(optimizers) > 1:
        rule = rule.rules
    if not isinstance(rule, (list, tuple)):
        return [rule_of(one, rule) for one in optimizers]
    if len(rule) != len(optimizers):
        raise InputError(
            f"`rule=` has {len(rule)} rules for {len(optimizers)} optimizer{'s' * (len(optimizers) != 1)}",
            "Rules in a list are those of the optimizers, in their order; None for the one that is known",
            "Write `KernelRecorder(model, [first, second], ..., rule=[None, YourRule()])`",
        )
    return [rule_of(one, own) for one, own in zip(optimizers, rule, strict=True)]


def held(optimizer: Optimizer | JointOptimizer) -> tuple[Optimizer, ...]:
    """The optimizers that one stands for."""
    return optimizer.optimizers if isinstance(optimizer, JointOptimizer) else (optimizer,)


def described(optimizer: Optimizer | JointOptimizer) -> str:
    """The classes of the optimizers, for messages."""
    return " and ".join(dict.fromkeys(type(one).__name__ for one in held(optimizer)))
