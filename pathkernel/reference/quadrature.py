"""Averages of a gradient along one step: quadrature rules on [0, 1], and the discrete gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pathkernel.reference.gradients import Output, Parameters, flatten, gradient, module_at, output_value, unflatten

Rule = tuple[Tensor, Tensor]


def _rule(nodes: Sequence[float], weights: Sequence[float]) -> Rule:
    return torch.tensor(nodes, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)


left: Rule = _rule([0.0], [1.0])
"""Left end point, nodes and weights on [0, 1]; exact for constants."""

midpoint: Rule = _rule([0.5], [1.0])
"""Midpoint, nodes and weights on [0, 1]; exact for degree 1."""

trapezoid: Rule = _rule([0.0, 1.0], [0.5, 0.5])
"""Trapezoid, nodes and weights on [0, 1]; exact for degree 1."""


def gauss_legendre(n: int) -> Rule:
    """Gauss–Legendre rule with n nodes on [0, 1], exact for polynomials up to degree 2n − 1.

    The nodes are the eigenvalues of the Jacobi matrix of the Legendre polynomials, which is zero but for
    k/√(4k² − 1) beside the diagonal; the weights are the squared first components of its eigenvectors.

    Returns
    -------
    nodes, weights : Tensor of shape (n,), float64

    References
    ----------
    Golub and Welsch, "Calculation of Gauss quadrature rules", Math. Comp. 23, 1969.
    """
    k = torch.arange(1, n, dtype=torch.float64)
    beside = k / (4 * k**2 - 1).sqrt()
    eigenvalues, eigenvectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (1 + eigenvalues) / 2, eigenvectors[0] ** 2


def average_gradient(
    model: nn.Module, start: Parameters, end: Parameters, x: Tensor, output: Output, rule: Rule
) -> Tensor:
    """Gradient averaged along a step, q = Σ_n ω_n ∇f_output(x; θ + t_n (θ' − θ)).

    Parameters
    ----------
    model : nn.Module
    start, end : dict of str to Tensor
        The end points θ and θ' of the step.
    x : Tensor
        One sample, without batch dimension.
    output : int or callable
        Index into the flattened outputs, or a scalar function of them.
    rule : (nodes, weights)
        On [0, 1]: `left`, `midpoint`, `trapezoid`, `gauss_legendre(n)`.

    Returns
    -------
    Tensor of shape (P,), float64
    """
    origin, displacement = flatten(model, start), flatten(model, end) - flatten(model, start)
    q = torch.zeros_like(origin)
    for t, omega in zip(*rule, strict=True):
        twin = module_at(model, {**start, **unflatten(model, origin + t * displacement)})
        q += omega * gradient(output_value(twin, x, output), twin)
    return q


def discrete_gradient(model: nn.Module, start: Parameters, end: Parameters, x: Tensor, output: Output) -> Tensor:
    """Gonzalez' discrete gradient: the midpoint gradient, corrected so that the step is exact.

    q̂ = ∇f(mid) + [f(θ') − f(θ) − ∇f(mid)·Δ] Δ / ‖Δ‖² with Δ = θ' − θ, hence q̂·Δ = f(θ') − f(θ) for any f,
    kinks included; the correction is the smallest one that does this. At Δ = 0 it is the gradient.

    Parameters
    ----------
    model, start, end, x, output
        As in `average_gradient`.

    Returns
    -------
    Tensor of shape (P,), float64

    References
    ----------
    O. Gonzalez, "Time integration and discrete Hamiltonian systems", J. Nonlinear Science 6, 1996: the midpoint
    discrete gradient.
    """
    displacement = flatten(model, end) - flatten(model, start)
    q = average_gradient(model, start, end, x, output, midpoint)
    if not displacement.any():
        return q
    change = output_value(module_at(model, end), x, output) - output_value(module_at(model, start), x, output)
    correction = change.detach() - q @ displacement
    return q + correction * displacement / (displacement @ displacement)
