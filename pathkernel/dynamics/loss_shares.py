r"""The training loss as a sum over samples, modules and steps: what each did to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pathkernel._typing import PyTree
from pathkernel.dynamics.training_loss import ADDS_UP, TrainingLoss
from pathkernel.errors import InputError
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.trajectory.trajectory import Trajectory


@dataclass(frozen=True)
class LossLedger:
    r"""Change of the training loss over a run as an exact sum.

    .. math:: L(\theta_S) - L(\theta_0) = \sum_i \mathrm{samples}_i + \sum_{\text{channels}}
              = \sum_m \mathrm{modules}_m + \sum_{\text{channels}} = \sum_s \mathrm{steps}_s + \sum_{\text{channels}}

    A negative number lowered the loss.

    Attributes
    ----------
    start, end
        L(θ_0) and L(θ_S), by forward passes of all samples.
    samples
        What each training sample did to it, (N,).
    modules
        What all samples did to it through the parameters of each module.
    steps
        What all samples of each step did to it, with all that came of them later through momentum, (S,).
    channels
        What came of no sample, by name; see `pathkernel.Attributions`.
    table
        (N, modules) float64: samples by modules, in the order of ``modules``.
    """

    start: float
    end: float
    samples: np.ndarray
    modules: dict[str, float]
    steps: np.ndarray
    channels: dict[str, float]
    table: np.ndarray

    @property
    def change(self) -> float:
        """L(θ_S) − L(θ_0)."""
        return self.end - self.start

    @property
    def residual(self) -> float:
        """The largest that any of the three sums misses of the change, relative to it."""
        channels = sum(self.channels.values())
        sums = (self.samples.sum(), sum(self.modules.values()), self.steps.sum())
        missed = max(abs(self.change - channels - float(total)) for total in sums)
        return missed / max(abs(self.change), np.finfo(float).tiny)

    def __repr__(self) -> str:
        lowered = int((self.samples < 0).sum())
        return (
            f"LossLedger({self.start:.4g} to {self.end:.4g}: {lowered} of {len(self.samples)} samples lowered it, "
            f"{len(self.modules)} modules, {len(self.steps)} steps, residual {self.residual:.1e})"
        )


def loss_ledger(trajectory: Trajectory, *, memory: int | str = "1GB", progress: bool = False) -> LossLedger:
    """Ledger of the training loss of a recorded run, whatever its optimizer.

    The shares of all training samples in each sample's own loss, which `pathkernel.KernelMachine` computes exactly, are
    added up over these losses.

    Parameters
    ----------
    trajectory
        The run, every step of it, with data as arrays or a dataset of pairs.
    memory, progress
        As for `pathkernel.KernelMachine`.

    Returns
    -------
    LossLedger
        Of the loss of all training samples, in evaluation mode.

    Raises
    ------
    InputError
        For a loss that is neither the mean nor the sum of what it makes of each sample alone.

    Notes
    -----
    As many queries as training samples, twice: time O(N²S) in the number of samples and steps for full batches.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> _ = torch.manual_seed(0)
    >>> X, y = torch.randn(16, 4), torch.randn(16, 1)
    >>> model, loss = torch.nn.Linear(4, 1), torch.nn.MSELoss()
    >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for x, target in recorder.batches(batch_size=4):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> ledger = pk.dynamics.loss_ledger(recorder.trajectory)
    >>> bool(abs(ledger.samples.sum() + sum(ledger.channels.values()) - ledger.change) < 1e-5)
    True
    """
    machine = KernelMachine(trajectory, memory=memory, progress=progress)
    data = trajectory.data.everything()
    by_module = machine.explain(data, outputs="loss", by="module")
    by_step = machine.explain(data, outputs="loss", by="step")
    weight, start, end = _weight(trajectory, data, by_module)
    modules = {name: weight * own.sum(axis=0) for name, own in by_module.modules.items()}
    assert by_step.steps is not None
    return LossLedger(
        start=start,
        end=end,
        samples=weight * by_module.shares.sum(axis=0),
        modules={name: float(own.sum()) for name, own in modules.items()},
        steps=weight * by_step.steps.sum(axis=0),
        channels={k: weight * float(own.sum()) for k, own in by_module.channels.items() if k != "initial"},
        table=np.stack(list(modules.values()), axis=1),
    )


def _weight(trajectory: Trajectory, data: tuple[PyTree, PyTree], why: Attributions) -> tuple[float, float, float]:
    """Weight of the losses of single samples in L, and L at both ends."""
    function = trajectory.function()
    before = TrainingLoss(trajectory.run, function, *data).in_blocks()
    final = function.with_(constants=trajectory.final_buffers)
    after = TrainingLoss(trajectory.run, final, before.inputs, before.targets).in_blocks()
    start, end = float(before.value(trajectory.initial)), float(after.value(trajectory.final))
    close = max(ADDS_UP, 100 * torch.finfo(function.dtype).eps)
    for weight in (1 / len(trajectory.data), 1.0):
        sums = weight * why.initial.sum(), weight * why.output.sum()
        if np.allclose(sums, (start, end), rtol=close, atol=close * abs(start)):
            return weight, start, end
    raise InputError(
        "A loss ledger was asked of a loss that is not the mean, nor the sum, of what it makes of each sample alone",
        'Shares are taken in the losses of single samples: class weights with `reduction="mean"`, and losses that '
        "compare samples, are no sums of these",
        'Write the loss with `reduction="sum"`, or explain single losses: `machine.explain((X, y), outputs="loss")`',
    )
