"""Which rule belongs to which optimizer."""

from __future__ import annotations

from torch import optim
from torch.optim import Optimizer

from pathkernel.errors import UnsupportedOptimizerError
from pathkernel.update_rules.adam import Adam, AdamW
from pathkernel.update_rules.rule import UpdateRule
from pathkernel.update_rules.sgd import SGD

RULES: dict[type[Optimizer], type[UpdateRule]] = {optim.SGD: SGD, optim.Adam: Adam, optim.AdamW: AdamW}


def rule_of(optimizer: Optimizer) -> UpdateRule:
    """The rule of an optimizer, by its exact class: a subclass may step differently.

    Raises
    ------
    UnsupportedOptimizerError
        For a class without a rule, or settings that its rule does not cover.
    """
    rule_class = RULES.get(type(optimizer))
    known = ", ".join(sorted(cls.__name__ for cls in RULES))
    if rule_class is None:
        raise UnsupportedOptimizerError(
            f"`{type(optimizer).__module__}.{type(optimizer).__name__}` has no update rule",
            f"Optimizers with a rule are {known}, by their exact class",
            "Pass `rule=` with an `UpdateRule` that states its step in a few lines, or train with one of these",
        )
    return rule_class()
