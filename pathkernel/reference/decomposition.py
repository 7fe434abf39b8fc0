"""The exact decomposition of a trained network over its training samples, computed forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pathkernel.reference.gradients import (
    Loss,
    Output,
    Parameters,
    flatten,
    module_at,
    output_value,
    sample_gradients,
)
from pathkernel.reference.quadrature import Rule, average_gradient, discrete_gradient
from pathkernel.reference.training import Statistics, loss_gradient, prepare, train


@dataclass(frozen=True)
class Decomposition:
    """Decomposition of each query output, f(x; θ_S) = f(x; θ_0) + Σ_i share_i(x) + weight_decay(x) + residual(x).

    Attributes
    ----------
    initial : Tensor of shape (Q,)
        f(x; θ_0).
    shares : Tensor of shape (Q, N)
        How much each training sample moved the output; positive raises it.
    weight_decay : Tensor of shape (Q,)
        How much weight decay moved it.
    final : Tensor of shape (Q,)
        f(x; θ_S), from a forward pass.
    """

    initial: Tensor
    shares: Tensor
    weight_decay: Tensor
    final: Tensor

    @property
    def residual(self) -> Tensor:
        """Part that the quadrature leaves unexplained, (Q,)."""
        return self.final - (self.initial + self.shares.sum(dim=1) + self.weight_decay)


def decompose(
    model: nn.Module,
    loss: Loss,
    X: Tensor,
    y: Tensor,
    batches: Sequence[Sequence[int]],
    optimizer: str,
    X_query: Tensor,
    output: int | Sequence[Output],
    rule: Rule | Literal["discrete"],
    **hyperparameters: Any,
) -> Decomposition:
    """Decompose trained outputs over training samples by carrying every sample's own momentum forward.

    With the denominators of the actual run frozen, an optimizer step is linear in gradients and memory. So every
    sample i has its own displacement Δ_{s,i} and its own memory, weight decay has one more, and

        Σ_i Δ_{s,i} + Δ_{s,decay} = θ_{s+1} − θ_s ,    share_i(x) = Σ_s q_s(x) · Δ_{s,i} ,

    where q_s(x) = ∫_0^1 ∇f(x; θ_s + t (θ_{s+1} − θ_s)) dt by the given rule. The memory is O(N P) and the time
    O(S (N P + Q · nodes · gradient)), deliberately: nothing is swept backward.

    Parameters
    ----------
    model, loss, X, y, batches, optimizer, **hyperparameters
        The training run, as in `train`.
    X_query : Tensor of shape (Q, ...)
    output : int or sequence of Q
        The output to explain (index into the flattened outputs), for all queries, or that or a scalar function of the
        flattened outputs for each.
    rule : (nodes, weights) or "discrete"
        The quadrature on a step; "discrete" is `discrete_gradient`.

    Returns
    -------
    Decomposition

    Raises
    ------
    ValueError
        For an unknown rule, and as in `train`.

    References
    ----------
    Bell et al., arXiv:2308.00824 (gradient descent); "ExPLAIND", arXiv:2505.20076 (AdamW).
    """
    if isinstance(rule, str) and rule != "discrete":
        raise ValueError(f'Unknown rule {rule!r}; expected "discrete" or (nodes, weights). Write `gauss_legendre(8)`.')
    opt, h, rates = prepare(optimizer, hyperparameters, len(batches))
    sign = -1.0 if h["maximize"] else 1.0
    outputs = [output] * len(X_query) if isinstance(output, int) else list(output)
    path = train(model, loss, X, y, batches, optimizer, **hyperparameters)

    N, P = len(X), len(flatten(model, path[0]))
    memory = torch.zeros(N + 1, P, dtype=torch.float64)  # one row per training sample; row N is weight decay
    statistics = Statistics()
    moved = torch.zeros(len(X_query), N + 1, dtype=torch.float64)
    for k, (ids, lr) in enumerate(zip(batches, rates, strict=True), start=1):
        start, end, index = path[k - 1], path[k], torch.as_tensor(ids)
        decay = h["weight_decay"] * flatten(model, start)

        g = torch.zeros(N + 1, P, dtype=torch.float64)  # each source's part of the gradient; ids may repeat
        g.index_add_(0, index, sign * sample_gradients(model, start, loss, X[index], y[index]))
        total = sign * loss_gradient(model, start, loss, X[index], y[index])
        if not opt.decoupled:
            g[N] += decay
            total = total + decay

        D = opt.denominator(total, statistics, k, h)  # frozen: that of the run
        delta, memory = opt.displace(g, memory, D, lr, k, h)
        if opt.decoupled:
            delta[N] -= lr * decay

        for i, (x, c) in enumerate(zip(X_query, outputs, strict=True)):
            if isinstance(rule, str):
                q = discrete_gradient(model, start, end, x, c)
            else:
                q = average_gradient(model, start, end, x, c, rule)
            moved[i] += delta @ q

    def values(parameters: Parameters) -> Tensor:
        twin = module_at(model, parameters)
        return torch.stack([output_value(twin, x, c).detach() for x, c in zip(X_query, outputs, strict=True)])

    return Decomposition(initial=values(path[0]), shares=moved[:, :N], weight_decay=moved[:, N], final=values(path[-1]))
