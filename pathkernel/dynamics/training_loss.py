r"""The training loss as a function of θ, with the derivatives that flows are made of.

.. math:: L(\theta),\qquad g = \nabla L,\qquad H v,\qquad T(v, v) = \nabla_\theta\, (v^\top H v)\big|_{v\ \text{fixed}}

All samples count at once. They go through the network a block at a time where that is proved to change nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pathkernel._typing import Loss, PyTree
from pathkernel.errors import InputError, is_whole
from pathkernel.gradients.acceptance import Acceptance
from pathkernel.gradients.forward_derivatives import REFUSALS
from pathkernel.gradients.forward_state import ForwardState, generators_untouched
from pathkernel.gradients.losses import Objective, batch_loss, check_loss, check_reduction
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.parameters import ParameterLayout, constants_of, named_trainable
from pathkernel.gradients.pytrees import blocks, count, take
from pathkernel.gradients.returned import Returns, batch_outputs, check_returns
from pathkernel.trajectory.run import Run, Start
from pathkernel.trajectory.samples import Samples
from pathkernel.update_rules.sgd import SGD

ADDS_UP = 1e-9
"""Relative difference between a loss taken at once and block by block up to which they are one function (float64)."""


class TrainingLoss:
    """L(θ) of a network on its data.

    Parameters
    ----------
    run
        The network with its loss, data and θ(0), as for a recording.
    function
        The network as a pure function of θ, running as it runs in training.
    inputs, targets
        All samples, along the first axis.
    block
        Samples that go through the network at once, where the loss of all is a mean or a sum over blocks.
    weights
        (N,) coefficients of the samples' own losses, or None; see `pathkernel.gradients.losses.batch_loss`.

    Attributes
    ----------
    run, function, inputs, targets, block, weights
        As given, samples and what the loss holds in the floating type of the arithmetic.
    parts
        (block of samples, its weight) whose losses add up to L.

    Raises
    ------
    InputError
        For a block of no samples.
    """

    def __init__(
        self,
        run: Run,
        function: ModelFunction,
        inputs: PyTree,
        targets: PyTree,
        block: int = 4096,
        weights: Tensor | None = None,
    ) -> None:
        if not (is_whole(block) and block >= 1):
            raise InputError(
                f"`block={block!r}` was given", "A block holds one sample or more", "Write for example `block=4096`"
            )
        self.function, self.block, self.weights = function, block, weights
        self.inputs, self.targets = function.cast(inputs), function.cast(targets)
        self.loss = in_type(run.objective.function("The training loss as a function of θ"), function.dtype)
        self.run = replace(run, objective=replace(run.objective, loss=self.loss))
        self.parts: list[tuple[slice, float]] = [(slice(0, len(self)), 1.0)]
        self._held = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        loss: Loss,
        data: Any,
        *,
        reduction: str = "mean",
        returns: Returns = None,
        dtype: torch.dtype = torch.float64,
        block: int = 4096,
    ) -> TrainingLoss:
        """Loss of a model as it stands: in its modes, with its buffers; none of what is the user's is changed.

        Parameters
        ----------
        model
            The network; its present parameters are θ(0).
        loss
            ``(output, target)`` to a scalar, or one number per sample.
        data
            ``(X, y)``, or a map-style Dataset of (input, target).
        reduction
            ``"mean"`` or ``"sum"`` over a loss with one number per sample.
        returns
            What of the network's return value is its output, as for `pathkernel.KernelRecorder`.
        dtype
            Floating type of the arithmetic, whatever that of the model is.
        block
            Samples that go through the network at once.

        Raises
        ------
        InputError
            For a network without parameters that move, for one whose passes draw random numbers, and for samples that
            it does not take.
        """
        if not isinstance(model, nn.Module):
            raise InputError(
                f"`model` is a {type(model).__name__}",
                "A flow moves the parameters of a network",
                "Pass an `nn.Module`",
            )
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(
                f"`dtype={dtype!r}` was given", "A flow is followed in a floating type", "Write `dtype=torch.float64`"
            )
        named = named_trainable(model)
        if not named:
            raise InputError(
                f"`{type(model).__name__}` has no parameter that requires gradients",
                "A flow moves parameters",
                "Write `model.requires_grad_(True)`",
            )
        layout = ParameterLayout.of(named)
        theta = layout.flatten({name: p.detach() for name, p in named.items()}, dtype)
        run = Run(
            model=model,
            objective=Objective(check_loss(loss), check_reduction(reduction)),
            data=Samples(data, dtype),
            rule=SGD(),  # whose rate is the time of gradient flow
            layout=layout,
            start=Start(theta, constants_of(model, layout)),
            returns=check_returns(returns),
        )
        modes = {name: child.training for name, child in model.named_modules()}
        function = run.function().with_(state=ForwardState(modes=modes))
        with generators_untouched():
            if run.data.holds_integers:
                run.data.suit(function, theta)
            made = cls(run, function, *run.data.everything(), block)
            made._check_deterministic()
            return made.in_blocks()

    @property
    def initial(self) -> Tensor:
        """θ(0), (P,)."""
        return self.function.cast(self.run.initial)

    def __len__(self) -> int:
        """N."""
        return count(self.inputs)

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the arithmetic."""
        return self.function.dtype

    def of_batch(self, ids: Tensor) -> TrainingLoss:
        """The loss of some of the samples alone, taken at once."""
        weights = None if self.weights is None else self.weights[ids]
        inputs, targets = take(self.inputs, ids), take(self.targets, ids)
        return TrainingLoss(self.run, self.function, inputs, targets, self.block, weights)

    # -- values and derivatives ------------------------------------------------------------------------------

    def value(self, theta: Tensor) -> Tensor:
        """L(θ), a tensor of no axes."""
        with self._passes(gradients=False):
            return sum(self._terms(self.function.cast(theta)), torch.zeros((), dtype=self.dtype))

    def gradient(self, theta: Tensor) -> Tensor:
        """∇L(θ), (P,)."""
        return self.value_and_gradient(theta)[1]

    def value_and_gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """L(θ) and ∇L(θ), (P,), by one reverse sweep a block."""
        leaf = self._leaf(theta)
        value, gradient = torch.zeros((), dtype=self.dtype), torch.zeros_like(leaf)
        with self._passes(gradients=True):
            for term in self._terms(leaf):
                value = value + term.detach()
                gradient = gradient + derivative(term, leaf)
        return value, gradient

    def products(self, theta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """∇L(θ) and H(θ) v, (P,) each."""
        gradient, product, _ = self._products(theta, v, third=False)
        return gradient, product

    def third_products(self, theta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """H(θ) v and T(v, v), (P,) each."""
        return self._products(theta, v, third=True)[1:]

    def _products(self, theta: Tensor, v: Tensor, third: bool) -> tuple[Tensor, Tensor, Tensor]:
        leaf, v = self._leaf(theta), v.detach()
        g, hv, tvv = (torch.zeros_like(leaf) for _ in range(3))
        with self._passes(gradients=True):
            for term in self._terms(leaf):
                own = derivative(term, leaf, again=True)
                slope = derivative(own @ v, leaf, again=third)
                g, hv = g + own.detach(), hv + slope.detach()
                if third:
                    tvv = tvv + derivative(slope @ v, leaf)
        return g, hv, tvv

    @contextmanager
    def held(self) -> Iterator[None]:
        """Leave torch's settings as passes need them from one evaluation inside to the next: a third of a small one.

        Ctrl-C is let through before each pass.
        """
        with self.function.evaluating(), self.function.kept():
            before, self._held = self._held, True
            try:
                yield
            finally:
                self._held = before

    @contextmanager
    def _passes(self, gradients: bool) -> Iterator[None]:
        """Run passes inside, with or without a graph."""
        if self._held:
            with torch.set_grad_enabled(gradients):
                yield
        else:
            with self.function.evaluating(gradients=gradients), self.function.kept():
                yield

    def _leaf(self, theta: Tensor) -> Tensor:
        return self.function.cast(theta).detach().clone().requires_grad_(True)

    def _terms(self, theta: Tensor) -> Iterator[Tensor]:
        """Numbers that add up to L(θ), each with a graph of its own."""
        for where, weight in self.parts:
            yield weight * self._loss(self._outputs(theta, where), where)
        for regularizer in self.run.objective.regularizers.values():
            yield regularizer(self.function.layout.unflatten(theta))

    def _outputs(self, theta: Tensor, where: slice) -> PyTree:
        return self.function.call(self.function.layout.unflatten(theta), take(self.inputs, where))

    def _loss(self, outputs: PyTree, where: slice) -> Tensor:
        weights = None if self.weights is None else self.weights[where]
        return batch_loss(self.loss, outputs, take(self.targets, where), weights, self.run.objective.reduction)

    # -- what is proved before use ---------------------------------------------------------------------------

    def in_blocks(self) -> TrainingLoss:
        """The same object, block by block from now on if that is proved to change nothing."""
        self.parts = self._proved_parts()
        return self

    def _check_deterministic(self) -> None:
        """Refuse samples that the network does not take, and random numbers: θ alone has to say where it goes."""
        piece = slice(0, min(self.block, len(self)))
        try:
            first, second = self._flat(piece), self._flat(piece)
        except REFUSALS:
            Acceptance(self.function, self.initial, "pathkernel.dynamics")(self.inputs)  # names the layer that fails
            raise
        if not torch.equal(first.nan_to_num(), second.nan_to_num()):
            raise InputError(
                "Two passes of the network at the same θ gave different outputs: it draws random numbers, as dropout "
                "does in train mode",
                "A flow follows the gradient of one function of θ",
                "Write `model.eval()` before, or add noise of known size: `pathkernel.dynamics.langevin(noise=...)`",
            )

    def check_evaluation(self, theta: Tensor) -> None:
        """Refuse to explain a network that trains on other outputs than it has in evaluation.

        Raises
        ------
        InputError
            Where outputs of the training samples at θ differ between the modes of the flow and evaluation.
        """
        trained = torch.cat([self._flat(where, theta) for where, _ in self.parts])
        evaluated = self.run.function().outputs(theta, self.inputs, self.block)
        difference = float((trained - evaluated).abs().max())
        if difference > torch.finfo(self.dtype).eps ** 0.5 * float(1 + evaluated.abs().max()):
            raise InputError(
                f"In the modes of the flow the outputs of the training samples are others than in evaluation (by "
                f"{difference:.1e}), as with batch normalization in train mode",
                "An explanation is made of the tangent kernel of one function, and the flow trained another, in which "
                "samples of a batch may depend on each other",
                "Write `model.eval()` before the flow, or record a run: `KernelMachine(trajectory).explain(X)`",
            )

    def _proved_parts(self) -> list[tuple[slice, float]]:
        """Blocks whose weighted losses are L, as the losses of outputs drawn at random tell.

        Where samples are coupled, in the loss or in the network, or where that cannot be told, all are taken at once.
        """
        n, pieces = len(self), list(blocks(len(self), self.block))
        whole = [(slice(0, n), 1.0)]
        if len(pieces) == 1 or self._couples_samples(pieces[0]):
            return whole
        with self.function.evaluating(gradients=False):
            found = [self._outputs(self.initial, piece) for piece in pieces]
        if not all(isinstance(outputs, Tensor) for outputs in found):
            return whole
        outputs, generator = torch.cat(found), torch.Generator().manual_seed(0)
        sizes = torch.tensor([piece.stop - piece.start for piece in pieces], dtype=self.dtype)
        fitting = [sizes / n, torch.ones_like(sizes)]
        for scale in (0.0, 1.0, 10.0):  # a term of the loss may be 0 at the network's own outputs, and for small ones
            own_part = torch.randn(outputs.shape, generator=generator, dtype=torch.float64)
            common = torch.randn(outputs.shape[1:], generator=generator, dtype=torch.float64)
            tried = outputs + scale * (own_part + common).to(outputs)
            at_once = self._loss(tried, slice(0, n))
            own = torch.stack([self._loss(tried[piece], piece) for piece in pieces]).to(sizes)
            fitting = [w for w in fitting if (own @ w - at_once.to(sizes)).abs() <= ADDS_UP * (own.abs() @ w)]
        if not fitting:
            return whole
        return [(piece, float(w)) for piece, w in zip(pieces, fitting[0], strict=True)]

    def _couples_samples(self, piece: slice) -> bool:
        """Test that a sample's outputs depend on who else is in the batch, as under BatchNorm in train mode."""
        middle = piece.stop // 2
        if middle == 0:
            return False
        whole = self._flat(piece)
        halves = torch.cat([self._flat(slice(0, middle)), self._flat(slice(middle, piece.stop))])
        return bool((whole - halves).abs().max() > ADDS_UP * (1 + whole.abs().max()))

    def _flat(self, piece: slice, theta: Tensor | None = None) -> Tensor:
        """Outputs of some samples at θ(0), or elsewhere, (n, C)."""
        theta = self.initial if theta is None else theta
        with self.function.evaluating(gradients=False):
            return batch_outputs(self._outputs(theta, piece), piece.stop - piece.start)


def derivative(value: Tensor, leaf: Tensor, again: bool = False) -> Tensor:
    """∂value/∂leaf, zeros where it does not depend on it; ``again`` where it will be differentiated once more."""
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(value, leaf, create_graph=again, retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


def in_type(loss: Loss, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The loss with tensors that it holds (class weights) in the type of the arithmetic; a copy of a module."""
    return copy.deepcopy(loss).to(dtype).requires_grad_(False) if isinstance(loss, nn.Module) else loss
