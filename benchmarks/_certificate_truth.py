"""What shares and kernels are, by plain autograd of the module itself, one sample at a time.

Nothing of pathkernel is used. A share is carried forward: with the denominators of the actual run, an optimizer's step
is linear in the gradients, so that every sample has a memory and a displacement Δ_{s,i} of its own, and

    share_i(x) = Σ_s ⟨q_s(x), Δ_{s,i}⟩ ,    q_s(x) = ∫_0^1 ∇f(x; θ_s + t (θ_{s+1} − θ_s)) dt .
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

PANELS, NODES = 2, 12
"""The query's gradient is averaged by Gauss–Legendre with so many nodes on each of so many parts of a step."""

Loss = Callable[[Tensor, Tensor], Tensor]


def gradient(scalar: Tensor, parameters: Sequence[Tensor], keep: bool = False) -> Tensor:
    """∇ of a scalar as one vector, zero where it does not reach."""
    found = torch.autograd.grad(scalar, parameters, retain_graph=keep, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in found])


def kernel(net: nn.Module, X: Tensor) -> np.ndarray:
    """Σ_c ⟨∇f_c(x_i), ∇f_c(x_j)⟩, every sample alone and every output alone."""
    net = copy.deepcopy(net).eval()
    parameters, rows = list(net.parameters()), []
    for i in range(len(X)):
        outputs = net(X[i : i + 1]).reshape(-1)
        rows.append(torch.stack([gradient(output, parameters, keep=True) for output in outputs]))
    jacobian = torch.stack(rows)
    return torch.einsum("icp,jcp->ij", jacobian, jacobian).numpy()


# -- optimizers, as in the textbook ---------------------------------------------------------------------------------


@dataclass
class Momentum:
    """SGD: m ← μ m + g, Δ = −η m."""

    rate: float = 0.05
    momentum: float = 0.9
    memory: Tensor | None = None

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=self.rate, momentum=self.momentum)

    def displacements(self, rows: Tensor) -> Tensor:
        """Δ_i of every sample, (N, P), from c_i g_i."""
        self.memory = rows if self.memory is None else self.momentum * self.memory + rows
        return -self.rate * self.memory


@dataclass
class DecoupledAdam:
    """AdamW: the denominators are those of the whole gradient; decay belongs to no sample."""

    rate: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.99)
    # What is zero but for rounding (the bias of a key in attention) would be divided by itself.
    eps: float = 1e-6
    step: int = 0
    first: Tensor | None = None
    second: Tensor | None = None

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.rate, betas=self.betas, eps=self.eps, weight_decay=0.1)

    def displacements(self, rows: Tensor) -> Tensor:
        """Δ_i of every sample, (N, P), from c_i g_i."""
        self.step += 1
        one, two = self.betas
        total = rows.sum(0)
        first = torch.zeros_like(rows) if self.first is None else self.first
        second = torch.zeros_like(total) if self.second is None else self.second
        self.first, self.second = one * first + (1 - one) * rows, two * second + (1 - two) * total**2
        denominator = (self.second / (1 - two**self.step)).sqrt() + self.eps
        return -self.rate / (1 - one**self.step) * self.first / denominator


OPTIMIZERS: dict[str, Callable[[], Momentum | DecoupledAdam]] = {"sgd": Momentum, "adamw": DecoupledAdam}


# -- a run without a recorder ---------------------------------------------------------------------------------------


@dataclass
class Run:
    """A training run without a recorder, and what each sample did in it.

    Attributes
    ----------
    net
        The network, trained.
    path
        θ_0, …, θ_S.
    displacements
        Δ_{s,i}, (N, P) for every step.
    """

    net: nn.Module
    path: list[Tensor] = field(default_factory=list)
    displacements: list[Tensor] = field(default_factory=list)

    def shares(self, queries: Tensor, output: int, nodes: Sequence[tuple[float, float]]) -> Tensor:
        """Shares (Q, N) of the queries, one gradient of one sample at a time."""
        twin = copy.deepcopy(self.net).eval()
        parameters, found = list(twin.parameters()), []
        for i in range(len(queries)):
            total = torch.zeros(len(self.displacements[0]), dtype=torch.float64)
            for start, end, own in zip(self.path, self.path[1:], self.displacements, strict=False):
                average = torch.zeros_like(start)
                for time, weight in nodes:
                    load(parameters, start + time * (end - start))
                    average += weight * gradient(twin(queries[i : i + 1]).reshape(-1)[output], parameters)
                total += own @ average
            found.append(total)
        return torch.stack(found)


def gauss_legendre(panels: int = PANELS, nodes: int = NODES) -> list[tuple[float, float]]:
    """(time, weight) on [0, 1], of a composite rule."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    times, weights = (x + 1) / 2, w / 2
    return [
        ((panel + time) / panels, weight / panels)
        for panel in range(panels)
        for time, weight in zip(times, weights, strict=True)
    ]


def load(parameters: Sequence[Tensor], vector: Tensor) -> None:
    """Write θ into a network."""
    with torch.no_grad():
        parts = vector.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))


def rows_alone(net: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """J_iᵀ λ_i of a batch, (B, P): λ of the loss of the whole batch, J of every sample run alone."""
    parameters = list(net.parameters())
    outputs = [net(x[i : i + 1]) for i in range(len(x))]
    (slopes,) = slopes_of(loss, torch.cat(outputs), y)
    return torch.stack([gradient((z[0] * slope).sum(), parameters) for z, slope in zip(outputs, slopes, strict=True)])


def rows_together(net: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> Tensor:
    """The same of a batch that is run as a whole, as batch statistics and dropout need it."""
    parameters, outputs = list(net.parameters()), net(x)
    (slopes,) = slopes_of(loss, outputs, y)
    rows = [gradient((z * slope).sum(), parameters, keep=True) for z, slope in zip(outputs, slopes, strict=True)]
    return torch.stack(rows)


def slopes_of(loss: Loss, outputs: Tensor, y: Tensor) -> tuple[Tensor]:
    """λ = ∂L/∂z, (B, C)."""
    leaf = outputs.detach().requires_grad_(True)
    return torch.autograd.grad(loss(leaf, y), leaf)


def train(
    net: nn.Module,
    loss: Loss,
    X: Tensor,
    y: Tensor,
    batches: Sequence[Tensor],
    optimizer: Momentum | DecoupledAdam,
    coupled: bool,
) -> Run:
    """Train without a recorder, and take every sample's gradient of every step."""
    net = copy.deepcopy(net)
    parameters = list(net.parameters())
    flat = lambda: torch.cat([p.detach().reshape(-1) for p in parameters])  # noqa: E731
    steps, run, rows_of = optimizer.make(parameters), Run(net), rows_together if coupled else rows_alone
    run.path.append(flat())
    for ids in batches:
        state = torch.get_rng_state()
        rows = torch.zeros(len(X), len(run.path[0]), dtype=torch.float64)
        rows.index_add_(0, ids, rows_of(net, loss, X[ids], y[ids]))
        torch.set_rng_state(state)
        steps.zero_grad()
        loss(net(X[ids]), y[ids]).backward()
        steps.step()
        run.path.append(flat())
        run.displacements.append(optimizer.displacements(rows))
    return run
