"""What torch itself takes for the parts of a tangent kernel: the floor that an engine made of its functions stands on.

Forward pass, back-propagated signals, rows and half of the products (all of them where rows and columns are different
samples), each by the plainest call that does it, and nothing else: no matrix is put together, nothing is checked.
Signals are read where a layer has its output; rows are formed where a layer has several positions in a sample, and
layers with one are contracted from activations and signals, as `_floors` has it. Passes of a few samples, memory made
beforehand, and for products the faster of MKL and oneDNN: no part waits for something that another way would spare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _targets import TORCH_FLOOR
from _workloads import OUTPUTS, Task, loaded, sample_losses
from torch import Tensor, nn

PASS = {"mlp": 2048, "cnn": 32, "transformer": 32}
"""Samples of a pass through each network: of 16 to 256, nearly the fastest."""

LARGEST = 31 << 20
"""Bytes of a block that the C library still keeps when it is freed."""


@dataclass
class LayerPass:
    """A layer in one pass: what it read, and its output, whose gradient is the signal."""

    module: nn.Module
    read: Tensor
    output: Tensor


@dataclass
class Memory:
    """Of one layer: rows (n K, size), or activations (n, q) and signals (n K, p)."""

    rows: Tensor | None = None
    activations: Tensor | None = None
    signals: Tensor | None = None


@dataclass
class Side:
    """Rows or columns of the kernel: samples, and what is gathered of each layer."""

    inputs: Tensor
    targets: Tensor
    layers: list[Memory] = field(default_factory=list)


class TorchFloor:
    """The parts of one kernel, done one after the other."""

    def __init__(self, task: Task, arrays: dict[str, np.ndarray]) -> None:
        self.task, self.model = task, loaded(task, arrays)
        self.signals = 1 if task.outputs == "loss" else OUTPUTS
        self._seen: list[LayerPass] = []
        for module in self.model.modules():
            if list(module.parameters(recurse=False)):
                module.register_forward_hook(self._note)
        sides = [("Xq", "yq"), ("X", "y")] if "X" in arrays else [("Xq", "yq")]
        # glibc gives memory back to the system from the size of the largest block on that it has seen freed: of results
        # whose pages are new at every call the time would be the system's.
        torch.empty(LARGEST, dtype=torch.uint8)
        self.sides = [Side(torch.from_numpy(arrays[x]), torch.from_numpy(arrays[y])) for x, y in sides]
        self.product = torch.matmul
        self()  # makes the memory
        self.product = min((torch.matmul, _by_onednn), key=lambda product: self._seconds_with(product))

    def _note(self, module: nn.Module, read: tuple[Tensor], output: Tensor) -> None:
        self._seen.append(LayerPass(module, read[0].detach(), output))

    def _seconds_with(self, product: Callable[[Tensor, Tensor], Tensor]) -> float:
        self.product, start = product, time.process_time()
        for _ in range(2):
            self._contract()
        return time.process_time() - start

    def __call__(self) -> None:
        for side in self.sides:
            size = PASS[self.task.network]
            for begin in range(0, len(side.inputs), size):
                self._pass(side, slice(begin, begin + size))
        self._contract()

    def _pass(self, side: Side, where: slice) -> None:
        """Forward, signals and rows of some samples."""
        self._seen.clear()
        outputs = self.model(side.inputs[where])
        layers = self._seen
        if self.task.outputs == "loss":
            scalars = sample_losses(outputs, side.targets[where]).unsqueeze(1)
        else:
            scalars, layers = outputs, layers[:-1]  # δ of the last layer are unit vectors
        for c in range(self.signals):
            signals = torch.autograd.grad(
                scalars[:, c].sum(), [layer.output for layer in layers], retain_graph=c + 1 < self.signals
            )
            for place, (layer, signal) in enumerate(zip(layers, signals, strict=True)):
                self._gather(self._memory(side, place, layer), layer, signal, where, c)
        if self.task.outputs != "loss":
            head = self._memory(side, len(layers), self._seen[-1], signals=False)
            assert head.activations is not None
            head.activations[where] = self._seen[-1].read

    def _memory(self, side: Side, place: int, layer: LayerPass, signals: bool = True) -> Memory:
        """Made in the first pass of all."""
        if place == len(side.layers):
            n, k = len(side.inputs), self.signals
            if isinstance(layer.module, nn.Linear) and layer.read.dim() == 2:
                side.layers.append(Memory(activations=torch.zeros(n, layer.read.shape[1])))
                if signals:
                    side.layers[-1].signals = torch.zeros(n, k, layer.output.shape[1])
            else:
                size = sum(p.numel() for p in layer.module.parameters(recurse=False))
                side.layers.append(Memory(rows=torch.zeros(n, k, size)))
        return side.layers[place]

    @torch.no_grad()
    def _gather(self, memory: Memory, layer: LayerPass, signal: Tensor, where: slice, c: int) -> None:
        """Signals and activations, or rows."""
        if memory.rows is None:
            assert memory.activations is not None and memory.signals is not None
            memory.signals[where, c] = signal
            if not c:
                memory.activations[where] = layer.read
            return
        n, rows = len(signal), memory.rows[where, c]
        module = layer.module
        weight = module.weight.numel()
        if isinstance(module, nn.Linear):
            torch.bmm(signal.transpose(1, 2), layer.read, out=rows[:, :weight].view(n, *module.weight.shape))
            rows[:, weight:] = signal.sum(dim=1)
        elif isinstance(module, nn.Conv2d):
            if not c:  # the patches serve every signal
                layer.read = F.unfold(layer.read, module.kernel_size, padding=module.padding).transpose(1, 2)
            delta = signal.flatten(2)
            torch.bmm(delta, layer.read, out=rows[:, :weight].view(n, delta.shape[1], -1))
            rows[:, weight:] = delta.sum(dim=2)
        elif isinstance(module, nn.Embedding):
            table = rows.view(n, *module.weight.shape).zero_()
            table.scatter_add_(1, layer.read.unsqueeze(2).expand_as(signal), signal)
        elif isinstance(module, nn.GroupNorm):
            normalised = F.group_norm(layer.read, module.num_groups).flatten(2)
            rows[:, :weight] = torch.linalg.vecdot(signal.flatten(2), normalised)
            rows[:, weight:] = signal.flatten(2).sum(dim=2)
        else:
            normalised = F.layer_norm(layer.read, module.normalized_shape)
            rows[:, :weight] = (signal * normalised).sum(dim=1)
            rows[:, weight:] = signal.sum(dim=1)

    @torch.no_grad()
    def _contract(self) -> None:
        left, right = self.sides[0].layers, self.sides[-1].layers
        for one, two in zip(left, right, strict=True):
            for left_factor, right_factor in self._factors(one, two):
                n = len(left_factor)
                part = left_factor[: (n + 1) // 2] if one is two else left_factor
                self.product(part, right_factor.T)

    def _factors(self, one: Memory, two: Memory) -> Iterator[tuple[Tensor, Tensor]]:
        for name in ("rows", "activations", "signals"):
            left, right = getattr(one, name), getattr(two, name)
            if left is None:
                continue
            if name == "activations":
                yield left, right
            elif self.task.outputs == "full":
                yield left.flatten(0, 1), right.flatten(0, 1)
            else:  # the trace is a sum within the product
                yield left.flatten(1), right.flatten(1)


def _by_onednn(left: Tensor, right: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], None)
    return found


def torch_floor(task: Task, arrays: dict[str, np.ndarray]) -> tuple[Callable[[], Any], None]:
    """What is timed; it has no result."""
    return TorchFloor(task, arrays), None


METHODS = {TORCH_FLOOR: torch_floor}
