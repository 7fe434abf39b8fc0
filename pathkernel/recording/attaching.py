"""Optimizers that join a recording which has been made already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from pathkernel.errors import RecordingError
from pathkernel.recording.optimizers import JointOptimizer, held
from pathkernel.update_rules.joint import JointRule, alike
from pathkernel.update_rules.rule import UpdateRule


def joined(
    now: Optimizer | JointOptimizer, on_record: UpdateRule, new: Optimizer, rule: UpdateRule
) -> Optimizer | JointOptimizer:
    """The optimizers of a recording with another one, which takes the place of those whose parameters it holds.

    Parameters
    ----------
    now, on_record
        The optimizers, and the rule that their steps are on record under.
    new, rule
        The other one, and its rule.

    Raises
    ------
    RecordingError
        Where it holds some of the parameters of another one, or follows another rule.
    """
    optimizers, mine = list(held(now)), _parameters(new)
    theirs = list(now.rules) if isinstance(now, JointOptimizer) else [on_record]
    replaced = [place for place, one in enumerate(optimizers) if _parameters(one) & mine]
    for place in replaced:
        if not _parameters(optimizers[place]) <= mine:
            raise RecordingError(
                f"{type(new).__name__} holds some of the parameters of {type(optimizers[place]).__name__}, not all",
                "Each parameter has one optimizer: another one takes over all that it has, or brings parameters that "
                "have none",
                "Write `recorder.attach(optimizer)` with an optimizer that holds the same parameters, or others",
            )
        if not alike(theirs[place], rule):
            raise _another_rule(new, rule, theirs)
    if not any(alike(one, rule) for one in theirs):
        raise _another_rule(new, rule, theirs)
    if replaced:
        optimizers[replaced[0]] = new
        kept = [place for place in range(len(optimizers)) if place not in replaced[1:]]
        optimizers, theirs = [optimizers[place] for place in kept], [theirs[place] for place in kept]
    else:
        optimizers, theirs = [*optimizers, new], [*theirs, rule]
    if len(optimizers) == 1 and not isinstance(now, JointOptimizer):
        return optimizers[0]
    return JointOptimizer(optimizers, theirs, on_record)


def others_of(now: Optimizer | JointOptimizer, new: Sequence[Optimizer], given: Any) -> tuple[list[Optimizer], Any]:
    """The optimizers of a recorder whose parameters no new one holds, and the rules that it was given for all of them.

    Parameters
    ----------
    now, new
        The recorder's optimizers, and those that join.
    given
        ``rule=`` of the recorder, for the optimizers that it has.
    """
    taken = {p for one in new for p in _parameters(one)}
    places = [place for place, one in enumerate(held(now)) if not _parameters(one) & taken]
    rules = given.rules if isinstance(given, JointRule) else given
    if isinstance(rules, (list, tuple)):
        rules = [*(rules[place] for place in places), *(None for _ in new)]
    return [held(now)[place] for place in places], rules


def _another_rule(new: Optimizer, rule: UpdateRule, known: Sequence[UpdateRule]) -> RecordingError:
    names = ", ".join(dict.fromkeys(one.name for one in known))
    return RecordingError(
        f"{type(new).__name__} follows the rule of {rule.name}, and steps are on record under {names}",
        "The rules of a record are those that it began with, and a parameter keeps its own",
        "Give the recorder all optimizers at the start, `KernelRecorder(model, [first, second], ...)`; or make a new "
        "KernelRecorder here",
    )


def _parameters(optimizer: Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}
