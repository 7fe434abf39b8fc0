"""Kernel regime: how far parameters and tangent kernel go from where they began, along one training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pathkernel._typing import PyTree
from pathkernel.analysis.alignment import target_alignment
from pathkernel.analysis.spectrum import effective_rank
from pathkernel.analysis.velocity import kernel_distance, kernel_velocity
from pathkernel.errors import InputError, is_whole
from pathkernel.gradients.pytrees import count, spread
from pathkernel.gradients.sample_wise import check_sample_wise
from pathkernel.runtime.extras import require_extra
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.tangent_kernel.engines.auto import make_engine
from pathkernel.tangent_kernel.outputs import select_outputs
from pathkernel.trajectory.required import required_path
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.trajectory.until import steps_taken

if TYPE_CHECKING:
    import pandas

SAMPLES = 200
"""Training samples on which kernels are compared where none are given."""


@dataclass(frozen=True)
class KernelRegime:
    r"""Distances of a training run from its linearisation at the start, at T moments.

    A network in the kernel regime learns while its tangent kernel stays where it was; one that learns features turns it
    towards the task, fast at first.

    Attributes
    ----------
    steps
        (T,) after how many optimizer steps.
    parameter_distance
        (T,) :math:`\lVert\theta_s - \theta_0\rVert / \lVert\theta_0\rVert`.
    kernel_distance
        (T,) 1 − cosine of the angle between the kernel and the first, `pathkernel.analysis.kernel_distance`.
    kernel_change
        (T,) :math:`\lVert K_s - K_0\rVert_F / \lVert K_0\rVert_F`, which its growth counts in.
    velocity
        (T − 1,) kernel distance from one moment to the next, per step: `pathkernel.analysis.kernel_velocity`.
    alignment
        (T,) centred alignment with the kernel of the targets, or None without targets.
    effective_rank
        (T,) `pathkernel.analysis.effective_rank`.
    """

    steps: np.ndarray
    parameter_distance: np.ndarray
    kernel_distance: np.ndarray
    kernel_change: np.ndarray
    velocity: np.ndarray
    alignment: np.ndarray | None
    effective_rank: np.ndarray

    def to_frame(self) -> pandas.DataFrame:
        """One row for each moment; ``velocity`` is that towards it, NaN at the first."""
        require_extra("pandas", "`to_frame`", "pandas")
        import pandas

        columns = {
            "step": self.steps,
            "parameter_distance": self.parameter_distance,
            "kernel_distance": self.kernel_distance,
            "kernel_change": self.kernel_change,
            "velocity": np.concatenate([[np.nan], self.velocity]),
            "effective_rank": self.effective_rank,
        }
        if self.alignment is not None:
            columns["alignment"] = self.alignment
        return pandas.DataFrame(columns)


@dataclass(frozen=True)
class _Moment:
    """A point of the path as an engine sees it; see `pathkernel.tangent_kernel.engines.engine.Node`."""

    buffers: Mapping[str, Tensor]
    number: int


def kernel_regime(
    trajectory: Trajectory,
    X: PyTree | None = None,
    y: np.ndarray | None = None,
    *,
    moments: int = 11,
    memory: int | str = "1GB",
) -> KernelRegime:
    """Distances of parameters and tangent kernel from the start, velocity, alignment and rank, along a recorded run.

    Parameters
    ----------
    trajectory
        The recorded path, thinned or whole.
    X, y
        n samples to compare kernels on, and their targets, as `pathkernel.analysis.target_kernel` takes them; by
        default up to 200 of the training samples with theirs.
    moments
        How many moments T, from the untrained network to the last step, evenly: at least 2.
    memory
        Budget for what is held at once beside samples and kernels.

    Returns
    -------
    KernelRegime

    Raises
    ------
    InputError
        For fewer moments than 2; for X without samples.

    Notes
    -----
    Time: T tangent kernels (n, n), all outputs, and their eigenvalues. Memory O(n²).

    References
    ----------
    Fort et al. 2020 (2010.15110); Baratin et al. 2021 (2008.00938); Chizat, Oyallon and Bach 2019 (1812.07956).

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> X, y = torch.randn(32, 4), torch.arange(32) % 2
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> optimizer, loss = torch.optim.Adam(model.parameters()), torch.nn.CrossEntropyLoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for x, target in recorder.batches(batch_size=8):
    ...         optimizer.zero_grad()
    ...         loss(model(x), target).backward()
    ...         optimizer.step()
    >>> regime = pk.analysis.kernel_regime(recorder.trajectory, moments=3)
    >>> regime.steps.tolist(), float(regime.kernel_distance[0])
    ([0, 2, 4], 0.0)
    """
    if not (is_whole(moments) and moments >= 2):
        raise InputError(
            f"`moments={moments!r}` was given",
            "A distance is from one moment to another: there are 2 or more",
            "Write `moments=11`",
        )
    required_path(trajectory, "PathKernel")
    if X is None:
        X, targets = trajectory.data[spread(len(trajectory.data), SAMPLES)]
        y = targets.cpu().numpy() if y is None and isinstance(targets, Tensor) else y
    inputs = trajectory.queries(X, "kernel_regime")
    if not count(inputs):
        raise InputError(
            "`kernel_regime` was given no samples",
            "Kernels are compared on samples: a few dozen tell much",
            "Leave `X` out for training samples",
        )
    return _Run(trajectory, inputs, memory).at(_moments(trajectory, moments), y)


def _moments(trajectory: Trajectory, moments: int) -> list[int]:
    """Evenly spread points of the path, as they are counted in the record."""
    found = np.linspace(0, len(trajectory), min(moments, len(trajectory) + 1)).round().astype(int)
    return [int(s) for s in found]


class _Run:
    """Tangent kernels of some samples along a path."""

    def __init__(self, trajectory: Trajectory, inputs: PyTree, memory: int | str) -> None:
        self.trajectory, self.inputs, self.lock = trajectory, inputs, trajectory.lock
        function = trajectory.function()
        check_sample_wise(function, trajectory.initial, inputs)
        self.engine = make_engine("auto", function, select_outputs("trace"), memory)

    def kernel(self, s: int) -> np.ndarray:
        """K at the start of step s, or at the end, float64 (n, n)."""
        last = s == len(self.trajectory)
        buffers = self.trajectory.final_buffers if last else self.trajectory.store.read(s).buffers
        context = torch.zeros(count(self.inputs), 0)
        found = self.engine.at(_Moment(buffers, s)).gram(
            self.trajectory.vector(s), self.inputs, None, context, None, None
        )
        return found.cpu().numpy()

    @one_at_a_time
    def at(self, moments: list[int], y: np.ndarray | None) -> KernelRegime:
        """Everything at some moments of the path; one kernel beside the first and the one before is held."""
        trajectory, start = self.trajectory, self.trajectory.vector(0).double()
        first = before = self.kernel(0)
        rows, velocities = [], []
        taken = steps_taken(trajectory.store)
        counted = [taken[s] for s in moments]
        for place, s in enumerate(moments):
            K = self.kernel(s) if place else first
            moved = (trajectory.vector(s).double() - start).norm() / start.norm()
            change = np.linalg.norm(K - first) / np.linalg.norm(first)
            aligned = np.nan if y is None else target_alignment(K, y)
            rows.append((float(moved), kernel_distance(K, first), float(change), aligned, effective_rank(K)))
            if place:
                velocities.append(kernel_velocity([before, K], counted[place - 1 : place + 1])[0])
            before = K
        parameters, distances, changes, alignments, ranks = map(np.array, zip(*rows, strict=True))
        return KernelRegime(
            np.array(counted),
            parameters,
            distances,
            changes,
            np.array(velocities),
            None if y is None else alignments,
            ranks,
        )
