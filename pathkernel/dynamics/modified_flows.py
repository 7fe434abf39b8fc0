r"""Modified flows: what gradient descent with finite steps follows, to higher order than gradient flow.

With :math:`g = \nabla L`, the step :math:`\theta \mapsto \theta - \gamma g` is, up to γ⁴, the flow for a time γ of

.. math:: \dot\theta = -g - \tfrac\gamma2 H g - \gamma^2\bigl(\tfrac13 H H g + \tfrac1{12} T(g, g)\bigr),

whose first two terms are :math:`-\nabla\bigl(L + \tfrac\gamma4\lVert\nabla L\rVert^2\bigr)`: finite steps regularise
by the gradient's size. With momentum β, in the time :math:`\tau = k\gamma/(1 - \beta)` of step k,

.. math:: \dot\theta = -\nabla\Bigl(L + \frac{\gamma(1 + \beta)}{4(1 - \beta)^2}\lVert\nabla L\rVert^2\Bigr),

from :math:`\theta(0) + \tfrac{\gamma\beta}{(1 - \beta)^2}\, g` for a ball that starts at rest, which falls that far
behind one that has always been rolling. An epoch of m mini-batches with the losses L_1 … L_m, in this order, is up to
γ³ the flow for a time mγ of

.. math:: \dot\theta = -\nabla L - \frac{\gamma}{2m}\sum_k H_k g_k
          + \frac{\gamma}{2m}\sum_k H_k \Bigl(\sum_{j<k} g_j - \sum_{j>k} g_j\Bigr),

where L is their mean. The last term changes its sign with the order: the mean over all orders follows the first two,
:math:`-\nabla(L + \tfrac\gamma{4m}\sum_k\lVert\nabla L_k\rVert^2)`.

References
----------
Barrett and Dherin 2021 (2009.11162), Theorem 3.1; Hairer, Lubich and Wanner 2006, Geometric Numerical Integration,
section IX.1, for the second term; Ghosh et al. 2023 (2302.00849) for momentum; Smith et al. 2021 (2101.12176),
equation 22, for mini-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from pathkernel._typing import Loss
from pathkernel.dynamics.flow import Flow
from pathkernel.dynamics.following import FlowOptions, flow_of
from pathkernel.dynamics.system import System
from pathkernel.dynamics.training_loss import TrainingLoss
from pathkernel.errors import SENSELESS, InputError, brief, is_number

ORDERINGS = ("mean", "given")


class ModifiedFlow(System):
    """The first or second modified flow of gradient descent with all samples at once, or the first of the heavy ball.

    Parameters
    ----------
    loss
        L.
    lr
        γ > 0.
    momentum
        β, from 0 up to 1.
    order
        How many terms behind the gradient: 0, 1 or 2.
    """

    name = "modified flow"

    def __init__(self, loss: TrainingLoss, lr: float, momentum: float, order: int) -> None:
        super().__init__(loss)
        self.lr, self.momentum, self.order = lr, momentum, order
        self.factor = lr * (1 + momentum) / (2 * (1 - momentum) ** 2)
        if momentum and order:
            lag = lr * momentum / (1 - momentum) ** 2
            self.start = (loss.initial + lag * loss.gradient(loss.initial),)

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """−g − (γ/2) Hg − γ² (HHg/3 + T(g, g)/12), as far as the order says."""
        (theta,) = parts
        gradient = self.loss.gradient(theta)
        if self.order == 0:
            return (-gradient,)
        if self.order == 1:
            return (-gradient - self.factor * self.loss.products(theta, gradient)[1],)
        once, third = self.loss.third_products(theta, gradient)
        twice = self.loss.products(theta, once)[1]
        return (-gradient - self.lr / 2 * once - self.lr**2 * (twice / 3 + third / 12),)

    def time_of_step(self, settings: Mapping[str, Any]) -> float:
        """γ / (1 − β)."""
        return float(settings["lr"]) / (1 - float(settings.get("momentum", 0.0)))


class ModifiedBatchFlow(System):
    """The first modified flow of an epoch of mini-batches.

    Parameters
    ----------
    loss
        The mean of their losses.
    lr
        γ > 0.
    batches
        Their sample ids, in order.
    ordering
        ``"given"`` for this order, ``"mean"`` for the mean over all.
    """

    name = "modified flow of mini-batches"

    def __init__(self, loss: TrainingLoss, lr: float, batches: Sequence[Tensor], ordering: str) -> None:
        super().__init__(loss)
        if not all(0 <= int(ids.min()) <= int(ids.max()) < len(loss) for ids in batches):
            raise InputError(
                "`batches` holds ids that no sample has",
                f"Samples have the ids 0 to {len(loss) - 1}, their places in `data`",
                "Write for example `batches=torch.randperm(len(X)).split(8)`",
            )
        self.lr, self.ordering = lr, ordering
        self.batches = [loss.of_batch(ids) for ids in batches]

    def velocity(self, time: float, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """−ḡ − (γ/2m) Σ H_k g_k, and the term of the order."""
        (theta,) = parts
        gradients = torch.stack([batch.gradient(theta) for batch in self.batches])
        before = gradients.cumsum(dim=0) - gradients
        pushed = -gradients  # what H_k is multiplied with
        if self.ordering == "given":
            pushed = pushed + before - (gradients.sum(dim=0) - before - gradients)
        bent = sum(
            (batch.products(theta, v)[1] for batch, v in zip(self.batches, pushed, strict=True)),
            torch.zeros_like(theta),
        )
        return (-gradients.mean(dim=0) + self.lr / (2 * len(self.batches)) * bent,)


def modified_flow(
    model: nn.Module,
    loss: Loss,
    data: Any,
    time: float = 1.0,
    *,
    lr: float,
    order: int = 1,
    momentum: float = 0.0,
    batches: Sequence[Any] | None = None,
    ordering: str = "mean",
    **options: Unpack[FlowOptions],
) -> Flow:
    r"""Modified flow of gradient descent with finite steps, of the heavy ball, or of mini-batches.

    Parameters
    ----------
    model, loss, data, time
        As for `gradient_flow`. Step k of gradient descent is at the time kγ, of the heavy ball at kγ/(1 − β).
    lr
        γ > 0.
    order
        1 for the first modified flow, 2 for the second (without momentum and mini-batches), 0 for gradient flow in the
        same clock.
    momentum
        β, from 0 up to 1, of a heavy ball that starts at rest.
    batches
        Sample ids of the m mini-batches of an epoch, which takes the time mγ; None for all samples at once. Their
        losses are taken as the loop takes them, and L is their mean.
    ordering
        ``"mean"``: what the mean over all orders of the batches follows. ``"given"``: what they follow in this order.
    **options
        See `pathkernel.dynamics.following.FlowOptions`.

    Returns
    -------
    Flow
        After time T it is off the steps by O(γ^(order + 1)).

    Notes
    -----
    Each evaluation takes a gradient, and one more reverse sweep through it (order 2: four) for the products with H and
    T: about three (ten) times the time of gradient flow.
    """
    ids = None if batches is None else _ids_of(batches)
    _check(lr, order, momentum, ids, ordering)
    if ids is None:
        return flow_of(lambda own: ModifiedFlow(own, lr, momentum, order), model, loss, data, time, options)
    return flow_of(lambda own: ModifiedBatchFlow(own, lr, ids, ordering), model, loss, data, time, options)


def _ids_of(batches: Sequence[Any]) -> list[Tensor]:
    """Sample ids of each batch, (B,) int64, one or more.

    Raises
    ------
    InputError
        For what is no list of lists of whole numbers.
    """
    try:
        ids = [torch.as_tensor(batch) for batch in batches]
    except SENSELESS:
        ids = []
    whole = [one.dim() == 1 and len(one) > 0 and not one.is_floating_point() for one in ids]
    if not whole or not all(whole) or any(one.is_complex() or one.dtype == torch.bool for one in ids):
        raise InputError(
            f"`batches={brief(batches)}` was given",
            "Each batch is a list of sample ids, whole numbers, one or more",
            "Write for example `batches=[[0, 1, 2, 3], [4, 5, 6, 7]]`, or `torch.randperm(len(X)).split(8)`",
        )
    return [one.long() for one in ids]


def _check(lr: float, order: int, momentum: float, batches: list[Tensor] | None, ordering: str) -> None:
    """Refuse what no modified flow is known of here."""
    if not (is_number(lr) and lr > 0 and is_number(momentum) and 0 <= momentum < 1):
        raise InputError(
            f"`modified_flow(lr={lr!r}, momentum={momentum!r})` was asked for",
            "The rate is above 0, and momentum from 0 up to 1",
            "Write for example `modified_flow(..., lr=0.1, momentum=0.9)`",
        )
    simple = not momentum and batches is None
    if order not in ((0, 1, 2) if simple else (0, 1) if batches is None else (1,)):
        raise InputError(
            f"`order={order!r}` was asked for{'' if simple else ' with momentum or mini-batches'}",
            "Known are orders 0, 1 and 2 of plain gradient descent, 0 and 1 of the heavy ball, and 1 of mini-batches",
            "Write `order=1`",
        )
    if ordering not in ORDERINGS or (momentum and batches is not None):
        raise InputError(
            f"`ordering={ordering!r}` and `momentum={momentum!r}` were given for mini-batches",
            f"Orderings are {', '.join(map(repr, ORDERINGS))}, of mini-batches without momentum",
            'Write `modified_flow(..., batches=[ids, ...], ordering="mean")`',
        )
