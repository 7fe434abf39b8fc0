"""Of which function of the outputs a tangent kernel is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, PyTree
from pathkernel.errors import InputError
from pathkernel.losses import batch_loss


class OutputStructure:
    """How the network returns what kernels see as one vector for each sample; the vector itself until that is known."""

    def __init__(self) -> None:
        self.shapes: list[torch.Size | None] = []
        self.tree: Any = None

    def learn(self, returned: PyTree) -> None:
        """From what the network returned for any batch."""
        leaves, self.tree = pytree.tree_flatten(returned)
        floating = [isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves]
        self.shapes = [leaf.shape[1:] if own else None for leaf, own in zip(leaves, floating, strict=True)]

    def restore(self, outputs: Tensor) -> PyTree:
        """Outputs (n, C) in the network's own form."""
        if self.tree is None:
            return outputs
        leaves, begin = [], 0
        for shape in self.shapes:
            size = 0 if shape is None else shape.numel()
            leaves.append(None if shape is None else outputs[:, begin : begin + size].reshape(-1, *shape))
            begin += size
        return pytree.tree_unflatten(leaves, self.tree)


@dataclass(frozen=True)
class OutputSelection:
    """h(z, context), a function of one sample's outputs, and how its components enter the kernel.

    Attributes
    ----------
    name
        As the user asked for it.
    function
        ``(z (C,), context) -> `` a scalar or (K,).
    scalar
        Whether h is a scalar: one gradient a sample instead of K.
    combine
        ``"sum"``: Σ_k ⟨∇h_k, ∇h_k'⟩; ``"mean"``: that over K; ``"full"``: the (K, K) block of all pairs.
    with_targets
        Whether samples are pairs (input, target), the target being h's context.
    identity
        Whether h is the outputs themselves.
    structure
        In what form h has its samples' outputs, where that matters (a loss has them as the network returns them).
    """

    name: str
    function: Callable[[Tensor, Any], Tensor]
    scalar: bool
    combine: Literal["sum", "mean", "full"] = "sum"
    with_targets: bool = False
    identity: bool = False
    structure: OutputStructure | None = field(default=None, compare=False)


def select_outputs(outputs: Any, loss: Loss | None = None, reduction: str = "mean") -> OutputSelection:
    """Read the ``outputs=`` of a kernel.

    Parameters
    ----------
    outputs
        ``"trace"``, ``"mean"``, ``"full"``: all outputs, their diagonal summed, averaged, or every pair;
        ``"sum"``: the sum of the outputs (pseudo-NTK); an integer: that output; ``"loss"``: the loss of each
        sample, samples being pairs ``(inputs, targets)``; a callable: any function of one sample's outputs (C,).
    loss
        Needed for ``"loss"``.
    reduction
        See `pathkernel.losses.batch_loss`.
    """
    if isinstance(outputs, bool):
        pass
    elif outputs in ("trace", "mean", "full"):
        combine: Any = "sum" if outputs == "trace" else outputs
        return OutputSelection(outputs, lambda z, _: z, False, combine, identity=True)
    elif outputs == "sum":
        return OutputSelection("sum", lambda z, _: z.sum(), True)
    elif isinstance(outputs, int):
        return OutputSelection(f"output {outputs}", lambda z, _: z[outputs], True)
    elif outputs == "loss" and loss is not None:

        structure = OutputStructure()

        def loss_of(z: Tensor, target: Any) -> Tensor:
            targets = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), target)
            return batch_loss(loss, structure.restore(z.unsqueeze(0)), targets, None, reduction)

        return OutputSelection("loss", loss_of, True, with_targets=True, structure=structure)
    elif callable(outputs):
        name = getattr(outputs, "__name__", type(outputs).__name__)
        return OutputSelection(name, lambda z, _: outputs(z).reshape(-1), False)
    raise InputError(
        f"`outputs={outputs!r}` was given",
        'It must be "trace", "mean", "sum", "full", an output index, a callable of one sample\'s outputs, or "loss" '
        "where a loss is at hand",
        'Write for example `outputs="trace"`, or `PathKernel(trajectory, outputs="loss")`',
    )
