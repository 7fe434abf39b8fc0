"""Parameters that make up θ, and their places in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from pathkernel._typing import Float, Parameters


@dataclass(frozen=True)
class ParameterLayout:
    """Places of the parameters in the flat vector θ.

    Parameters
    ----------
    names
        Parameter names as in ``module.named_parameters()``; a tied parameter appears once.
    shapes
        Their shapes, in the same order.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, parameters: Parameters) -> ParameterLayout:
        """Lay out the given parameters in their order."""
        return cls(tuple(parameters), tuple(p.shape for p in parameters.values()))

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The range of each parameter in θ."""
        ranges, offset = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            ranges[name] = slice(offset, offset + shape.numel())
            offset += shape.numel()
        return ranges

    @cached_property
    def size(self) -> int:
        """P, the length of θ."""
        return sum(shape.numel() for shape in self.shapes)

    def flatten(self, tensors: Parameters, dtype: torch.dtype | None = None) -> Tensor:
        """Copy tensors with shapes (..., *shape) into one (..., P); any leading axes are kept."""
        rows = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            tensor = tensors[name]
            leading = tensor.shape[: tensor.dim() - len(shape)]
            rows.append(tensor.reshape(*leading, -1).to(dtype or tensor.dtype))
        return torch.cat(rows, dim=-1)

    def unflatten(self, vector: Float[Tensor, "*leading P"]) -> dict[str, Tensor]:
        """Views of (..., P) with shapes (..., *shape), by name."""
        leading = vector.shape[:-1]
        return {
            name: vector[..., where].reshape((*leading, *shape))
            for (name, where), shape in zip(self.slices.items(), self.shapes, strict=True)
        }


def named_trainable(module: nn.Module, also: Sequence[nn.Parameter] = ()) -> dict[str, nn.Parameter]:
    """Parameters that can move: those that require gradients, and those named in ``also``, tied ones once."""
    wanted = {id(p) for p in also}
    return {name: p for name, p in module.named_parameters() if p.requires_grad or id(p) in wanted}


def constants_of(module: nn.Module, layout: ParameterLayout) -> dict[str, Tensor]:
    """Copies of all parameters outside the layout and of all buffers."""
    rest = {n: p.detach().clone() for n, p in module.named_parameters() if n not in layout.slices}
    return {**rest, **{n: b.detach().clone() for n, b in module.named_buffers()}}
