"""The tangent kernel at one θ and the path kernel along many, entry by entry."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pathkernel.reference.gradients import Parameters, output_gradients


def tangent_kernel(model: nn.Module, parameters: Parameters, X: Tensor, Y: Tensor | None = None) -> Tensor:
    """Tangent kernel at one θ, Θ_{cc'}(x, x') = ⟨∇f_c(x; θ), ∇f_{c'}(x'; θ)⟩.

    Parameters
    ----------
    model, parameters
        As in `output_gradients`.
    X : Tensor of shape (n, ...)
    Y : Tensor of shape (m, ...), optional
        X when not given.

    Returns
    -------
    Tensor of shape (n, m, C, C), float64

    References
    ----------
    Novak et al., arXiv:2206.08720.

    Examples
    --------
    For f(x) = w·x + b the kernel is x·x' + 1:

    >>> import torch
    >>> from pathkernel import reference
    >>> model = torch.nn.Linear(2, 1)
    >>> X = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> reference.tangent_kernel(model, dict(model.named_parameters()), X)[:, :, 0, 0]
    tensor([[ 6.,  4.],
            [ 4., 10.]], dtype=torch.float64)
    """
    G = output_gradients(model, parameters, X)
    H = G if Y is None else output_gradients(model, parameters, Y)
    (n, C, _), m = G.shape, len(H)
    K = torch.zeros(n, m, C, C, dtype=torch.float64)
    for i in range(n):
        for j in range(m):
            for c in range(C):
                for d in range(C):
                    K[i, j, c, d] = G[i, c] @ H[j, d]
    return K


def path_kernel(
    model: nn.Module, nodes: Sequence[Parameters], weights: Sequence[float], X: Tensor, Y: Tensor | None = None
) -> Tensor:
    """Path kernel, K(x, x') = Σ_s w_s Σ_c ⟨∇f_c(x; θ_s), ∇f_c(x'; θ_s)⟩ (trace over the outputs).

    Parameters
    ----------
    model : nn.Module
    nodes : sequence of dict of str to Tensor
        The points θ_s.
    weights : sequence of float
        The measure w_s, one per node; non-negative weights give a positive semi-definite kernel.
    X : Tensor of shape (n, ...)
    Y : Tensor of shape (m, ...), optional
        X when not given.

    Returns
    -------
    Tensor of shape (n, m), float64

    References
    ----------
    Domingos, arXiv:2012.00152, definition 2.
    """
    K = torch.zeros(len(X), len(X if Y is None else Y), dtype=torch.float64)
    for parameters, weight in zip(nodes, weights, strict=True):
        blocks = tangent_kernel(model, parameters, X, Y)
        for c in range(blocks.shape[-1]):
            K += weight * blocks[:, :, c, c]
    return K


def neighbours_apart(K: Tensor, k: int) -> tuple[Tensor, float]:
    r"""How likely the k nearest of each sample stand so far apart from the next, and in which dimension.

    .. math:: p_i = (r_k / r_{k+1})^d, \qquad d = \ln 2 / (k \ln \mathrm{median}_i\, r_{k+1} / r_k)

    with :math:`r_k` the distance of sample i to its k-th nearest of the others, on features of length one.

    Parameters
    ----------
    K : Tensor of shape (n, n)
        A kernel matrix.
    k
        How many neighbours stand together.

    Returns
    -------
    Tensor of shape (n,), float64
        p.
    float
        d.

    References
    ----------
    Facco et al., arXiv:1803.06992, equation 5, for k = 1; Denti et al., Scientific Reports 12, 20005, 2022.
    """
    entries = K.double().tolist()
    gaps = []
    for i, row in enumerate(entries):
        cosines = [row[j] / math.sqrt(row[i] * entries[j][j]) for j in range(len(row)) if j != i]
        distances = sorted(math.sqrt(2 - 2 * cosine) for cosine in cosines)
        gaps.append(math.log(distances[k] / distances[k - 1]))
    d = math.log(2) / (k * statistics.median(gaps))
    return torch.tensor([math.exp(-d * gap) for gap in gaps], dtype=torch.float64), d
