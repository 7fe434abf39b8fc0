r"""Steepest descent in further norms: the largest entry alone, and whole matrices at once.

=============  ======================  ===========================================================
norm           optimizer               step
=============  ======================  ===========================================================
``"l2"``       `NormalizedDescent`     :math:`-\eta\, g / \lVert g\rVert`
``"linf"``     `SignDescent`           :math:`-\eta \operatorname{sign} g`
``"l1"``       `CoordinateDescent`     :math:`-\eta \operatorname{sign} g_i` at the largest entry i
``"spectral"`` `SpectralDescent`       :math:`-\eta\, U V^\top` of :math:`g = U \Sigma V^\top`
=============  ======================  ===========================================================

The norms themselves are in `pathkernel.optimizers.norms`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from pathkernel.optimizers.closure import Closure, evaluated, received
from pathkernel.optimizers.norms import NORMS, as_matrix, singular_directions
from pathkernel.optimizers.scaled import NormalizedDescent, SignDescent, reciprocal_sizes
from pathkernel.update_rules.muon import whitened
from pathkernel.update_rules.rule import Frozen, Memory, Observation, Observes, Settings, UpdateRule


class _Descent(Optimizer):
    """θ⁺ = θ + ηd, with d of norm 1 over all parameters together."""

    norm: ClassVar[str]

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """One step; returns the closure's loss."""
        loss, every = evaluated(closure), list(received(self))
        ascent = NORMS[self.norm].ascent([gradient for _, gradient, _, _ in every]) if every else []
        for (p, _, _, settings), direction in zip(every, ascent, strict=True):
            p.sub_(direction, alpha=settings["lr"])
        return loss


class CoordinateDescentRule(UpdateRule):
    """The rule of `CoordinateDescent`: sign g = g / abs(g) at the entry that moved, with 1 / abs(g) frozen."""

    name = "coordinate descent"
    observes = Observes()

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """Scale 1 / abs(g) of the entry that moved, 0 of all others."""
        return {"scale": torch.where(observed.displacement == 0, 0, reciprocal_sizes(observed.gradient))}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """The gradient's largest entry over its own size."""
        return -settings["lr"] * gradient * frozen["scale"], memory


class CoordinateDescent(_Descent):
    r"""Greedy coordinate descent: steepest descent in the ℓ₁ norm, along which :math:`\dot L = -\max_i |g_i|`.

    .. math:: \Delta_i = -\eta \operatorname{sign} g_i \quad\text{for the largest}\ |g_i|,\qquad 0\ \text{elsewhere}

    Parameters
    ----------
    params
        Parameters, or groups of them; one entry of all together moves.
    lr
        η > 0, how far it moves.

    Notes
    -----
    Its rule is found by its class; to be recorded it needs no more than to be given to the recorder.

    References
    ----------
    Nutini et al. 2015 (1506.00552), section 2, for the Gauss–Southwell rule.
    """

    rule, norm = CoordinateDescentRule, "l1"


class SpectralDescentRule(UpdateRule):
    r"""The rule of `SpectralDescent`: :math:`U V^\top = (g g^\top)^{-1/2} g`, with the whitening matrix frozen.

    It stands on the shorter side of the matrix: left of it where it has no more rows than columns, else right.
    """

    name = "spectral descent"
    elementwise = False
    observes = Observes()

    def frozen(self, observed: Observation, settings: Settings) -> dict[str, Any]:
        """W = U Σ⁻¹ Uᵀ, or V Σ⁻¹ Vᵀ."""
        u, s, vh = singular_directions(observed.gradient)
        rows, columns = as_matrix(observed.gradient).shape
        side = vh.T if rows > columns else u
        return {"whitening": side / s @ side.T}

    def step(self, gradient: Tensor, memory: Memory, frozen: Frozen, settings: Settings) -> tuple[Tensor, Memory]:
        """The gradient, whitened."""
        direction = whitened(as_matrix(gradient), frozen["whitening"])
        return -settings["lr"] * direction.reshape(gradient.shape), memory


class SpectralDescent(_Descent):
    r"""Spectral descent, which is Muon without momentum: steepest descent in the largest singular value.

    .. math:: \Delta = -\eta\, U V^\top,\qquad g = U \Sigma V^\top,\qquad \dot L = -\textstyle\sum \Sigma

    for each parameter, as a matrix with its first axis as the rows; a vector moves by η in the direction of its
    gradient. Singular values are found exactly, where `torch.optim.Muon` brings them near 1 by polynomials.

    Parameters
    ----------
    params
        Parameters, or groups of them.
    lr
        η > 0, by how much every singular direction moves.

    Notes
    -----
    Its rule is found by its class. A step takes a singular value decomposition of every gradient.

    References
    ----------
    Carlson et al. 2015, Preconditioned spectral descent for deep learning; Bernstein and Newhouse 2024 (2409.20325).
    """

    rule, norm = SpectralDescentRule, "spectral"


STEEPEST: dict[str, type[Optimizer]] = {
    "l2": NormalizedDescent,
    "linf": SignDescent,
    "l1": CoordinateDescent,
    "spectral": SpectralDescent,
}
"""The optimizer of steepest descent in each norm."""
