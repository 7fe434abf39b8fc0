"""Networks that nobody tuned for, in the manner of public ones: a small GPT, and a ResNet with BatchNorm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOKENS, LETTERS = 64, 65


class Block(nn.Module):
    """Attention and a multilayer perceptron, each behind a normalisation and beside its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_one, self.norm_two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        heads = (part.view(n, t, self.heads, -1).transpose(1, 2) for part in self.qkv(self.norm_one(x)).split(width, 2))
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, width))
        return x + self.down(F.gelu(self.up(self.norm_two(x))))


class GPT(nn.Module):
    """Positions without a batch axis, and the table of tokens tied to the head, as nanoGPT has them."""

    def __init__(self, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(LETTERS, width), nn.Embedding(TOKENS, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, LETTERS, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.norm(self.blocks(x)))


class Residual(nn.Module):
    """Two convolutions beside their input, which is sampled down where they are."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv_one, self.norm_one = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv_two, self.norm_two = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        down = nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
        self.skip = nn.Identity() if before == after else nn.Sequential(*down)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm_one(self.conv_one(x)))
        return F.relu(self.norm_two(self.conv_two(inner)) + self.skip(x))


def resnet() -> nn.Module:
    """Eleven convolutions for 16 × 16 images."""
    stem = nn.Conv2d(3, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
    sizes = (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)
    return nn.Sequential(
        *stem, *(Residual(*size) for size in sizes), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
    )


def token_loss(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, -2), y.flatten())


def one_logit(z: Tensor) -> Tensor:
    """The logit of a letter at the last position."""
    return z.reshape(TOKENS, LETTERS)[-1, 3]


@dataclass(frozen=True)
class Workload:
    """A network, how it is trained, and which output of each query is explained."""

    optimizer: str
    batch: int
    make: Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Callable[[], tuple[Tensor, Tensor]]
    outputs: Callable[[Tensor], Tensor] | None


def _gpt() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = GPT()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def _resnet() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = resnet()
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def _letters() -> tuple[Tensor, Tensor]:
    walks = torch.cumsum(torch.randint(0, 5, (1000, TOKENS + 1)), 1) % LETTERS
    return walks[:, :-1].contiguous(), walks[:, 1:].contiguous()


def _images() -> tuple[Tensor, Tensor]:
    y = torch.randint(10, (1000,))
    return torch.randn(1000, 3, 16, 16) + torch.randn(10, 3, 16, 16)[y], y


WORKLOADS = {
    "GPT": Workload("AdamW", 16, _gpt, token_loss, _letters, one_logit),
    "ResNet-BatchNorm": Workload("momentum", 50, _resnet, nn.CrossEntropyLoss(), _images, None),
}
