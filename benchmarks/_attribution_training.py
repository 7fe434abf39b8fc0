"""Networks that are trained again in large numbers, all at once: the truth by which attributions are judged.

The loop is this benchmark's own and knows nothing of pathkernel: gradients by `torch.func.vmap` over networks, and the
optimizers written out on one matrix of parameters, (networks, P).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

AT_ONCE = 60
"""Networks that are trained together."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything: of the full benchmark, or of a quick look."""

    samples: int = 1000
    queries: int = 50
    subsets: int = 60
    fresh: int = 3
    removed: int = 60
    epochs: int = 15
    memorizing: int = 30


BATCH = 50
HELD_OUT = 150
ALPHAS = {"lds_1": 0.01, "lds_10": 0.1, "lds_50": 0.5}
FLIPPED = 0.2


def digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_digits(return_X_y=True)
    return X / 16.0, y


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_breast_cancer(return_X_y=True)
    return StandardScaler().fit_transform(X), y


def mlp(inputs: int, hidden: int, classes: int, activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), activation(), nn.Linear(hidden, classes))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


NETWORKS: dict[tuple[str, str], tuple[Callable[[], Any], Callable[[], nn.Module]]] = {
    ("digits", "MLP tanh"): (digits, lambda: mlp(64, 64, 10, nn.Tanh)),
    ("digits", "MLP ReLU"): (digits, lambda: mlp(64, 64, 10, nn.ReLU)),
    ("digits", "CNN"): (digits, cnn),
    ("breast cancer", "MLP tanh"): (breast_cancer, lambda: mlp(30, 32, 2, nn.Tanh)),
}
OPTIMIZERS = {"AdamW": {"lr": 3e-3}, "SGD momentum": {"lr": 0.1, "momentum": 0.9}}
TORCH = {"AdamW": torch.optim.AdamW, "SGD momentum": torch.optim.SGD}
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decay": 0.01}
"""torch's defaults of AdamW."""


@dataclass(frozen=True)
class Case:
    """A network, its data split in training samples and queries, and its optimizer.

    Attributes
    ----------
    X, y, X_query, y_query
        float64, and class indices.
    flipped
        (N,) which labels are wrong.
    settings
        Of the optimizer.
    epochs
        How often training goes through the data.
    """

    make: Callable[[], nn.Module]
    optimizer: str
    settings: dict[str, float]
    X: Tensor
    y: Tensor
    X_query: Tensor
    y_query: Tensor
    flipped: Tensor
    epochs: int
    seed: int

    def network(self, seed: int) -> nn.Module:
        """A fresh network in float64."""
        torch.manual_seed(seed)
        return self.make().double()

    def batches(self, seed: int, ids: Tensor | None = None) -> Iterator[Tensor]:
        """Batches of ids in the order of a seed."""
        ids = torch.arange(len(self.X)) if ids is None else ids
        generator = torch.Generator().manual_seed(77 + seed)
        for _ in range(self.epochs):
            yield from ids[torch.randperm(len(ids), generator=generator)].split(BATCH)


def case(data: str, network: str, optimizer: str, seed: int, sizes: Sizes, wrong_labels: bool = False) -> Case:
    """A case; with wrong labels (c → c + 1 of a fifth) it trains three times as fast for longer, and learns them."""
    load, make = NETWORKS[data, network]
    X, y = load()
    order = np.random.default_rng(0).permutation(len(X))  # one split for all seeds
    inputs, labels = torch.from_numpy(X[order]), torch.from_numpy(y[order]).long()
    n, q = min(sizes.samples, (len(X) - HELD_OUT) // BATCH * BATCH), sizes.queries
    own, flipped = labels[:n].clone(), torch.zeros(n, dtype=torch.bool)
    settings, epochs = dict(OPTIMIZERS[optimizer]), sizes.epochs
    if wrong_labels:
        flipped[torch.randperm(n, generator=torch.Generator().manual_seed(1000 + seed))[: int(FLIPPED * n)]] = True
        own[flipped] = (own[flipped] + 1) % (int(labels.max()) + 1)
        settings["lr"] *= 3
        epochs = sizes.memorizing
    return Case(make, optimizer, settings, inputs[:n], own, inputs[n : n + q], labels[n : n + q], flipped, epochs, seed)


# -- many networks at once ------------------------------------------------------------------------------------------


class Together:
    """Networks of one architecture as rows of parameters, (R, P), which are trained on a device."""

    def __init__(self, own: Case, device: str = "cpu") -> None:
        self.case, self.module, self.device = own, own.network(0).to(device), device
        self.X, self.y = own.X.to(device), own.y.to(device)
        named = dict(self.module.named_parameters())
        self.names, self.shapes = list(named), [p.shape for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]
        slope = grad(self._loss)
        self.gradients = {  # one batch for all networks, or one for each
            shared: vmap(slope, in_dims=(0, None, None, 0) if shared else 0) for shared in (True, False)
        }

    def start(self, seed: int) -> Tensor:
        """Parameters of a fresh network, (P,)."""
        return torch.cat([p.detach().flatten() for p in self.case.network(seed).parameters()])

    def _named(self, theta: Tensor) -> dict[str, Tensor]:
        return {
            name: part.view(shape)
            for name, part, shape in zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        }

    def _loss(self, theta: Tensor, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        logits = functional_call(self.module, self._named(theta), (x,))
        return weights @ nn.functional.cross_entropy(logits, y, reduction="none") / len(y)

    def margins(self, thetas: Tensor) -> Tensor:
        """log p / (1 − p) of the queries' labels, (R, Q)."""
        X, y = self.case.X_query.to(self.device), self.case.y_query.to(self.device)
        with torch.no_grad():
            call = vmap(lambda theta: functional_call(self.module, self._named(theta), (X,)))
            logits = call(thetas.to(self.device)).cpu()
            own = y.cpu().expand(len(thetas), -1)[..., None]
            others = logits.scatter(2, own, -torch.inf).logsumexp(2)
            return logits.gather(2, own)[..., 0] - others

    def trained(self, starts: Tensor, batches: list[Tensor], weights: Tensor) -> Tensor:
        """θ_S of every network, (R, P); batches (B,) for all, or (R, B) of their own; weights (R, N)."""
        return torch.cat(
            [
                self._trained(
                    starts[k : k + AT_ONCE], [ids if ids.dim() == 1 else ids[k : k + AT_ONCE] for ids in batches], own
                )
                for k, own in zip(range(0, len(starts), AT_ONCE), weights.split(AT_ONCE), strict=True)
            ]
        )

    def _trained(self, theta: Tensor, batches: list[Tensor], weights: Tensor) -> Tensor:
        step = _ADVANCE[self.case.optimizer]
        theta, weights = theta.to(self.device, copy=True), weights.to(self.device)
        state = torch.zeros(2, *theta.shape, dtype=theta.dtype, device=self.device)
        for t, ids in enumerate((ids.to(self.device) for ids in batches), 1):
            shared = ids.dim() == 1
            own = weights[:, ids] if shared else weights.gather(1, ids)
            with torch.no_grad():
                step(theta, self.gradients[shared](theta, self.X[ids], self.y[ids], own), state, t, self.case.settings)
        return theta.cpu()


def _sgd(theta: Tensor, gradient: Tensor, state: Tensor, t: int, settings: dict[str, float]) -> None:
    state[0].mul_(settings["momentum"]).add_(gradient)
    theta.sub_(state[0], alpha=settings["lr"])


def _adamw(theta: Tensor, gradient: Tensor, state: Tensor, t: int, settings: dict[str, float]) -> None:
    beta1, beta2, rate = ADAM["beta1"], ADAM["beta2"], settings["lr"]
    state[0].lerp_(gradient, 1 - beta1)
    state[1].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    theta.mul_(1 - rate * ADAM["decay"])
    theta.addcdiv_(state[0], (state[1] / (1 - beta2**t)).sqrt_().add_(ADAM["eps"]), value=-rate / (1 - beta1**t))


_ADVANCE = {"SGD momentum": _sgd, "AdamW": _adamw}


# -- the truth ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """Margins of the queries after training again.

    Attributes
    ----------
    subsets
        By name of the measure: weights (R, N) and margins (R, Q), same initialisation and order.
    fresh
        Halves of the data, (R, N), and margins (M, R, Q) of M fresh initialisations and orders each.
    removed, changes
        (K,) ids, and by how much leaving each out moved the margins, (K, Q).
    """

    subsets: dict[str, tuple[np.ndarray, np.ndarray]]
    fresh: tuple[np.ndarray, np.ndarray]
    removed: np.ndarray
    changes: np.ndarray


def truth(own: Case, sizes: Sizes, random_subsets: Callable[..., np.ndarray], device: str = "cpu") -> Truth:
    """Train again: on subsets in the order of the run, on halves afresh, and without single samples."""
    together = Together(own, device)
    n, generator = len(own.X), np.random.default_rng(5000 + own.seed)
    start, order = together.start(own.seed), list(own.batches(own.seed))
    again = lambda weights: together.margins(  # noqa: E731
        together.trained(start.repeat(len(weights), 1), order, torch.from_numpy(weights))
    ).numpy()
    subsets = {}
    for name, alpha in ALPHAS.items():
        weights = random_subsets(n, alpha, sizes.subsets, generator)
        subsets[name] = weights, again(weights)
    removed = generator.permutation(n)[: sizes.removed]
    weights = np.ones((len(removed) + 1, n))
    weights[np.arange(len(removed)), removed] = 0
    margins = again(weights)
    halves = random_subsets(n, 0.5, sizes.subsets, generator)
    fresh = np.stack([_afresh(together, halves, 100_000 * (k + 1) + 1000 * own.seed) for k in range(sizes.fresh)])
    return Truth(subsets, (halves, fresh), removed, margins[:-1] - margins[-1])


def _afresh(together: Together, halves: np.ndarray, seed: int) -> np.ndarray:
    """Margins of networks trained on halves, each from an initialisation and in an order of its own, (R, Q)."""
    own, seeds = together.case, range(seed, seed + len(halves))
    orders = [
        list(own.batches(s, torch.from_numpy(np.flatnonzero(half)))) for s, half in zip(seeds, halves, strict=True)
    ]
    batches = [torch.stack(ids) for ids in zip(*orders, strict=True)]
    starts = torch.stack([together.start(s) for s in seeds])
    ones = torch.ones(halves.shape, dtype=torch.float64)
    return together.margins(together.trained(starts, batches, ones)).numpy()


def names() -> list[str]:
    """All combinations of data and network, as ``--only`` takes them."""
    return [" ".join(pair) for pair in NETWORKS]
