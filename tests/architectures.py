"""Public architectures in small, each written with the idioms of the code that people train.

Positions without a batch axis, masks made in `forward`, tied weights, rotations of queries and keys, grouped heads,
gated units, depthwise and transposed convolutions, class tokens, cells in a loop: whatever a module does between two
layers decides whether an engine that goes layer by layer can follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, LENGTH, VOCABULARY, WIDTH, HEADS, CLASSES = 7, 7, 13, 8, 2, 3


@dataclass(frozen=True)
class Architecture:
    """A network and the samples that it takes.

    Attributes
    ----------
    make
        Builds it.
    shape
        Of one sample.
    kind
        Of its entries: ``"floats"``, or ``"tokens"`` from 1 to the vocabulary's end, padded with zeros.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kind: str = "floats"

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network in evaluation mode, the same each time; its running statistics are not trivial."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make().to(dtype).eval()
            for name, buffer in model.named_buffers():
                if "running_mean" in name:
                    buffer.normal_(std=0.1)
                elif "running_var" in name:
                    buffer.uniform_(0.5, 1.5)
        return model

    def samples(self, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """n different samples."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "floats":
            return torch.randn(n, *self.shape, generator=generator, dtype=torch.float64).to(dtype)
        tokens = torch.randint(1, VOCABULARY, (n, *self.shape), generator=generator)
        tokens[1::3, -2:] = 0
        return tokens


# -- transformers ------------------------------------------------------------------------------------------------------


class CausalAttention(nn.Module):
    """Self-attention of GPT-2: one projection, and fused attention or a mask that is made in forward."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = (a.view(b, t, HEADS, width // HEADS).transpose(1, 2) for a in self.c_attn(x).split(width, dim=2))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.transpose(-2, -1) * (width // HEADS) ** -0.5
            mask = torch.tril(torch.ones(t, t, device=x.device)).view(1, 1, t, t)
            y = F.softmax(scores.masked_fill(mask == 0, float("-inf")), dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(b, t, width))


class GPT(nn.Module):
    """nanoGPT: learned positions without a batch axis, head tied to the embedding."""

    def __init__(self, fused: bool = True, tied: bool = True, table: bool = True) -> None:
        super().__init__()
        self.table, self.dropout = table, nn.Dropout(0.1)
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.wpe = nn.Embedding(TOKENS + 2, WIDTH) if table else nn.Parameter(0.1 * torch.randn(TOKENS + 2, WIDTH))
        self.attention = nn.ModuleList(CausalAttention(fused) for _ in range(2))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        if isinstance(self.wpe, nn.Embedding):
            positions = self.wpe(torch.arange(0, t, dtype=torch.long, device=ids.device))
        else:
            positions = self.wpe[:t]
        x = self.dropout(self.wte(ids) + positions)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.lm_head(self.norms[-1](x))[:, -1]


class RootMeanSquareNorm(nn.Module):
    """RMSNorm as LLaMA's code writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: pairs of entries are turned by an angle that grows with the position."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class LlamaBlock(nn.Module):
    """RMSNorm, rotary positions, grouped queries, SwiGLU."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.size = fused, 4
        self.q, self.k, self.v = nn.Linear(WIDTH, 16, bias=False), *(nn.Linear(WIDTH, 8, bias=False) for _ in range(2))
        self.o = nn.Linear(16, WIDTH, bias=False)
        self.gate, self.up = (nn.Linear(WIDTH, 12, bias=False) for _ in range(2))
        self.down = nn.Linear(12, WIDTH, bias=False)
        self.before, self.after = RootMeanSquareNorm(WIDTH), RootMeanSquareNorm(WIDTH)

    def attended(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (layer(x).view(b, t, -1, self.size).transpose(1, 2) for layer in (self.q, self.k, self.v))
        frequencies = 1.0 / 100.0 ** (torch.arange(0, self.size, 2, device=x.device, dtype=x.dtype) / self.size)
        angles = torch.outer(torch.arange(t, device=x.device, dtype=x.dtype), frequencies)
        angles = torch.cat([angles, angles], dim=-1)
        q, k = rotated(q, angles.cos(), angles.sin()), rotated(k, angles.cos(), angles.sin())
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:  # every group of heads reads the same keys and values
            k, v = (a[:, :, None].expand(b, 2, 2, t, self.size).reshape(b, 4, t, self.size) for a in (k, v))
            mask = torch.full((t, t), float("-inf"), device=x.device, dtype=x.dtype).triu(1)
            y = (q @ k.transpose(2, 3) / self.size**0.5 + mask).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, -1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(self.before(x))
        y = self.after(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """LLaMA."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(LlamaBlock(fused) for _ in range(2))
        self.norm, self.head = RootMeanSquareNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, -1]


class Bert(nn.Module):
    """Word, position and type embeddings; padding is masked; a pooler on the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.positions, self.types = nn.Embedding(16, WIDTH), nn.Embedding(2, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.register_buffer("position_ids", torch.arange(16).expand((1, -1)), persistent=False)
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_one, self.norm_two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.pooler, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        types = torch.zeros_like(ids)
        x = self.norm(self.words(ids) + self.types(types) + self.positions(self.position_ids[:, :t]))
        mask = (1.0 - (ids != 0).to(x.dtype))[:, None, None, :] * torch.finfo(x.dtype).min
        q, k, v = (f(x).view(b, t, HEADS, -1).permute(0, 2, 1, 3) for f in (self.query, self.key, self.value))
        weights = (torch.matmul(q, k.transpose(-1, -2)) / (WIDTH // HEADS) ** 0.5 + mask).softmax(-1)
        y = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(b, t, WIDTH)
        x = self.norm_one(self.output(y) + x)
        x = self.norm_two(self.down(F.gelu(self.up(x))) + x)
        return self.head(torch.tanh(self.pooler(x[:, 0])))


class T5Encoder(nn.Module):
    """Attention with a bias by relative position, read from a table by numbers that no sample has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.bias = nn.Embedding(5, HEADS)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(3))
        self.wi_0, self.wi_1, self.wo = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.embedding(ids)
        places = torch.arange(t, device=ids.device)
        buckets = (places[None, :] - places[:, None]).clamp(-2, 2) + 2
        bias = self.bias(buckets).permute(2, 0, 1).unsqueeze(0)
        y = self.norms[0](x)
        q, k, v = (f(y).view(b, t, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        y = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), v)
        x = x + self.o(y.transpose(1, 2).reshape(b, t, WIDTH))
        y = self.norms[1](x)
        x = x + self.wo(F.gelu(self.wi_0(y)) * self.wi_1(y))
        return self.head(self.norms[2](x).mean(dim=1))


class ViT(nn.Module):
    """Patches by a convolution, a class token, positions; torch's own encoder layers or blocks with layer scale."""

    def __init__(self, own_blocks: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, WIDTH, 3, stride=3)
        self.cls_token, self.registers = nn.Parameter(torch.randn(1, 1, WIDTH)), nn.Parameter(torch.randn(2, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 5, WIDTH))
        self.own_blocks = own_blocks
        if own_blocks:
            self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
            self.gamma = nn.Parameter(0.1 * torch.ones(WIDTH))
            self.norm_one, self.norm_two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.fc1, self.fc2 = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        else:
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, activation="gelu", batch_first=True, norm_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        b, t, width = x.shape
        x = torch.cat((self.cls_token.expand(b, -1, -1), x), dim=1) + self.pos_embed
        x = torch.cat((x, self.registers.unsqueeze(0).repeat(b, 1, 1)), dim=1)
        if self.own_blocks:
            t = x.shape[1]
            q, k, v = (
                self.qkv(self.norm_one(x)).reshape(b, t, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
            )
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width)
            x = x + self.gamma * self.proj(y)
            x = x + self.fc2(F.gelu(self.fc1(self.norm_two(x))))
        else:
            x = self.encoder(x)
        return self.head(self.norm(x)[:, 0])


class EncoderDecoder(nn.Module):
    """torch's `nn.Transformer` with sinusoidal positions in a buffer, samples second, and a mask made by torch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        angles = torch.arange(16)[:, None] * torch.exp(torch.arange(0, WIDTH, 2) * -0.7)
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(16, 1, WIDTH))
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, 16, dropout=0.1)
        self.generator = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids.t()) * WIDTH**0.5
        x = x + self.pe[: len(x)]
        source, target = x[:4], x[3:]
        mask = nn.Transformer.generate_square_subsequent_mask(len(target), dtype=x.dtype)
        return self.generator(self.transformer(source, target, tgt_mask=mask))[-1]


class Perceiver(nn.Module):
    """Learned queries, the same for all samples, that attend to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(4, WIDTH))
        self.project = nn.Linear(5, WIDTH)
        self.cross = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        latents = self.latents.unsqueeze(0).expand(len(x), -1, -1)
        latents = latents + self.cross(self.norm(latents), x, x, need_weights=False)[0]
        k, v = self.kv(x).chunk(2, dim=-1)
        # The queries of this layer have no batch axis at all.
        again = F.softmax(self.q(self.latents) @ k.transpose(1, 2) / WIDTH**0.5, dim=-1) @ v
        return self.head((latents + again).mean(dim=1))


class SwinBlock(nn.Module):
    """Attention in windows, which are put beside the samples on one axis, with a table of relative positions."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift, self.window = shift, 2
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.table = nn.Parameter(0.1 * torch.randn(9, HEADS))
        places = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        relative = (places[:, :, None] - places[:, None]).permute(1, 2, 0) + 1
        self.register_buffer("index", relative[..., 0] * 3 + relative[..., 1])
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, width = x.shape
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), dims=(1, 2)) if self.shift else self.norm(x)
        y = y.view(b, h // 2, 2, w // 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, width)
        q, k, v = self.qkv(y).reshape(len(y), 4, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
        y = (q @ k.transpose(-2, -1) / 2 + bias.unsqueeze(0)).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(-1, 4, width))
        y = y.view(b, h // 2, w // 2, 2, 2, width).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, width)
        x = x + (torch.roll(y, (self.shift, self.shift), dims=(1, 2)) if self.shift else y)
        return x + self.mlp(x)


class Swin(nn.Module):
    """Swin transformer: windows, shifted windows, merged patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, WIDTH, 2, stride=2)
        self.blocks = nn.Sequential(SwinBlock(0), SwinBlock(1))
        self.reduction, self.norm = nn.Linear(4 * WIDTH, WIDTH, bias=False), nn.LayerNorm(4 * WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.patches(x).permute(0, 2, 3, 1))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.reduction(self.norm(x)).mean(dim=(1, 2)))


class FeatureTokens(nn.Module):
    """FT-transformer: every number of a table becomes a token by a weight and a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(5, WIDTH)), nn.Parameter(torch.randn(5, WIDTH))
        self.cls = nn.Parameter(torch.randn(WIDTH))
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16), nn.Linear(8, WIDTH)
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x[:, :, None] * self.weight + self.bias[None]
        tokens = torch.cat([self.cls.view(1, 1, -1).expand(len(x), 1, -1), tokens], dim=1)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        a, b = self.up(self.norm(tokens)).chunk(2, dim=-1)
        return self.head(F.relu(tokens + self.down(a * F.relu(b)))[:, 0])


# -- convolutions ------------------------------------------------------------------------------------------------------


class Basic(nn.Module):
    """ResNet's basic block, with downsampling."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """ResNet's bottleneck, with groups in its 3 × 3 convolution (ResNeXt) and GroupNorm."""

    def __init__(self, inputs: int, inner: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv3 = nn.Conv2d(inputs, inner, 1, bias=False), nn.Conv2d(inner, 4 * inner, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=2, bias=False)
        self.gn1, self.gn2, self.gn3 = nn.GroupNorm(2, inner), nn.GroupNorm(2, inner), nn.GroupNorm(2, 4 * inner)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * inner, 1, stride, bias=False), nn.GroupNorm(2, 4 * inner))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.gn1(self.conv1(x)), inplace=True)
        out = F.relu(self.gn2(self.conv2(out)), inplace=True)
        return F.relu(self.gn3(self.conv3(out)) + self.downsample(x), inplace=True)


def resnet() -> nn.Module:
    """ResNet with BatchNorm; torchvision's stem."""
    stem = (nn.Conv2d(2, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))
    body = (Basic(4, 4), Basic(4, 6, 2))
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(6, CLASSES))


def resnext() -> nn.Module:
    """Bottlenecks with groups and GroupNorm."""
    stem = (nn.Conv2d(2, 4, 3, 1, 1, bias=False), nn.GroupNorm(2, 4), nn.ReLU(inplace=True))
    body = (Bottleneck(4, 4), Bottleneck(16, 4, 2))
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, CLASSES))


class InvertedResidual(nn.Module):
    """MobileNetV3's block: expansion, depthwise convolution, squeeze-and-excitation, projection."""

    def __init__(self, inputs: int, inner: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2, self.bn3 = nn.BatchNorm2d(inner), nn.BatchNorm2d(outputs)
        self.pool, self.fc1, self.fc2 = nn.AdaptiveAvgPool2d(1), nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1)
        self.project = nn.Conv2d(inner, outputs, 1, bias=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.bn1(self.expand(x)), inplace=True)
        y = F.hardswish(self.bn2(self.depthwise(y)), inplace=True)
        y = y * F.hardsigmoid(self.fc2(F.relu(self.fc1(self.pool(y)))))
        y = self.bn3(self.project(y))
        return x + y if self.residual else y


def mobilenet() -> nn.Module:
    """MobileNetV3."""
    stem = (nn.Conv2d(2, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.Hardswish(inplace=True))
    body = (InvertedResidual(4, 8, 4, 1), InvertedResidual(4, 8, 6, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(6, 8), nn.Hardswish(), nn.Dropout(0.2))
    return nn.Sequential(*stem, *body, *head, nn.Linear(8, CLASSES))


class ChannelNorm(nn.Module):
    """ConvNeXt's LayerNorm over channels that come second."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        normalised = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)
        return self.weight[:, None, None] * normalised + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    """7 × 7 depthwise convolution, linear layers on channels that come last, layer scale or response normalisation."""

    def __init__(self, width: int, second: bool) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.second = second
        if second:  # global response normalisation
            self.gamma, self.beta = (nn.Parameter(0.1 * torch.randn(1, 1, 1, 4 * width)) for _ in range(2))
        else:
            self.gamma = nn.Parameter(0.1 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        if self.second:
            size = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
            y = self.gamma * (y * (size / (size.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + y
            y = self.pwconv2(y)
        else:
            y = self.gamma * self.pwconv2(y)
        return x + y.permute(0, 3, 1, 2)


def convnext(second: bool = False) -> nn.Module:
    """ConvNeXt, or ConvNeXt V2."""
    stem = (nn.Conv2d(2, 4, 2, stride=2), ChannelNorm(4))
    body = (ConvNeXtBlock(4, second), ChannelNorm(4), nn.Conv2d(4, 6, 2, stride=2), ConvNeXtBlock(6, second))
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, CLASSES))


class DenseNet(nn.Module):
    """Layers that read all before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1, bias=False) for i in range(2))
        self.transition, self.head = nn.Conv2d(10, 5, 1, bias=False), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(norm(torch.cat(features, 1)))))
        x = self.transition(F.relu(self.norms[-1](torch.cat(features, 1))))
        return self.head(F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1).flatten(1))


class UNet(nn.Module):
    """Down by pooling, up by transposed convolutions, with what was on the way; one map of logits."""

    def __init__(self, transposed: bool = True) -> None:
        super().__init__()
        double = lambda a, b: nn.Sequential(  # noqa: E731
            *(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)),
            *(nn.Conv2d(b, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)),
        )
        self.one, self.two, self.three = double(2, 3), double(3, 6), double(6, 3)
        self.up = (
            nn.ConvTranspose2d(6, 3, 2, stride=2)
            if transposed
            else nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True), nn.Conv2d(6, 3, 1))
        )
        self.out = nn.Conv2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.one(x)
        up = self.up(self.two(F.max_pool2d(wide, 2)))
        dy, dx = wide.shape[2] - up.shape[2], wide.shape[3] - up.shape[3]
        up = F.pad(up, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.out(self.three(torch.cat([wide, up], dim=1)))[:, :, ::3, ::3]


class TemporalBlock(nn.Module):
    """Dilated causal convolutions with normalised weights; what is padded on the right is cut off."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.padding = 2 * dilation
        self.conv1 = norm(nn.Conv1d(inputs, outputs, 3, padding=self.padding, dilation=dilation))
        self.conv2 = norm(nn.Conv1d(outputs, outputs, 3, padding=self.padding, dilation=dilation))
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x)[:, :, : -self.padding].contiguous())
        y = F.relu(self.conv2(y)[:, :, : -self.padding].contiguous())
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class TCN(nn.Module):
    """Temporal convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.Sequential(TemporalBlock(3, 4, 1), TemporalBlock(4, 5, 2)), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x)[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions with skips."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(3, 4, 1)
        self.filters = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=d) for d in (1, 2))
        self.gates = nn.ModuleList(nn.Conv1d(4, 4, 2, dilation=d) for d in (1, 2))
        self.residuals = nn.ModuleList(nn.Conv1d(4, 4, 1) for _ in range(2))
        self.skips, self.end = nn.ModuleList(nn.Conv1d(4, 5, 1) for _ in range(2)), nn.Conv1d(5, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.start(x), None
        for dilation, f, g, r, s in zip((1, 2), self.filters, self.gates, self.residuals, self.skips, strict=True):
            padded = F.pad(x, (dilation, 0))
            y = torch.tanh(f(padded)) * torch.sigmoid(g(padded))
            total = s(y) if total is None else total + s(y)
            x = x + r(y)
        return self.end(F.relu(total)).mean(-1)


def autoencoder() -> nn.Module:
    """Convolutions down, transposed convolutions up, one of them in groups."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 24), nn.Unflatten(1, (6, 2, 2)), nn.LeakyReLU(0.1)),
        nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
        *(nn.BatchNorm2d(4), nn.PReLU(4), nn.ConvTranspose2d(4, 2, 2, stride=2, dilation=1), nn.Sigmoid()),
        nn.AdaptiveAvgPool2d(2),
    )


# -- recurrence --------------------------------------------------------------------------------------------------------


class LSTMClassifier(nn.Module):
    """Embedding, an LSTM in both directions with a state of zeros, and its last states."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 5, padding_idx=0)
        self.lstm = nn.LSTM(5, 4, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        h0, c0 = (torch.zeros(4, len(ids), 4, dtype=self.head.weight.dtype) for _ in range(2))
        _, (h, _) = self.lstm(self.embedding(ids), (h0, c0))
        return self.head(torch.cat([h[-2], h[-1]], dim=1))


class GRUSequence(nn.Module):
    """A GRU with samples second and a learned first state, which says something at every position."""

    def __init__(self) -> None:
        super().__init__()
        self.h0 = nn.Parameter(0.1 * torch.randn(1, 1, 4))
        self.gru, self.head = nn.GRU(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        outputs, _ = self.gru(x, self.h0.expand(-1, x.shape[1], -1).contiguous())
        return self.head(outputs).transpose(0, 1)


class CellLoop(nn.Module):
    """LSTM and GRU cells in a loop, from no state and from one of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.LSTMCell(3, 4), nn.GRUCell(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state, h = None, torch.zeros(len(x), 5, dtype=x.dtype, device=x.device)
        for t in range(x.shape[1]):
            state = self.one(x[:, t], state)
            h = self.two(state[0], h)
        return self.head(h)


class Seq2Seq(nn.Module):
    """A recurrent encoder, and a decoder cell with additive attention to it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.GRU(3, 4, batch_first=True), nn.GRUCell(4, 4)
        self.w, self.u, self.v = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Parameter(torch.randn(4))
        self.start, self.head = nn.Parameter(torch.randn(4)), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        memory, h = self.encoder(x)
        h, y, said = h[-1], self.start.expand(len(x), -1), []
        for _ in range(2):
            scores = torch.tanh(self.w(memory) + self.u(h)[:, None]) @ self.v
            y = torch.bmm(scores.softmax(-1).unsqueeze(1), memory).squeeze(1) + y
            h = self.decoder(y, h)
            said.append(self.head(h))
        return torch.stack(said, dim=1)


class StateSpace(nn.Module):
    """A diagonal state-space layer (S4D): decay and input of the state are functions of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.log_a, self.b, self.c = nn.Parameter(torch.randn(4, 3)), *(nn.Parameter(torch.randn(4, 3)) for _ in "bc")
        self.log_step, self.d = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.randn(4))
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        u = self.inner(x)
        a, step = -self.log_a.exp(), F.softplus(self.log_step).unsqueeze(-1)
        decay, gain = torch.exp(a * step), step * self.b
        state = torch.zeros(len(u), 4, 3, dtype=u.dtype, device=u.device)
        said = []
        for t in range(u.shape[1]):
            state = decay * state + gain * u[:, t, :, None]
            said.append((state * self.c).sum(-1) + self.d * u[:, t])
        return self.head(F.gelu(torch.stack(said, dim=1)).mean(1))


# -- others ------------------------------------------------------------------------------------------------------------


class MixerBlock(nn.Module):
    """Mixes positions, then channels."""

    def __init__(self) -> None:
        super().__init__()
        mlp = lambda width, inner: nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))  # noqa: E731
        self.one, self.two, self.tokens, self.channels = nn.LayerNorm(6), nn.LayerNorm(6), mlp(4, 5), mlp(6, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.one(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.two(x))


class Mixer(nn.Module):
    """MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 6, 3, stride=3)
        self.blocks, self.norm, self.head = nn.Sequential(MixerBlock(), MixerBlock()), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


class Film(nn.Module):
    """An image modulated by its own condition: scale and shift of channels come from another layer; a learned gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.condition = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(2, 8)
        self.alpha, self.temperature = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(1.5))
        self.bilinear, self.head = nn.Bilinear(4, 2, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3))
        scale, shift = self.condition(mean).chunk(2, dim=1)
        y = self.conv(x) * (1 + self.alpha * scale[:, :, None, None]) + shift[:, :, None, None]
        return self.head(torch.tanh(self.bilinear(y.mean((2, 3)), mean))) / self.temperature.exp()


class Factorization(nn.Module):
    """Recommender: embeddings of a user and an item, their product and a network on both, biases of each."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(VOCABULARY, 4), nn.Embedding(VOCABULARY, 4)
        self.user_bias, self.item_bias = nn.Embedding(VOCABULARY, 1), nn.Embedding(VOCABULARY, 1)
        self.bag, self.offset = nn.EmbeddingBag(VOCABULARY, 4, mode="mean"), nn.Parameter(torch.tensor(0.3))
        self.mlp = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, ids: Tensor) -> Tensor:
        u, i, history = self.user(ids[:, 0]), self.item(ids[:, 1]), self.bag(ids[:, 2:])
        biases = self.user_bias(ids[:, 0]) + self.item_bias(ids[:, 1]) + self.offset
        return (u * i).sum(1, keepdim=True) + biases + self.mlp(torch.cat([u, i, history], dim=1))


IMAGE = (2, 8, 8)
ARCHITECTURES: dict[str, Architecture] = {
    "GPT-2": Architecture(GPT, (TOKENS,), "tokens"),
    "GPT-2, mask in forward": Architecture(lambda: GPT(fused=False), (TOKENS,), "tokens"),
    "GPT, table of positions": Architecture(lambda: GPT(tied=False, table=False), (TOKENS,), "tokens"),
    "LLaMA": Architecture(Llama, (TOKENS,), "tokens"),
    "LLaMA, heads expanded": Architecture(lambda: Llama(fused=False), (TOKENS,), "tokens"),
    "BERT": Architecture(Bert, (TOKENS,), "tokens"),
    "T5 encoder": Architecture(T5Encoder, (TOKENS,), "tokens"),
    "encoder-decoder": Architecture(EncoderDecoder, (TOKENS,), "tokens"),
    "ViT": Architecture(ViT, (2, 6, 6)),
    "ViT, torch's encoder": Architecture(lambda: ViT(own_blocks=False), (2, 6, 6)),
    "Swin": Architecture(Swin, IMAGE),
    "Perceiver": Architecture(Perceiver, (6, 5)),
    "FT-transformer": Architecture(FeatureTokens, (5,)),
    "MLP-Mixer": Architecture(Mixer, (2, 6, 6)),
    "ResNet": Architecture(resnet, IMAGE),
    "ResNeXt, GroupNorm": Architecture(resnext, IMAGE),
    "MobileNetV3": Architecture(mobilenet, IMAGE),
    "ConvNeXt": Architecture(convnext, IMAGE),
    "ConvNeXt V2": Architecture(lambda: convnext(second=True), IMAGE),
    "DenseNet": Architecture(DenseNet, (2, 6, 6)),
    "U-Net": Architecture(UNet, (2, 6, 6)),
    "U-Net, upsampled": Architecture(lambda: UNet(transposed=False), (2, 6, 6)),
    "TCN": Architecture(TCN, (3, 9)),
    "WaveNet": Architecture(WaveNet, (3, 9)),
    "autoencoder": Architecture(autoencoder, IMAGE),
    "LSTM classifier": Architecture(LSTMClassifier, (TOKENS,), "tokens"),
    "GRU sequence": Architecture(GRUSequence, (6, 3)),
    "LSTM and GRU cells": Architecture(CellLoop, (5, 3)),
    "attention decoder": Architecture(Seq2Seq, (5, 3)),
    "state space": Architecture(StateSpace, (6, 3)),
    "FiLM": Architecture(Film, (2, 6, 6)),
    "recommender": Architecture(Factorization, (TOKENS,), "tokens"),
}
"""Name → architecture."""
