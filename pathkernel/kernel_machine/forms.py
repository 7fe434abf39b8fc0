r"""The forms in which the same exact sum can be written, with what each of them needs.

Each step contributes :math:`-\sum_c \lambda_{r,i,c}\, k_{r,i,c}(x)` for sample i and output c, with
λ = ∂L/∂z the derivative of the batch loss and k the kernel between the query's weight and the sample's gradient (the
learning rate and the optimizer's scaling inside). What is summed first makes the form:

==============  =======================================  ==========================================================
form            sum                                      holds
==============  =======================================  ==========================================================
``folded``      share_i: everything inside               always; coefficients are 1
``average``     α_i(x) K_i(x), α = ∫λk / ∫k              always; α depends on the query, ill-conditioned where K ≈ 0
``ensemble``    one kernel machine for each step         always; coefficients do not depend on the query
``constant``    −sign(λ_i) ∫ abs(λ_i) k                  where the sign of λ never changes (cross-entropy, BCE)
==============  =======================================  ==========================================================

References
----------
Domingos 2020 (2012.00152) for ``average``; Bell et al. 2023 (2308.00824) for ``ensemble``; Chen et al. 2021
(2111.06063) for ``constant``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pathkernel.errors import InputError, check_choice

FORMS = {
    "folded": "coefficients 1, the loss derivative inside the kernel",
    "average": "coefficients averaged over the path; they depend on the query and are ill-conditioned where K is small",
    "ensemble": "one kernel machine for each step; coefficients do not depend on the query",
    "constant": "coefficients -1 and 1; needs losses whose slope keeps its sign",
    "chord": "gradients along the straight line from start to end; nodes once, not for each step",
}
"""The forms of the same exact sum, and their properties."""


def check_form(form: str) -> str:
    """Accept one of `FORMS`.

    Raises
    ------
    InputError
        For any other, with those that there are.
    """
    check_choice("form", form, FORMS, "Forms")
    return form


def check_kept(form: str) -> None:
    """Refuse to keep an explanation in a store in a form that has matrices of its own.

    Raises
    ------
    InputError
        With the forms that are kept.
    """
    if form in BUILDERS:
        raise InputError(
            f'An explanation in the form "{form}" was to be kept in a store',
            "What is kept are shares, channels and the certificate, of the forms folded and chord",
            'Write `KernelMachine(trajectory, form="folded")`, or leave `store` out',
        )


@dataclass(frozen=True)
class AverageForm:
    """Σ_i Σ_c α_ic(x) K_ic(x), with both factors of each query.

    Attributes
    ----------
    numerator
        −∫ λ k, (Q, N, C): what sample i added through its output c.
    denominator
        K = ∫ k, (Q, N, C).
    """

    numerator: np.ndarray
    denominator: np.ndarray

    @property
    def coefficients(self) -> np.ndarray:
        """α = numerator / denominator, (Q, N, C); 0 where the denominator is 0."""
        safe = np.where(self.denominator == 0, 1.0, self.denominator)
        return np.where(self.denominator == 0, 0.0, self.numerator / safe)

    @property
    def shares(self) -> np.ndarray:
        """(Q, N), summed over the sample's outputs: from the numerator, finite whatever the denominator is."""
        return np.asarray(self.numerator.sum(axis=2))


@dataclass(frozen=True)
class ConstantForm:
    """Σ_i Σ_c α_ic K_ic(x) with constant coefficients.

    Attributes
    ----------
    coefficients
        −sign λ_ic, (N, C); 0 for samples that never moved anything.
    kernel
        ∫ abs(λ) k, (Q, N, C).
    """

    coefficients: np.ndarray
    kernel: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """(Q, N), summed over the sample's outputs."""
        return np.asarray((self.coefficients * self.kernel).sum(axis=2))


@dataclass(frozen=True)
class StepMachine:
    """The kernel machine of one step (or one gradient of it).

    Attributes
    ----------
    step
        Its number.
    ids
        (B,) training samples, repeated ones included.
    coefficients
        −λ, (B, C): the same for every query.
    kernel
        k, (Q, B, C).
    """

    step: int
    ids: np.ndarray
    coefficients: np.ndarray
    kernel: np.ndarray


@dataclass(frozen=True)
class EnsembleForm:
    """A sum of kernel machines, one for each step.

    Attributes
    ----------
    members
        In the order of the steps.
    samples
        N.
    """

    members: tuple[StepMachine, ...]
    samples: int

    @property
    def shares(self) -> np.ndarray:
        """(Q, N), summed over steps and outputs."""
        total = np.zeros((len(self.members[0].kernel), self.samples))
        for member in self.members:
            np.add.at(total.T, member.ids, (member.coefficients * member.kernel).sum(axis=2).T)
        return total


Form = AverageForm | ConstantForm | EnsembleForm


class FormBuilder(ABC):
    """Collects the contributions of a backward sweep into a form."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    @abstractmethod
    def add(self, step: int, ids: Tensor, slopes: Tensor, kernel: Tensor) -> None:
        """Take in λ (B, C) and k (Q, B, C) of one gradient."""

    @abstractmethod
    def finish(self) -> Form:
        """The form, once every step has been added."""


class _Dense(FormBuilder):
    """Sums kept as (Q, N, C)."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.sums: list[Tensor] = []

    def accumulate(self, ids: Tensor, *terms: Tensor) -> None:
        """Add (Q, B, C) terms to the sums at the samples' places."""
        if not self.sums:
            q, _, c = terms[0].shape
            self.sums = [torch.zeros(q, self.samples, c, dtype=torch.float64) for _ in terms]
        for total, term in zip(self.sums, terms, strict=True):
            total.index_add_(1, ids, term)


class AverageBuilder(_Dense):
    """Builder of `AverageForm`."""

    def add(self, step: int, ids: Tensor, slopes: Tensor, kernel: Tensor) -> None:
        """Numerator and denominator."""
        self.accumulate(ids, -slopes * kernel, kernel)

    def finish(self) -> AverageForm:
        """Both sums."""
        return AverageForm(self.sums[0].numpy(), self.sums[1].numpy())


class ConstantBuilder(_Dense):
    """Builder of `ConstantForm`."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.signs: Tensor | None = None

    def add(self, step: int, ids: Tensor, slopes: Tensor, kernel: Tensor) -> None:
        """Check that no sign has changed; add abs(λ) k."""
        if self.signs is None:
            self.signs = torch.zeros(self.samples, slopes.shape[1], dtype=torch.float64)
        signs = torch.sign(slopes)
        changed = (signs * self.signs[ids] < 0).any(dim=1)
        if changed.any():
            raise InputError(
                f"The slope of the loss of sample {int(ids[changed][0])} changed its sign by step {step}",
                '`form="constant"` needs losses whose slope in each output keeps its sign, as cross-entropy with hard '
                "labels and BCE do",
                'Write `form="average"` or `form="folded"`',
            )
        # A slope of exactly zero adds nothing and says nothing about the sign.
        self.signs[ids] = torch.where(signs != 0, signs, self.signs[ids])
        self.accumulate(ids, slopes.abs() * kernel)

    def finish(self) -> ConstantForm:
        """Signs and kernel."""
        assert self.signs is not None
        return ConstantForm(-self.signs.numpy(), self.sums[0].numpy())


class EnsembleBuilder(FormBuilder):
    """Builder of `EnsembleForm`."""

    def __init__(self, samples: int) -> None:
        super().__init__(samples)
        self.members: list[StepMachine] = []

    def add(self, step: int, ids: Tensor, slopes: Tensor, kernel: Tensor) -> None:
        """Keep a step as it is."""
        self.members.append(StepMachine(step, ids.numpy(), -slopes.numpy(), kernel.numpy()))

    def finish(self) -> EnsembleForm:
        """Members by step."""
        return EnsembleForm(tuple(sorted(self.members, key=lambda member: member.step)), self.samples)


BUILDERS: dict[str, type[FormBuilder]] = {
    "average": AverageBuilder,
    "constant": ConstantBuilder,
    "ensemble": EnsembleBuilder,
}


def join_forms(forms: list[Form]) -> Form:
    """Forms of blocks of queries as one."""
    first = forms[0]
    if isinstance(first, AverageForm):
        averages = [form for form in forms if isinstance(form, AverageForm)]
        return AverageForm(
            np.concatenate([form.numerator for form in averages]),
            np.concatenate([form.denominator for form in averages]),
        )
    if isinstance(first, ConstantForm):
        constants = [form for form in forms if isinstance(form, ConstantForm)]
        return ConstantForm(first.coefficients, np.concatenate([form.kernel for form in constants]))
    ensembles = [form for form in forms if isinstance(form, EnsembleForm)]
    members = [
        StepMachine(same[0].step, same[0].ids, same[0].coefficients, np.concatenate([m.kernel for m in same]))
        for same in zip(*(form.members for form in ensembles), strict=True)
    ]
    return EnsembleForm(tuple(members), first.samples)
