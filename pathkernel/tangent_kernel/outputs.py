"""Functions of the outputs whose tangent kernel is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.losses import batch_loss, check_loss
from pathkernel.gradients.returned import map_outputs


class OutputStructure:
    """Form in which the network returns what kernels see as one vector a sample; a vector until that is known."""

    def __init__(self) -> None:
        self.returned: Any = None

    def __reduce__(self) -> tuple[type[OutputStructure], tuple[()]]:
        return OutputStructure, ()  # it is learnt again from the next samples

    def learn(self, returned: PyTree) -> None:
        """Learn the form from what the network returned for a batch of one sample."""
        self.returned = map_outputs(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, returned)

    def restore(self, outputs: Tensor) -> PyTree:
        """Outputs (C,) of one sample in the form in which the network returns them for a batch of one."""
        if self.returned is None:
            return outputs.unsqueeze(0)
        begin = 0

        def filled(leaf: Any) -> Any:
            nonlocal begin
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            own = outputs[begin : begin + leaf.numel()].reshape(leaf.shape)
            begin += leaf.numel()
            return own

        return map_outputs(filled, self.returned)


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


@dataclass(frozen=True)
class Outputs:
    """All outputs."""

    def __call__(self, z: Tensor, _: Any) -> Tensor:
        """z."""
        return z


@dataclass(frozen=True)
class SumOfOutputs:
    """The sum of the outputs."""

    def __call__(self, z: Tensor, _: Any) -> Tensor:
        """Σ_k z_k."""
        return z.sum()


@dataclass(frozen=True)
class OneOutput:
    """One output, negative indices from the end.

    Attributes
    ----------
    index
        Which one.
    """

    index: int

    def __call__(self, z: Tensor, _: Any) -> Tensor:
        """z_index."""
        self.check(len(z))
        return z[self.index]

    def check(self, outputs: int) -> None:
        """Refuse an index beyond the network's outputs.

        Raises
        ------
        InputError
            With their number.
        """
        if not -outputs <= self.index < outputs:
            raise InputError(
                f"`outputs={self.index}` was given for a network with {outputs} output{'s' * (outputs != 1)}",
                f"An index is one from 0 to {outputs - 1}, or from {-outputs} to -1 from the end",
                'Write `outputs=0`, or `outputs="trace"` for all of them',
            )


@dataclass(frozen=True)
class FunctionOfOutputs:
    """A function of one sample's outputs.

    Attributes
    ----------
    function
        As the user wrote it, (C,) -> any number of numbers.
    """

    function: Callable[[Tensor], Tensor]

    def __call__(self, z: Tensor, _: Any) -> Tensor:
        """h(z), (K,)."""
        return self.function(z).reshape(-1)


@dataclass(frozen=True)
class LossOfOutputs:
    """The loss of one sample, its target being the context.

    Attributes
    ----------
    loss, reduction
        See `pathkernel.gradients.losses.batch_loss`.
    structure
        In what form the loss has the outputs.
    """

    loss: Loss
    reduction: str
    structure: OutputStructure

    def __call__(self, z: Tensor, target: Any) -> Tensor:
        """ℓ(z, target)."""
        targets = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), target)
        return batch_loss(self.loss, self.structure.restore(z), targets, None, self.reduction)


COMBINED: dict[str, Literal["sum", "mean", "full"]] = {"trace": "sum", "mean": "mean", "full": "full"}


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
        See `pathkernel.gradients.losses.batch_loss`.
    """
    if isinstance(outputs, str):
        if outputs in COMBINED:
            return OutputSelection(outputs, Outputs(), False, COMBINED[outputs], identity=True)
        if outputs == "sum":
            return OutputSelection("sum", SumOfOutputs(), True)
        if outputs == "loss" and loss is not None:
            structure = OutputStructure()
            function = LossOfOutputs(check_loss(loss), reduction, structure)
            return OutputSelection("loss", function, True, with_targets=True, structure=structure)
    elif isinstance(outputs, Integral) and not isinstance(outputs, bool):
        return OutputSelection(f"output {outputs}", OneOutput(int(outputs)), True)
    elif callable(outputs) and not isinstance(outputs, type):
        name = getattr(outputs, "__name__", type(outputs).__name__)
        return OutputSelection(name, FunctionOfOutputs(outputs), False)
    raise InputError(
        f"`outputs={outputs!r}` was given",
        'It must be "trace", "mean", "sum", "full", an output index, a callable of one sample\'s outputs, or "loss" '
        "where a loss is at hand",
        'Write for example `outputs="trace"`, or `PathKernel(trajectory, outputs="loss")`',
    )
