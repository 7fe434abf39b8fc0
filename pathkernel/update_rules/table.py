"""Table of optimizers and their rules."""

from __future__ import annotations

from torch import optim
from torch.optim import Optimizer

from pathkernel.errors import UnsupportedOptimizerError
from pathkernel.update_rules.adadelta import Adadelta
from pathkernel.update_rules.adafactor import Adafactor
from pathkernel.update_rules.adagrad import Adagrad
from pathkernel.update_rules.adam import Adam, AdamW
from pathkernel.update_rules.adam_variants import Adamax, NAdam, RAdam
from pathkernel.update_rules.asgd import ASGD
from pathkernel.update_rules.elementwise import Elementwise
from pathkernel.update_rules.muon import Muon
from pathkernel.update_rules.rmsprop import RMSprop
from pathkernel.update_rules.rprop import Rprop
from pathkernel.update_rules.rule import UpdateRule, check_declaration
from pathkernel.update_rules.sgd import SGD

RULES: dict[type[Optimizer], type[UpdateRule]] = {
    optim.SGD: SGD,
    optim.Adam: Adam,
    optim.AdamW: AdamW,
    optim.Adamax: Adamax,
    optim.NAdam: NAdam,
    optim.RAdam: RAdam,
    optim.Adagrad: Adagrad,
    optim.Adadelta: Adadelta,
    optim.RMSprop: RMSprop,
    optim.ASGD: ASGD,
    optim.Rprop: Rprop,
    optim.Adafactor: Adafactor,
}
if hasattr(optim, "Muon"):  # torch ≥ 2.9
    RULES[optim.Muon] = Muon

NAMED_RULES: dict[str, type[UpdateRule]] = {"elementwise": Elementwise}
"""Conventions that hold for any optimizer, on request only."""


def rule_of(optimizer: Optimizer, rule: str | UpdateRule | None = None) -> UpdateRule:
    """The rule of an optimizer, by its exact class: a subclass may step differently.

    Parameters
    ----------
    optimizer
        The optimizer to be recorded.
    rule
        A rule of the user's own; ``"elementwise"`` for the convention of `Elementwise`; None for the one that the
        optimizer's class names as its attribute ``rule``, or else the one in the table.

    Raises
    ------
    UnsupportedOptimizerError
        For a class without a rule, an unknown name, or sparse gradients.
    RecordingError
        For a rule that does not say what it reads as `pathkernel.update_rules.rule.Observes` does.
    """
    if isinstance(rule, UpdateRule):
        check_declaration(rule)
        return rule
    if isinstance(optimizer, optim.SparseAdam):
        raise UnsupportedOptimizerError(
            "`torch.optim.SparseAdam` has no update rule",
            "Gradients on record are dense, and this optimizer takes sparse ones only",
            "Train with `torch.optim.Adam`, and embeddings with `sparse=False`",
        )
    if rule is not None:
        if rule not in NAMED_RULES:
            raise UnsupportedOptimizerError(
                f"`rule={rule!r}` was given",
                f"Rules that go by a name are {', '.join(map(repr, NAMED_RULES))}; any other is an `UpdateRule`",
                'Write `KernelRecorder(..., rule="elementwise")`, or pass an instance of your `UpdateRule`',
            )
        return NAMED_RULES[rule]()
    own = vars(type(optimizer)).get("rule")  # of this very class: a subclass may step differently
    rule_class = own if isinstance(own, type) and issubclass(own, UpdateRule) else RULES.get(type(optimizer))
    if rule_class is not None:
        check_declaration(rule_class())
        return rule_class()
    if isinstance(optimizer, optim.LBFGS):
        raise UnsupportedOptimizerError(
            "`torch.optim.LBFGS` has no update rule",
            "Inside one step it moves the parameters several times, with a gradient at each place, while a step on "
            "record has one gradient, at its start",
            'Write `LBFGS(..., max_iter=1)` without a line search and `KernelRecorder(..., rule="elementwise")`, which '
            "is exact in total and shares each step by a convention; or train with a first-order optimizer",
        )
    known = ", ".join(sorted(cls.__name__ for cls in RULES))
    raise UnsupportedOptimizerError(
        f"`{type(optimizer).__module__}.{type(optimizer).__name__}` has no update rule",
        f"Optimizers with a rule are {known}, by their exact class",
        "Pass `rule=` with an `UpdateRule` that states its step in a few lines; or "
        '`rule="elementwise"`, which is exact in total and shares each step by a convention; or train with one of '
        "these",
    )
