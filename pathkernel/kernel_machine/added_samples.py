r"""What further steps on new samples would do to a trained network, to first order, without training it.

At the end of training the network is replaced by its first-order expansion, so that outputs move by tangent kernels at
θ_S alone. k steps of the same optimizer on new samples, from the state that it has, then are

.. math:: z_s = z_0 + J\,(\theta_s - \theta_S),\quad \lambda_s = \frac{\partial L}{\partial z}(z_s),\quad
          g_s = J^\top \lambda_s,\quad
          f_{S+k}(x) \approx f_S(x) + \sum_{s < k} \sum_j \nabla f(x)\, A_{k,s}\, J_j^\top \lambda_{s,j} + \ldots

with the rows J_j = ∂z_j/∂θ at θ_S: :math:`\nabla f\, A\, J_j^\top` is the tangent kernel of x and new sample j,
preconditioned as the optimizer does it. What this leaves out is measured by one forward pass at the θ that it predicts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.errors import CertificateWarning, InputError, check_number
from pathkernel.gradients.acceptance import named_rows, not_finite
from pathkernel.gradients.losses import batch_products
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.gradients.pytrees import as_tensors, check_rows, count
from pathkernel.gradients.targets import check_as_in_training
from pathkernel.kernel_machine.classification import predictions
from pathkernel.kernel_machine.linear_steps import LinearStep, linear_steps, pull_back
from pathkernel.kernel_machine.queries import Queries
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.update_rules.rule import Memory

if TYPE_CHECKING:
    from pathkernel.kernel_machine.kernel_machine import KernelMachine

REMAINDER = 0.3
"""Part of the predicted change, and of the largest gradient, that may lie beyond first order without a warning. Chosen:
ranks of really continued steps that fell below .9 had more than .305 (`benchmarks/added_samples.py`)."""


@dataclass(frozen=True)
class AddedShares:
    """By how much each new sample would move each query output.

    Attributes
    ----------
    shares
        (Q, n): of each new sample.
    channels
        (Q,) each: what is no new sample's, ``"memory"`` (momentum and moments that the optimizer has from the recorded
        training), ``"weight_decay"``, regularisers. Shares and channels add up to ``change``.
    output
        (Q,) f_S, before.
    change
        (Q,) predicted f_{S+k} − f_S, to first order.
    remainder
        (Q,) f at the predicted θ, less the prediction: what is beyond first order there, in the units of f.
    """

    shares: np.ndarray
    channels: dict[str, np.ndarray]
    output: np.ndarray
    change: np.ndarray
    remainder: np.ndarray


class AddedSamples:
    """Network after k further steps on new samples, to first order; made by `KernelMachine.add_samples`.

    Attributes
    ----------
    steps
        k.
    displacement
        (P,) float64, predicted θ_{S+k} − θ_S.
    gradient_error
        By how much the gradient of the new samples at the predicted θ_{S+k} is another one than that of the expansion,
        relative to the largest of the steps: what curvature would have changed in the displacement itself, where
        `remainder` is what it changes in the outputs there.
    """

    def __init__(
        self,
        machine: KernelMachine,
        function: ModelFunction,
        inputs: PyTree,
        taken: tuple[LinearStep, ...],
        memory: Mapping[str, Memory],
        gradient_error: float,
    ) -> None:
        self._machine = machine
        self._function = function
        self._inputs = inputs
        self._taken = taken
        self._memory = memory
        self.gradient_error = gradient_error
        self._theta = machine.trajectory.end_of_steps
        self.steps = len(taken)
        self.displacement = taken[-1].record.after - self._theta.double()

    @property
    def lock(self) -> Any:
        """Held by one thread at a time."""
        return self._machine.lock

    @one_at_a_time
    def decision_function(self, X: PyTree) -> np.ndarray:
        """Predicted outputs after the steps.

        Parameters
        ----------
        X
            n samples.

        Returns
        -------
        numpy.ndarray
            float64 (n, C), or (n,) for a network with one output.

        Warns
        -----
        CertificateWarning
            Where more than 0.3 of the change, or of the gradient, lies beyond first order; see `remainder`.
        """
        queries = self._machine._selection.every_output(X).under(self._machine.trajectory.final_buffers)
        output, change, remainder = self._change(queries)
        self._warn(change, remainder)
        found = (output + change).reshape(-1, queries.components)
        return found[:, 0] if queries.components == 1 else found

    def predict(self, X: PyTree) -> np.ndarray:
        """Class indices (n,) for classifiers; outputs for regressors; see `decision_function`."""
        return predictions(self._machine.trajectory, self.decision_function(X))

    @one_at_a_time
    def remainder(self, X: PyTree) -> float:
        r"""Part of the predicted change of all outputs that lies beyond first order.

        .. math:: \frac{\lVert f(\theta_S + d) - f(\theta_S) - J d\rVert}{\lVert J d \rVert}

        at the displacement d that was predicted: 0 for a network that is linear in θ. It is measured by one forward
        pass; what curvature would have changed in d itself, ``gradient_error`` tells.

        Parameters
        ----------
        X
            n samples.
        """
        queries = self._machine._selection.every_output(X).under(self._machine.trajectory.final_buffers)
        _, change, remainder = self._change(queries)
        return _relative(change, remainder)

    @one_at_a_time
    def explain(self, X: PyTree, outputs: Any = None) -> AddedShares:
        """By how much each new sample would move each query output.

        Parameters
        ----------
        X, outputs
            As for `KernelMachine.explain`.

        Returns
        -------
        AddedShares
            Shares (Q, n), channels, and the remainder.

        Warns
        -----
        CertificateWarning
            As `decision_function` does.

        Notes
        -----
        Time: for each step and query a forward-mode pass of the new samples. Memory: Q vectors of the size of θ, and as
        many for each slot of the optimizer's memory.
        """
        trajectory, layout = self._machine.trajectory, self._function.layout
        queries = self._machine._selection.select(X, outputs)[0].under(trajectory.final_buffers)
        output, change, remainder = self._change(queries)
        self._warn(change, remainder)
        weights = self._gradients(queries)
        shares = torch.zeros(len(weights), count(self._inputs), dtype=torch.float64)
        channels: dict[str, Tensor] = {}
        memory: dict[str, Memory] = {}
        for step in reversed(self._taken):
            pulled, terms = pull_back(step, trajectory.rule, layout, weights, memory)
            products = batch_products(self._function, self._theta, self._inputs, pulled)
            shares += torch.einsum("qnc,nc->qn", products.cpu(), step.slopes.double().cpu())
            for name, term in terms.items():
                channels[name] = channels.get(name, 0) + term.cpu()
        parts = [
            (weight.flatten(1) @ slot.flatten().to(weight)).cpu()
            for name, own in self._memory.items()
            for weight, slot in zip(memory.get(name, ()), own, strict=bool(memory.get(name)))
        ]
        if parts:
            channels["memory"] = torch.stack(parts).sum(dim=0)
        return AddedShares(
            shares.numpy(), {name: term.numpy() for name, term in channels.items()}, output, change, remainder
        )

    def _change(self, queries: Queries) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """f_S, the predicted change, and what is beyond first order at the predicted θ, (Q,) each."""
        before = queries.values(self._theta)
        there = queries.values((self._theta.double() + self.displacement).to(self._function.dtype))
        change = self._gradients(queries) @ self.displacement
        return before.cpu().numpy(), change.cpu().numpy(), (there - before - change).cpu().numpy()

    def _warn(self, change: np.ndarray, remainder: np.ndarray) -> None:
        outputs, gradient = _relative(change, remainder), self.gradient_error
        if max(outputs, gradient) > REMAINDER:
            warnings.warn(
                CertificateWarning(
                    f"After {self.steps} steps on the new samples, {outputs:.2f} of the change of the outputs and "
                    f"{gradient:.2f} of the gradient lie beyond first order",
                    f"Up to {REMAINDER} the network moves about as its expansion at the end of training says",
                    "Take fewer steps or a smaller `learning_rate`, or train on these samples",
                ),
                stacklevel=4,
            )

    def _gradients(self, queries: Queries) -> Tensor:
        """∇h at θ_S, (Q, P) float64."""
        rows = torch.empty(len(queries), self._function.layout.size, dtype=torch.float64, device=self._function.device)
        return queries.gradients(self._theta).rows(rows)

    def __repr__(self) -> str:
        return (
            f"AddedSamples({count(self._inputs)} new samples, {self.steps} steps of "
            f"{self._machine.trajectory.rule.name}, to first order at the end of training)"
        )


def add_samples(
    machine: KernelMachine,
    X: PyTree,
    y: PyTree,
    steps: int = 1,
    learning_rate: float | None = None,
) -> AddedSamples:
    """What further steps of the same optimizer on new labelled samples would do to the network, without training it.

    Every step takes all new samples as one batch, with the settings of the last recorded step and the optimizer's state
    after it. The network is replaced by its first-order expansion at θ_S, in eval mode: outputs move by its tangent
    kernel there, and momentum, moments and preconditioner go on as the optimizer has them.

    Parameters
    ----------
    X, y
        n new samples and their targets, as in training.
    steps
        k, how many optimizer steps.
    learning_rate
        Of these steps, in all parameter groups; that of the last recorded step by default.

    Returns
    -------
    AddedSamples
        ``decision_function``, ``predict``, ``explain`` (the new samples' shares) and ``remainder`` (how much lies
        beyond first order) of any queries.

    Raises
    ------
    InputError
        For samples of another form, no steps, and a recording without a loss.
    TrajectoryError
        Where the optimizer's state at the end of training is not on record: without keyframes it is found for SGD, Adam
        and AdamW; and for a network that returns more than one tensor.

    Warns
    -----
    CertificateWarning
        Where the network trains on other outputs than it has in evaluation, as with batch normalization and dropout.

    Notes
    -----
    Time: for each step a forward and a reverse sweep of the new samples at θ_S, about as much as training on them once;
    it leaves the network alone, says what each new sample does, and how far to believe it: with many steps, large
    rates, or labels that contradict the network, the remainder grows to the size of the change.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(32, 4), torch.randint(2, (32,))
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> optimizer, loss = torch.optim.AdamW(model.parameters()), torch.nn.CrossEntropyLoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for x, target in recorder.batches(batch_size=8):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> machine = pk.KernelMachine(recorder.trajectory)
    >>> grown = machine.add_samples(torch.randn(4, 4), torch.tensor([0, 1, 1, 0]), steps=3)
    >>> grown.decision_function(X[:5]).shape, grown.explain(X[:5]).shares.shape
    ((5, 2), (5, 4))

    References
    ----------
    Lee et al. 2019, "Wide neural networks of any depth evolve as linear models" (1902.06720), for the expansion.
    """
    trajectory = machine.trajectory
    check_number("steps", steps, positive=True, whole=True)
    if learning_rate is not None:
        check_number("learning_rate", learning_rate, example=0.1)
    if machine.average is not None:
        raise InputError(
            f"Samples were to be added to the average {machine.average!r}",
            "Further steps go on from the weights of the last one, not from an average of them",
            "Write `KernelMachine(trajectory)` without `average`",
        )
    trajectory.objective.function("`add_samples`")
    inputs, targets = machine._selection._samples(X, machine.function), as_tensors(y, trajectory.data.dtype)
    check_rows((inputs, targets), "add_samples")
    if len(rows := not_finite(targets)):
        raise named_rows("add_samples", list(rows), "targets")
    check_as_in_training(targets, trajectory.data.example[1], "add_samples")
    function = machine.function.with_(constants=trajectory.final_buffers)
    with machine.lock:
        taken, memory, error = linear_steps(trajectory, function, inputs, targets, steps, learning_rate)
    return AddedSamples(machine, function, inputs, taken, memory, error)


def _relative(change: np.ndarray, remainder: np.ndarray) -> float:
    size = float(np.linalg.norm(change))
    return float(np.linalg.norm(remainder)) / size if size else 0.0
