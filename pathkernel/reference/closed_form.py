"""A training run that is known in closed form: a linear model under full-batch gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

from pathkernel.reference.gradients import double


def linear_least_squares_path(
    K: Tensor, K_query: Tensor, y: Tensor, f0: Tensor, f0_query: Tensor, learning_rate: float, steps: int
) -> Tensor:
    """Predict the outputs of a linear model under full-batch gradient descent.

    f_t(x) = f_0(x) + K(x, X) K⁻¹ [I − (I − ηK)^t] (y − f_0(X)) , the solution of f_{t+1} = f_t − η K (f_t − y).

    This is for the loss ½ ‖f − y‖², summed over samples and outputs, and a learning rate η. For
    `torch.nn.MSELoss` with learning rate lr use η = 2 lr / (n C) (reduction "mean") or η = 2 lr (reduction "sum").
    A singular K is no obstacle: (1 − (1 − ηλ)^t) / λ is evaluated on the eigenvalues λ, and is η t at λ = 0.

    Parameters
    ----------
    K : Tensor of shape (n, n)
        Tangent kernel of the training samples, constant along the path; the same for each of the C outputs.
    K_query : Tensor of shape (m, n)
        Tangent kernel of queries with training samples.
    y, f0 : Tensor of shape (n,) or (n, C)
        Targets and initial outputs on the training samples.
    f0_query : Tensor of shape (m,) or (m, C)
        Initial outputs on the queries.
    learning_rate : float
        η in the convention above.
    steps : int
        The last t.

    Returns
    -------
    Tensor of shape (steps + 1, m) or (steps + 1, m, C), float64
        f_t on the queries for t = 0 … steps.

    References
    ----------
    Lee et al., "Wide neural networks of any depth evolve as linear models under gradient descent",
    arXiv:1902.06720, section 2.2 (there for continuous time).
    """
    eigenvalues, U = torch.linalg.eigh(double(K))
    eta_lambda = learning_rate * eigenvalues
    in_modes = U.T @ double(y - f0)
    path = []
    for t in range(steps + 1):
        # 1 − (1 − ηλ)^t; expm1 and log1p keep its digits where ηλ is small, and need ηλ < 1
        small = -torch.expm1(t * torch.log1p(-eta_lambda.clamp(max=0.5)))
        filled = torch.where(eta_lambda < 0.5, small, 1 - (1 - eta_lambda) ** t)
        factor = torch.where(eigenvalues == 0, learning_rate * t, filled / eigenvalues)
        modes = factor.reshape(-1, *[1] * (in_modes.ndim - 1)) * in_modes
        path.append(double(f0_query) + double(K_query) @ (U @ modes))
    return torch.stack(path)
