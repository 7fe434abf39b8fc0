"""Variances of samples once some of them were observed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def conditional_variances(K: Tensor, observed: Sequence[int], noise: float) -> Tensor:
    r"""Variance of every sample under a Gaussian process with covariance K, some of them observed with noise μ.

    .. math:: V_i = K_{ii} - K_{iS} (K_{SS} + \mu I)^{-1} K_{Si}

    Parameters
    ----------
    K
        (n, n).
    observed
        S.
    noise
        μ.

    Returns
    -------
    Tensor
        (n,) float64.
    """
    K = K.double()
    S = list(observed)
    V = K.diagonal().clone()
    for i in range(len(K)):
        if S:
            V[i] -= K[i, S] @ torch.linalg.solve(K[S][:, S] + noise * torch.eye(len(S), dtype=K.dtype), K[S, i])
    return V
