r"""Gradient flow and its first modification, by Runge and Kutta's classical method and a dense Hessian.

.. math:: \dot\theta = -g - \tfrac\gamma2 H g,\qquad g = \nabla L(\theta),\quad H = \nabla^2 L(\theta)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pathkernel.reference.gradients import Loss, double, double_loss, flatten, module_at, trainable, unflatten


def gradient_and_hessian(model: nn.Module, theta: Tensor, loss: Loss, X: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate the loss of all samples twice, (P,) and (P, P), row by row.

    Parameters
    ----------
    model : nn.Module
    theta : Tensor of shape (P,)
    loss : callable
        (output, target) -> scalar.
    X : Tensor of shape (N, ...)
    y : Tensor of shape (N, ...)

    Returns
    -------
    Tensor of shape (P,) and Tensor of shape (P, P)
    """
    twin = module_at(model, unflatten(model, theta))
    weights = list(trainable(twin).values())
    value = double_loss(loss)(twin(double(X)), double(y))
    parts = torch.autograd.grad(value, weights, create_graph=True, materialize_grads=True)
    g = torch.cat([part.reshape(-1) for part in parts])
    rows = []
    for entry in g:
        row = torch.autograd.grad(entry, weights, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.reshape(-1) for part in row]))
    return g.detach(), torch.stack(rows)


def flow(
    model: nn.Module, loss: Loss, X: Tensor, y: Tensor, time: float, steps: int, learning_rate: float = 0.0
) -> Tensor:
    """Follow gradient flow, or the first modified flow of gradient descent at a learning rate above 0.

    Parameters
    ----------
    model : nn.Module
        Holds θ(0); left unchanged.
    loss : callable
        (output, target) -> scalar.
    X : Tensor of shape (N, ...)
    y : Tensor of shape (N, ...)
    time : float
        How long.
    steps : int
        Steps of the classical Runge–Kutta method: an error of order 4 in time / steps.
    learning_rate : float
        γ.

    Returns
    -------
    Tensor of shape (steps + 1, P), float64
        θ at evenly spaced times.

    References
    ----------
    Barrett and Dherin 2021 (2009.11162), Theorem 3.1.
    """

    def velocity(theta: Tensor) -> Tensor:
        g, H = gradient_and_hessian(model, theta, loss, X, y)
        return -g - learning_rate / 2 * (H @ g)

    theta = flatten(model, dict(model.named_parameters()))
    path, h = [theta], time / steps
    for _ in range(steps):
        k1 = velocity(theta)
        k2 = velocity(theta + h / 2 * k1)
        k3 = velocity(theta + h / 2 * k2)
        k4 = velocity(theta + h * k3)
        theta = theta + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        path.append(theta)
    return torch.stack(path)
