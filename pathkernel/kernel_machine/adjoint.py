r"""The adjoint of one optimizer step, applied to blocks of columns.

Of Q cotangents, a block of columns at a time:

.. math:: u_s = a_s \circ q + \sum_k c_{sk} \circ \mu_k^+,\qquad
          \mu_j = b_j \circ q + \sum_k d_{jk} \circ \mu_k^+

For an elementwise rule the coefficients are what the step makes of a vector of ones in each of its inputs, found once
a step for all queries; other rules are differentiated (`pathkernel.update_rules.rule.adjoint`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pathkernel.gradients.forward_derivatives import REFUSALS
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.runtime.transfers import numbers
from pathkernel.trajectory.alike import frozen_of, stepping_alike
from pathkernel.trajectory.step import Step
from pathkernel.update_rules.rule import Frozen, Settings, UpdateRule, adjoint

KEPT = 64
"""Coefficients that are kept from step to step. Chosen: a few parameter groups of a few steps."""

TRUE, FALSE = torch.tensor(True), torch.tensor(False)

COMPARED = 64
"""Entries at which coefficients from inputs of one entry are compared with those from whole ones. Chosen."""

NUMBERS = (bool, int, float, str, type(None))
"""Types of settings by whose equality coefficients are the same."""

Coefficient = float | Tensor
"""Number for all entries of a parameter, or a tensor with one for each."""

Scaled = tuple[Tensor | None, float]
"""Cotangents as a matrix times a number; None where they are zero."""


@dataclass(frozen=True)
class Linear:
    """Coefficients by which an elementwise step multiplies each of its inputs.

    Attributes
    ----------
    gradients
        For each gradient of the step, a and then c for each memory slot.
    memory
        For each memory slot, b and then d for each memory slot.
    ratio
        ρ where u = ρ μ: one gradient, one slot, and both rows proportional; else None.
    """

    gradients: tuple[tuple[Coefficient, ...], ...]
    memory: tuple[tuple[Coefficient, ...], ...]
    ratio: float | None

    @cached_property
    def rate(self) -> float | None:
        """A scalar a of a step that takes one gradient and puts nothing into its memory; else None."""
        forgets = all(row[0] == 0.0 for row in self.memory if not isinstance(row[0], Tensor))
        dense = any(isinstance(row[0], Tensor) for row in self.memory)
        a = self.gradients[0][0]
        return a if len(self.gradients) == 1 and forgets and not dense and isinstance(a, float) else None

    @property
    def forgets(self) -> bool:
        """True where nothing comes before the step: one gradient, one slot, which the step begins anew."""
        alone = len(self.gradients) == len(self.memory) == 1
        return alone and not any(isinstance(c, Tensor) or c != 0.0 for c in self.memory[0])

    @property
    def in_place(self) -> bool:
        """True where u needs no room beside the memory's cotangent: it is a multiple of it, or takes its place."""
        return self.ratio is not None or self.forgets


@dataclass(frozen=True)
class Stepped:
    """Parameter whose coefficients are wanted: the arguments of `pathkernel.update_rules.rule.UpdateRule.step`."""

    rule: UpdateRule
    frozen: Frozen
    settings: Settings
    shape: torch.Size

    @cached_property
    def kind(self) -> Any:
        """The same where a step calls the same functions: rule, settings, and what is frozen, tensors by their type."""
        frozen = (
            (key, value.dtype if isinstance(value, Tensor) else value if isinstance(value, NUMBERS) else type(value))
            for key, value in self.frozen.items()
        )
        return id(self.rule), id(self.settings), tuple(frozen)


class _Settled(NamedTuple):
    """Parameters whose steps have the same coefficients: their group, what is frozen of them, and its settings."""

    group: int
    frozen: tuple[tuple[str, Any], ...]
    settings: tuple[tuple[str, Any], ...]


def linear(cases: Mapping[Any, Stepped], proved: dict[Any, bool] | None = None) -> dict[Any, Linear]:
    """The coefficients of some parameters' steps under elementwise rules, float64; read in one transfer.

    ``proved`` remembers of which kind of case inputs of one entry were seen to stand for whole ones, or not.

    Time: one evaluation of the rule for each of its inputs, and each of the parameters.
    """
    proved = {} if proved is None else proved
    rows = {key: _responses(case, proved) for key, case in cases.items()}
    asked: list[Tensor] = []
    for own in rows.values():
        asked += [number for row in own for value in row for number in _sameness(value)]
        asked += _proportionality(own)
    read = iter(numbers(asked))
    found = {}
    for key, own in rows.items():
        table = []
        for row in own:
            pairs = [(value, next(read), next(read)) for value in row]
            table.append(tuple(first if same else value for value, first, same in pairs))
        stages = cases[key].rule.stages
        ratio = _ratio(table, bool(next(read))) if _may_be_proportional(own) else None
        found[key] = Linear(tuple(table[:stages]), tuple(table[stages:]), ratio)
    return found


def _responses(case: Stepped, proved: dict[Any, bool]) -> list[tuple[Tensor, ...]]:
    """Responses of a step to ones in each of its inputs and zeros in the others: (n,), or (1,) where entries agree."""
    # Where nothing frozen has the parameter's shape, one entry stands for all.
    shaped = [value for value in case.frozen.values() if isinstance(value, Tensor) and value.numel() > 1]
    if not shaped:
        return _evaluated(case, torch.Size(()), None)
    device = shaped[0].device
    whole = all(value.shape == case.shape for value in shaped)
    if device.type == "cpu" and whole and proved.get(case.kind, True):  # elsewhere each comparison is a transfer
        # Inputs of one entry: what does not depend on what is frozen is computed once in place of n times.
        found = result_or_error(lambda: _evaluated(case, torch.Size([1]), device), REFUSALS)
        if case.kind not in proved:
            proved[case.kind] = not isinstance(found, Exception) and _stand_for_all(found, case, device)
        if proved[case.kind] and not isinstance(found, Exception) and _have_length(found, case):
            return found
    return _evaluated(case, case.shape, device)


def _evaluated(case: Stepped, shape: torch.Size, device: torch.device | None) -> list[tuple[Tensor, ...]]:
    rule = case.rule
    one = torch.ones(shape, dtype=torch.float64, device=device)
    zero = torch.zeros_like(one)
    count = rule.stages + len(rule.memory)
    rows = []
    for place in range(count):
        inputs = [one if place == other else zero for other in range(count)]
        gradients = inputs[: rule.stages]
        memory = tuple(inputs[rule.stages :])
        given = gradients[0] if rule.stages == 1 else tuple(gradients)
        delta, after = rule.step(given, memory, case.frozen, case.settings)
        rows.append(tuple(value.reshape(-1) for value in (delta, *after)))
    return rows


def _stand_for_all(rows: list[tuple[Tensor, ...]], case: Stepped, device: torch.device) -> bool:
    """True where responses to inputs of one entry are those to whole ones, to the last bit at some of the entries."""
    if not _have_length(rows, case):
        return False
    entries = case.shape.numel()
    some = slice(None, None, -(-entries // COMPARED))
    frozen = {k: v.reshape(-1)[some] if isinstance(v, Tensor) and v.numel() > 1 else v for k, v in case.frozen.items()}
    shape = torch.Size([-(-entries // some.step)])
    whole = _evaluated(replace(case, frozen=frozen, shape=shape), shape, device)
    return all(
        torch.equal((value[some] if value.shape[0] > 1 else value.expand(shape)), own)
        for row, own_row in zip(rows, whole, strict=True)
        for value, own in zip(row, own_row, strict=True)
    )


def _have_length(rows: list[tuple[Tensor, ...]], case: Stepped) -> bool:
    """True where each response is one number for all entries, or one for each."""
    lengths = (1, case.shape.numel())
    return all(value.shape[0] in lengths and value.dtype == torch.float64 for row in rows for value in row)


def _sameness(values: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry, and whether all are like it."""
    first = values[0]
    if values.shape[0] == 1:
        return first, TRUE
    if values.is_cpu and first.item() != values[-1].item():  # off the CPU that would be a transfer
        return first, FALSE
    return first, (values == first).all()


def _may_be_proportional(rows: list[tuple[Tensor, ...]]) -> bool:
    """Test for one gradient and one slot of memory; two gradients and none have two rows as well."""
    return len(rows) == len(rows[0]) == 2


def _proportionality(rows: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Test of a = ρ b with ρ = c / d to a few roundings of float64, where there is one gradient and one slot."""
    if not _may_be_proportional(rows):
        return []
    (a, c), (b, d) = rows
    difference = (b * (c[0] / d[0]) - a).abs_()
    return [(difference <= a.abs().mul_(1e-14)).all()]


def _ratio(table: Sequence[tuple[Coefficient, ...]], proportional: bool) -> float | None:
    (_, c), (_, d) = table
    if isinstance(c, Tensor) or isinstance(d, Tensor) or d == 0.0:
        return None
    return c / d if proportional else None


class StepAdjoint:
    """The adjoint of one step, parameter by parameter.

    Parameters
    ----------
    rule, step
        The step, and its optimizer's rule.
    shapes
        Shape of each parameter by name.
    known
        Coefficients that follow from settings and frozen numbers alone, kept from step to step of one rule.
    """

    def __init__(
        self, rule: UpdateRule, step: Step, shapes: dict[str, torch.Size], known: dict[Any, Linear] | None = None
    ) -> None:
        self.rule = rule
        self.step = step
        self.shapes = shapes
        self.known = {} if known is None else known
        self._linear: dict[Any, Linear] = {}
        self._proved: dict[Any, bool] = {}
        self._settings: dict[int, tuple[tuple[str, Any], ...] | None] = {}

    def linear(self, name: str) -> Linear | None:
        """The coefficients of a parameter, found once; None where its rule is not elementwise."""
        key = self._key(name)
        if key in self._linear:
            return self._linear[key]
        if key in self.known:
            return self.known[key]
        if self._stepped(name).rule.elementwise:
            # Off the CPU they are found together, in one transfer; on it a few small ones, which takes less memory.
            frozen = [value for value in self.step.frozen[name].values() if isinstance(value, Tensor)]
            on_cpu = all(value.is_cpu for value in frozen)
            alike = self._alike[name] if frozen and on_cpu else (name,)
            if len(alike) > 1:
                self._linear |= self._joined(alike)
                return self._linear[key]
            cases = {self._key(other): self._stepped(other) for other in (alike if on_cpu else self.step.active)}
            found = linear({other: case for other, case in cases.items() if case.rule.elementwise}, self._proved)
            self._linear |= found
            self._keep({other: own for other, own in found.items() if isinstance(other, _Settled)})
        return self._linear.get(key)

    def _keep(self, found: Mapping[Any, Linear]) -> None:
        """Keep coefficients for later steps; of settings that change from step to step only the latest."""
        if len(self.known) + len(found) > KEPT:
            self.known.clear()
        self.known.update(found)

    def _joined(self, names: Sequence[str]) -> dict[str, Linear]:
        """The coefficients of parameters that step alike, from one evaluation of the rule on all of them end to end."""
        first, frozen = self._stepped(names[0]), frozen_of(self.step, names)
        sizes = [self.shapes[name].numel() for name in names]
        whole = linear({"": replace(first, frozen=frozen, shape=torch.Size([sum(sizes)]))}, self._proved)[""]
        found = {}
        for name, end, size in zip(names, accumulate(sizes), sizes, strict=True):
            own = slice(end - size, end)
            gradients, memory = (
                tuple(tuple(_part(c, own) for c in row) for row in rows) for rows in (whole.gradients, whole.memory)
            )
            found[name] = Linear(gradients, memory, whole.ratio)
        return found

    @cached_property
    def _alike(self) -> dict[str, tuple[str, ...]]:
        """The parameters that step like each one, itself included."""
        return {name: names for names in stepping_alike(self.step, self.shapes) for name in names}

    def _stepped(self, name: str) -> Stepped:
        settings = self.step.hyperparameters_of(name)
        return Stepped(self.rule.of(settings), self.step.frozen[name], settings, self.shapes[name])

    def _key(self, name: str) -> Any:
        """Key that parameters share which step alike: those of one group in which only numbers are frozen."""
        frozen, group = self.step.frozen[name], self.step.groups[name]
        if not all(isinstance(value, (bool, int, float)) for value in frozen.values()):
            return name
        numbered = tuple(sorted(frozen.items()))
        if group not in self._settings:
            self._settings[group] = _settled(self.step.hyperparameters[group])
        settings = self._settings[group]
        return (group, numbered) if settings is None else _Settled(group, numbered, settings)

    def of(self, name: str, dtype: torch.dtype) -> Callable[[slice, Tensor, list[Tensor | None]], list[Scaled]]:
        """A function that pulls blocks of columns of a parameter back.

        It takes the block (within the parameter), q (Q, size) and the memory's cotangents (None for zero), which it
        replaces by those before the step, and returns u for each gradient.
        """
        coefficients = self.linear(name)
        if coefficients is None:
            return self._differentiated(name)
        ratio = coefficients.ratio
        memory = [[_cast(c, dtype) for c in row] for row in coefficients.memory]
        # Those of the gradient are not read where u is a multiple of the memory's cotangent.
        gradients = [[_cast(c, dtype) for c in row] for row in coefficients.gradients] if ratio is None else []

        def pull(where: slice, q: Tensor, held: list[Tensor | None]) -> list[Scaled]:
            if ratio is not None:
                b, d = (_part(c, where) for c in memory[0])
                held[0] = _accumulated(held[0], d, q, b)
                return [(held[0], ratio)]
            if coefficients.forgets:
                a, c = (_part(own, where) for own in gradients[0])
                u, held[0] = _accumulated(held[0], c, q, a), None
                return [(u, 1.0)]
            slots = held[: len(memory)]  # other optimizers may have more
            pulled: list[Scaled] = [(_combined([_part(c, where) for c in row], [q, *slots]), 1.0) for row in gradients]
            held[: len(memory)] = [_combined([_part(c, where) for c in row], [q, *slots]) for row in memory]
            return pulled

        return pull

    def _differentiated(self, name: str) -> Callable[[slice, Tensor, list[Tensor | None]], list[Scaled]]:
        frozen = self.step.frozen[name]
        settings = self.step.hyperparameters_of(name)
        shape = self.shapes[name]
        rule = self.rule.of(settings)
        count = len(rule.memory)

        def pull(where: slice, q: Tensor, held: list[Tensor | None]) -> list[Scaled]:
            assert where == slice(0, shape.numel()), "a rule that is not elementwise takes whole parameters"
            filled = tuple((torch.zeros_like(q) if m is None else m).reshape(-1, *shape) for m in held[:count])
            pulled, before = adjoint(rule, frozen, settings, q.reshape(-1, *shape), filled)
            held[:count] = [m.flatten(1) for m in before]
            return [(u.flatten(1), 1.0) for u in pulled]

        return pull


def _settled(settings: Settings) -> tuple[tuple[str, Any], ...] | None:
    """Settings of a group by which coefficients are known again; None where one of them is no number."""
    known = tuple(sorted(settings.items()))
    values = (value for _, own in known for value in (own if isinstance(own, tuple) else (own,)))
    return known if all(isinstance(value, NUMBERS) for value in values) else None


def _cast(coefficient: Coefficient, dtype: torch.dtype) -> Coefficient:
    return coefficient.to(dtype) if isinstance(coefficient, Tensor) else coefficient


def _part(coefficient: Coefficient, where: slice) -> Coefficient:
    return coefficient[where] if isinstance(coefficient, Tensor) else coefficient


def _accumulated(held: Tensor | None, scale: Coefficient, q: Tensor, weight: Coefficient) -> Tensor | None:
    """scale · held + weight · q, in place: one reading and one writing of the block."""
    if held is None:
        return _combined([weight], [q])
    held.mul_(scale)
    return held.addcmul_(q, weight) if isinstance(weight, Tensor) else held.add_(q, alpha=weight)


def _combined(coefficients: Sequence[Coefficient], matrices: Sequence[Tensor | None]) -> Tensor | None:
    """Σ coefficient ∘ matrix; None where every term is zero."""
    total: Tensor | None = None
    for coefficient, matrix in zip(coefficients, matrices, strict=True):
        if matrix is None or (not isinstance(coefficient, Tensor) and coefficient == 0.0):
            continue
        if total is None:
            total = matrix * coefficient
        elif isinstance(coefficient, Tensor):
            total.addcmul_(matrix, coefficient)
        else:
            total.add_(matrix, alpha=coefficient)
    return total
