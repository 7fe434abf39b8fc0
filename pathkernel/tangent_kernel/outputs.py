"""Functions of the outputs whose tangent kernel is taken."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, PyTree
from pathkernel.errors import InputError
from pathkernel.gradients.losses import batch_loss, check_loss
from pathkernel.gradients.per_sample import values_of
from pathkernel.gradients.returned import map_outputs, output_leaves
from pathkernel.gradients.targets import check_targets, described


def _is_floating(leaf: Any) -> TypeGuard[Tensor]:
    """True for what a network's outputs are made of."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


class OutputStructure:
    """Form in which the network returns what kernels see as one vector a sample; a vector until that is known."""

    def __init__(self) -> None:
        self.returned: Any = None

    def __reduce__(self) -> tuple[type[OutputStructure], tuple[()]]:
        return OutputStructure, ()  # it is learnt again from the next samples

    def learn(self, returned: PyTree) -> None:
        """Learn the form from what the network returned for a batch of one sample."""
        self.returned = map_outputs(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, returned)

    @property
    def learnt(self) -> Tensor | None:
        """Outputs (C,) of the sample from which the form was learnt; None where it is not known, or has none."""
        rows = [leaf.reshape(-1) for leaf in output_leaves(self.returned) if _is_floating(leaf)]
        return torch.cat(rows) if rows else None

    def restore(self, outputs: Tensor) -> PyTree:
        """Outputs (C,) of one sample in the form in which the network returns them for a batch of one."""
        if self.returned is None:
            return outputs.unsqueeze(0)
        begin = 0

        def filled(leaf: Any) -> Any:
            nonlocal begin
            if not _is_floating(leaf):
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

    def check(self, targets: PyTree) -> None:
        """Refuse targets that the loss fails on, at the outputs from which the structure was learnt.

        Raises
        ------
        InputError
            With what they are, and what the loss says.
        """
        z = self.structure.learnt
        if z is not None:
            every = z.expand(len(pytree.tree_leaves(targets)[0]), -1)
            leaves = [leaf for leaf in output_leaves(self.structure.returned) if _is_floating(leaf)]
            one = tuple(leaves[0].shape[1:]) if len(leaves) == 1 else tuple(z.shape)
            check_targets(lambda: values_of(self, every, targets), self.loss, one, targets)


@dataclass(frozen=True)
class MarginOfOutputs:
    r"""The margin of one sample's label, its target being the context.

    .. math:: m(z, y) = \log \frac{p_y}{1 - p_y} = z_y - \log \sum_{k \ne y} e^{z_k},\qquad p = \mathrm{softmax}(z)

    for C outputs, which may be logits or logarithms of probabilities alike; for one output, that of the sigmoid:
    :math:`m(z, y) = (2y - 1)\, z` with y in {0, 1}.

    Attributes
    ----------
    structure
        In what form the network returns its outputs.
    """

    structure: OutputStructure

    def __call__(self, z: Tensor, label: Any) -> Tensor:
        """m(z, label)."""
        (label,) = pytree.tree_leaves(label)
        if len(z) == 1:
            return (2 * label.reshape(()).to(z) - 1) * z[0]
        own = label.reshape(1).long()
        # Taken out, not subtracted: log(1 - p) of a certain sample is lost where p is computed first.
        others = z.scatter(0, own, -math.inf)
        return z.gather(0, own)[0] - others.logsumexp(0)

    def check(self, targets: PyTree) -> None:
        """Refuse targets that are no class labels, and outputs that are no row of class scores for each sample.

        Raises
        ------
        InputError
            With what they are.
        """
        scores = [leaf for leaf in output_leaves(self.structure.returned) if _is_floating(leaf)]
        if len(scores) != 1 or scores[0].dim() > 2 or (scores[0].dim() == 2 and len(scores[0]) > 1):
            raise InputError(
                "The margin of a label was asked of a network that returns "
                + " and ".join(f"{tuple(leaf.shape)}" for leaf in scores)
                + " for one sample",
                "A margin is of one label for each sample, among C outputs in one row",
                "Write the function of the outputs that you mean: `outputs=lambda z: ...`, or `returns=` for the "
                "output that is meant",
            )
        classes, leaves = scores[0].numel(), pytree.tree_leaves(targets)
        labels = leaves[0]
        if classes == 1:
            expected = "With one output, labels are 0 or 1"
            fits = labels[:1].numel() == 1 and bool(((labels == 0) | (labels == 1)).all())
        else:
            expected = f"With {classes} outputs, labels are integers from 0 to {classes - 1}, one for each sample"
            fits = labels.dim() == 1 and not labels.is_floating_point()
            fits = fits and bool(((labels >= 0) & (labels < classes)).all())
        fits = fits and len(leaves) == 1
        if not fits:
            raise InputError(
                f"The margin of a label was asked with targets {described(leaves)}",
                f"{expected}; numbers that a network regresses on have no margin",
                'Pass samples as pairs `(X, labels)`; for other targets write `outputs="loss"`',
            )


COMBINED: dict[str, Literal["sum", "mean", "full"]] = {"trace": "sum", "mean": "mean", "full": "full"}


def select_outputs(outputs: Any, loss: Loss | None = None, reduction: str = "mean") -> OutputSelection:
    """Read the ``outputs=`` of a kernel.

    Parameters
    ----------
    outputs
        ``"trace"``, ``"mean"``, ``"full"``: all outputs, their diagonal summed, averaged, or every pair;
        ``"sum"``: the sum of the outputs (pseudo-NTK); an integer: that output; ``"loss"``, ``"margin"``: the loss, or
        the margin log p/(1 − p) of the label (`MarginOfOutputs`), of each sample, samples being pairs
        ``(inputs, targets)``; a callable: any function of one sample's outputs (C,).
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
        if outputs == "margin":
            structure = OutputStructure()
            return OutputSelection("margin", MarginOfOutputs(structure), True, with_targets=True, structure=structure)
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
        'It must be "trace", "mean", "sum", "full", an output index, a callable of one sample\'s outputs, "margin" of '
        'labels, or "loss" where a loss is at hand',
        'Write for example `outputs="trace"`, or `PathKernel(trajectory, outputs="loss")`',
    )
