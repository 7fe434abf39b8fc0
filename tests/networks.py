"""Networks whose layers are reused, shared, opened, or met only as functions: on these fast methods go wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Twice(nn.Module):
    """A module called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class SharedWeight(nn.Module):
    """Two modules with one Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(F.relu(self.one(x))))


class Functional(nn.Module):
    """Parameters used by functions, without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.ones(5))
        self.head = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight) * self.scale).tanh() @ self.head


class Attention(nn.Module):
    """Attention to itself, or of a query to the input; samples first or second."""

    def __init__(self, batch_first: bool = True, cross: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.query = nn.Linear(6, 6) if cross else nn.Identity()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        attended, _ = self.attention(self.query(x), x, x)
        return self.head(attended.mean(1 if self.batch_first else 0))


class LanguageModel(nn.Module):
    """Embedding tied to the head, a positional parameter of which a part is used, a transformer layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.places = nn.Embedding(11, 6), nn.Parameter(torch.randn(1, 9, 6))
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True, dropout=0.0)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens) + self.places[:, : tokens.shape[1]])).mean(1)


class ClassToken(nn.Module):
    """A parameter expanded over the batch and put before the input."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 5, 6))
        self.layer, self.head = nn.TransformerEncoderLayer(6, 2, 12, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.layer(x)[:, 0])


class ResidualBlock(nn.Module):
    """``x += shortcut`` and in-place ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.norm_one, self.norm_two = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.shortcut, self.relu, self.head = nn.Conv2d(2, 4, 1), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm_two(self.two(self.relu(self.norm_one(self.one(x)))))
        y += self.shortcut(x)
        return self.head(self.relu(y).mean((2, 3)))


class Recurrent(nn.Module):
    """The last state of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.layer(x if self.layer.batch_first else x.transpose(0, 1))
        return self.head(outputs[:, -1] if self.layer.batch_first else outputs[-1])


class Conditional(nn.Module):
    """One of several modules in use, and a parameter that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.branches, self.chosen = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), 1
        self.head, self.unused = nn.Linear(6, 3), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.branches[self.chosen](x).tanh())


class Adapter(nn.Module):
    """A low-rank adapter beside a layer, or merged into its weight."""

    def __init__(self, merged: bool = False) -> None:
        super().__init__()
        self.merged, self.layer, self.head = merged, nn.Linear(6, 6), nn.Linear(6, 3)
        self.down, self.up = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.head(F.linear(x, self.layer.weight + self.up @ self.down, self.layer.bias).tanh())
        return self.head((self.layer(x) + x @ self.down.T @ self.up.t()).tanh())


class PositionsFirst(nn.Module):
    """Samples and positions merged into one axis, positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        return self.head(self.layer(x.transpose(0, 1).reshape(-1, width)).tanh().view(t, n, width).mean(0))


class _Squared(torch.autograd.Function):
    """x ∘ w², by a function that torch's modes do not see."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x * weight**2

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return signals[0] * weight**2, (2 * signals[0] * x * weight).sum(0)


class OwnFunction(nn.Module):
    """A parameter that only a function of one's own meets."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(6, width), nn.Parameter(torch.randn(width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Squared.apply(self.layer(x), self.scale).tanh())


def _weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))


def _spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))


def _convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, groups=2, padding="same", dilation=2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(4, 3)),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), "vectors"),
    "in-place": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), "vectors"),
    "convolutions": (_convolutions, "images"),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3, dilation=2), nn.Flatten(), nn.Linear(8, 3)), "sequences"),
    "conv3d": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 3, 2, padding=1, stride=(1, 2, 1)), nn.Flatten(), nn.Linear(252, 3)
        ),
        "images",
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1, padding=1),
            *(nn.ReLU(), nn.Flatten(), nn.Linear(432, 3)),
        ),
        "images",
    ),
    "normalised": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.RMSNorm(5), nn.Linear(5, 3)), "vectors"),
    "batch norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)), "vectors"),
    "positions": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)), "sequences"),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 5, padding_idx=2), nn.Flatten(), nn.Linear(40, 3)), "tokens"),
    "prelu": (lambda: nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 3)), "vectors"),
    "called twice": (Twice, "vectors"),
    "shared": (SharedWeight, "vectors"),
    "functional": (Functional, "vectors"),
    "attention": (Attention, "sequences"),
    "attention, samples second": (lambda: Attention(batch_first=False), "sequences"),
    "cross attention": (lambda: Attention(cross=True), "sequences"),
    "tied": (LanguageModel, "tokens"),
    "class token": (ClassToken, "sequences"),
    "residual block": (ResidualBlock, "images"),
    "lstm": (lambda: Recurrent(nn.LSTM(6, 4, batch_first=True)), "sequences"),
    "lstm, two ways": (lambda: Recurrent(nn.LSTM(6, 4, 2, bidirectional=True)), "sequences"),
    "gru": (lambda: Recurrent(nn.GRU(6, 4, batch_first=True, bias=False)), "sequences"),
    "rnn": (lambda: Recurrent(nn.RNN(6, 4)), "sequences"),
    "conditional": (Conditional, "vectors"),
    "adapter": (Adapter, "vectors"),
    "merged adapter": (lambda: Adapter(merged=True), "vectors"),
    "positions first": (PositionsFirst, "sequences"),
    "weight norm": (_weight_norm, "vectors"),
    "spectral norm": (_spectral_norm, "vectors"),
    "own function": (OwnFunction, "vectors"),
}
"""Name → constructor and kind of input."""

PLAIN = {"own function": {"scale"}}
"""Parameters that no rule covers; all others of these networks are covered."""


def network(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """A network in eval mode and five samples for it."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make, kind = NETWORKS[name]
        model = make().to(dtype).eval()
    shapes = {"vectors": (5, 6), "sequences": (5, 4, 6), "images": (5, 2, 6, 6)}
    if kind == "tokens":
        return model, torch.randint(11, (5, 8), generator=generator)
    return model, torch.randn(shapes[kind], generator=generator, dtype=dtype)
