r"""Doubts about the labels of the training samples, from what one recorded run did with them.

A network learns most samples from what they have in common with others, and a wrong label by heart: late, against all
the rest, and by gradients that nobody shares. Averages *along* the path see that where the network at its end, which
has learnt every label, does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.utils import _pytree as pytree
from tqdm.auto import tqdm

from pathkernel._typing import PyTree
from pathkernel.errors import InputError, check_choice, check_number, is_whole
from pathkernel.gradients.per_sample import OutputFunctional, values_of
from pathkernel.gradients.pytrees import count, memory_bytes, take
from pathkernel.gradients.sample_wise import check_sample_wise
from pathkernel.kernel_machine.classification import classes_of, is_classifier
from pathkernel.kernel_machine.kernel_machine import KernelMachine
from pathkernel.path_kernel.features import samples_of_path
from pathkernel.path_kernel.nodes import PathMeasure, PathNode, nodes_along, stretches
from pathkernel.quadrature import LeftEndpoint
from pathkernel.runtime.extras import require_extra
from pathkernel.runtime.threads import one_at_a_time
from pathkernel.tangent_kernel.engines.auto import AutomaticEngine, make_engine
from pathkernel.tangent_kernel.engines.engine import Diagonal, Engine
from pathkernel.tangent_kernel.engines.layerwise import LayerwiseEngine
from pathkernel.tangent_kernel.outputs import MarginOfOutputs, OutputStructure, select_outputs
from pathkernel.trajectory.required import required_path
from pathkernel.trajectory.schedule import PRECONDITIONED
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.trajectory.until import steps_taken

if TYPE_CHECKING:
    import pandas

WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"area_under_margin": 0.5, "self_influence": 0.5, "self_share": 0.0, "final_loss": 0.0}
)
"""Weights of the ranks in the combined one."""

INSTEAD = (
    "Take `pk.PathKernel(trajectory, outputs='loss').diagonal((X, y))`, the self-influence of samples with any targets"
)
"""What to write where neither a margin nor a residual is defined."""

NODES = 20
"""Points of the path at which margins and gradients are taken."""


@dataclass(frozen=True)
class LabelQuality:
    r"""Scores by which wrong labels stand out, for every training sample, and one rank of all of them.

    .. math:: \mathrm{score}_i = \sum_k w_k\, \frac{\mathrm{rank}_k(i) - \tfrac12}{N}

    with rank 1 for the least doubtful sample of each score, ties sharing their mean rank, and the ``weights`` w.

    Attributes
    ----------
    area_under_margin
        (N,) margin log p/(1 − p) of the label, averaged over the path; of a regression, minus the size of the residual,
        averaged likewise. Small where the label is doubtful.
    self_influence
        (N,) squared length of the gradient of the sample's own loss, averaged over the path: the diagonal of the loss
        path kernel. Large where the label is doubtful.
    self_share
        (N,) how much the sample moved its own loss; negative where it lowered it, and far below 0 where the label is
        doubtful. Exact for ``self_shares="every step"``, else estimated at the same points of the path.
    final_loss
        (N,) loss at the end of the path: what is known without a recording, for comparison.
    functional
        ``"margin"`` or ``"residual"``: what ``area_under_margin`` averages.
    targets, predictions
        (N, ...) targets, and classes (N,) or outputs (N, C) at the end of the path.
    steps
        After how many optimizer steps everything was measured.
    weights
        Weights w of the combined score.

    References
    ----------
    Pleiss et al. 2020 (2001.10528) for the area under the margin; Pruthi et al. 2020 (2002.08484), section 5.1, for
    self-influence, which is TracInCP's with every node a checkpoint.
    """

    area_under_margin: np.ndarray
    self_influence: np.ndarray
    self_share: np.ndarray
    final_loss: np.ndarray
    functional: str
    targets: np.ndarray
    predictions: np.ndarray
    steps: tuple[int, ...]
    weights: Mapping[str, float] = field(default_factory=lambda: WEIGHTS)

    def __len__(self) -> int:
        return len(self.final_loss)

    @property
    def doubts(self) -> dict[str, np.ndarray]:
        """The single scores by name, (N,) each, turned so that large ones are doubtful."""
        return {
            "area_under_margin": -self.area_under_margin,
            "self_influence": self.self_influence,
            "self_share": -self.self_share,
            "final_loss": self.final_loss,
        }

    @cached_property
    def score(self) -> np.ndarray:
        """(N,) the combined score, from 0 to 1: large where the label is doubtful."""
        parts = [self.weights[name] * (rankdata(values) - 0.5) for name, values in self.doubts.items()]
        return np.asarray(sum(parts) / (len(self) * sum(self.weights.values())))

    @cached_property
    def rank(self) -> np.ndarray:
        """(N,) place of each sample in the list that begins with the most doubtful label, from 0."""
        rank = np.empty(len(self), dtype=np.int64)
        rank[self.ids] = np.arange(len(self))
        return rank

    @cached_property
    def ids(self) -> np.ndarray:
        """(N,) ids of all samples, the most doubtful label first."""
        return np.argsort(-self.score, kind="stable")

    def top(self, k: int = 20) -> np.ndarray:
        """(k,) ids of the samples with the most doubtful labels, the most doubtful first.

        Raises
        ------
        InputError
            For other numbers than 1 … N.
        """
        if not (is_whole(k) and 1 <= k <= len(self)):
            raise InputError(
                f"`top({k!r})` was asked of {len(self)} training samples",
                f"k lies between 1 and {len(self)}",
                f"Write `top({min(20, len(self))})`",
            )
        return self.ids[:k]

    def to_frame(self) -> pandas.DataFrame:
        """One row for each training sample, the most doubtful label first.

        Columns ``sample, score, area_under_margin, self_influence, self_share, final_loss``, and ``label`` and
        ``prediction`` where these are single numbers.
        """
        require_extra("pandas", "`to_frame`", "pandas")
        import pandas

        columns = {"sample": np.arange(len(self)), "score": self.score}
        columns |= {name: getattr(self, name) for name in self.doubts}
        for name, values in (("label", self.targets), ("prediction", self.predictions)):
            if values.ndim == 1:
                columns[name] = values
        return pandas.DataFrame(columns).iloc[self.ids].reset_index(drop=True)

    def __repr__(self) -> str:
        first = ", ".join(map(str, self.ids[:5]))
        return (
            f"LabelQuality({len(self)} training samples at {len(self.steps)} points of the path; most doubtful labels: "
            f"{first}{' …' if len(self) > 5 else ''})"
        )


def label_quality(
    trajectory: Trajectory,
    *,
    nodes: int = NODES,
    self_shares: str = "nodes",
    memory: int | str = "1GB",
    progress: bool = False,
) -> LabelQuality:
    r"""Scores by which wrong labels stand out, of every training sample of a recorded run.

    Parameters
    ----------
    trajectory
        The recorded path, thinned or whole.
    nodes
        At how many points of the path everything is measured: the path is cut into so many stretches of as many steps
        each (to one), and each is represented by the start of its middle step.
    self_shares
        ``"nodes"`` (default) estimates from these points how much each sample moved its own loss,
        :math:`-\frac1N \sum_s \eta_s \langle D_s \nabla \ell_i, \nabla \ell_i\rangle` with the learning rates η and the
        positive diagonal D by which the optimizer scaled the gradient of a step in that step: as if every sample came
        as often as any other, the loss of a batch were a mean, and momentum did nothing later. ``"every step"`` takes
        the exact ones, `pathkernel.KernelMachine.self_shares`.
    memory
        Budget for what is held at once beside inputs and result, as bytes or text.
    progress
        Show a progress bar.

    Returns
    -------
    LabelQuality

    Raises
    ------
    InputError
        Where a loss is smallest neither where outputs equal targets nor for large margins of labels; and where there
        is no loss, or are no targets, to judge: the network returns its loss itself, samples are known from
        the batches on record alone, or a sample has several labels.

    Notes
    -----
    Costs, for T nodes: ``area_under_margin`` T forward passes of all samples, ``self_influence`` T forward and backward
    passes, ``self_share`` estimated nothing more where the optimizer does not scale its gradients, and otherwise T
    passes again; ``final_loss`` a forward pass. Training took S B / N such passes, in small batches. Where steps are
    trained again when they are read (`Keyframes`), that is added, once. Memory O(N). Exact self-shares: see there.

    The weights of the combined score are equal for the two averages along the path that see different things, the
    outputs of a sample and its gradients, and zero for the rest: the estimated self-share says what the self-influence
    says in the optimizer's metric, and the loss at the end says nothing more once labels are learnt by heart. They were
    compared with others on data and seeds of their own, which `benchmarks/labels.py --choose` prints; the same script
    judges them on digits.

    Examples
    --------
    >>> import torch, pathkernel as pk
    >>> generator = torch.Generator().manual_seed(0)
    >>> X = torch.randn(60, 4, generator=generator)
    >>> y = (X[:, 0] > 0).long()
    >>> y[3] = 1 - y[3]  # a wrong label
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    >>> optimizer, loss = torch.optim.Adam(model.parameters(), lr=0.05), torch.nn.CrossEntropyLoss()
    >>> with pk.KernelRecorder(model, optimizer, loss, data=(X, y)) as recorder:
    ...     for epoch in range(10):
    ...         for x, target in recorder.batches(batch_size=10):
    ...             optimizer.zero_grad()
    ...             loss(model(x), target).backward()
    ...             optimizer.step()
    >>> int(pk.label_quality(recorder.trajectory).top(1)[0])
    3
    """
    check_choice("self_shares", self_shares, ("nodes", "every step"), "Ways to take self-shares")
    check_number("nodes", nodes, positive=True, whole=True, example=NODES)
    required_path(trajectory, "PathKernel")
    found = _Measurement(trajectory, nodes, memory_bytes(memory), progress).result()
    if self_shares == "every step":
        found["self_share"] = KernelMachine(trajectory, memory=memory, progress=progress).self_shares()
    return LabelQuality(**found)


class _Measurement:
    """Everything that is measured on the training samples along a path.

    Parameters
    ----------
    trajectory, nodes, memory, progress
        As of `label_quality`.
    """

    def __init__(self, trajectory: Trajectory, nodes: int, memory: int, progress: bool) -> None:
        self.trajectory, self.count, self.memory, self.progress = trajectory, nodes, memory, progress
        self.lock = trajectory.lock

    def _prepare(self) -> None:
        """Samples, functions of their outputs, and points of the path."""
        trajectory, objective = self.trajectory, self.trajectory.objective
        loss = objective.function("`label_quality`")
        self.function = trajectory.function()
        selection = select_outputs("loss", loss, objective.reduction)
        everything, dtype = trajectory.data.everything(), self.function.dtype
        self.inputs, self.targets = samples_of_path(trajectory, everything, selection, dtype, "label_quality")
        check_sample_wise(self.function, trajectory.initial, self.inputs)
        self.loss: OutputFunctional = selection.function
        self.engine = make_engine("auto", self.function, selection, self.memory)
        assert selection.structure is not None and isinstance(self.engine, AutomaticEngine)
        self.functional, self.kind = self._functional(selection.structure)
        # Where no layer accounts for a parameter, rows of whole gradients are taken.
        self.by_layers = not self.engine.covers_none(trajectory.initial, self.inputs)
        self.nodes = self._along("uniform")
        settings = trajectory.store.summary(0).record.hyperparameters
        rates = "learning_rate" if all("lr" in own for own in settings) else "uniform"
        self.rates = {node.position: node.weight for node in self._along(rates)}
        scaled = trajectory.rule.elementwise and PRECONDITIONED in trajectory.schedule.serves
        self.metric = PathMeasure(trajectory, rates, "optimizer" if scaled else None)

    def _along(self, measure: str) -> list[PathNode]:
        """One node for each stretch of the path; none for those without a weight."""
        cut = stretches(len(self.trajectory), self.count)
        try:
            return list(nodes_along(PathMeasure(self.trajectory, measure), LeftEndpoint(), cut))
        except InputError:  # learning rates of 0 throughout
            return []

    def _functional(self, structure: OutputStructure) -> tuple[OutputFunctional, str]:
        """What is averaged along the path, and its name."""
        if is_classifier(self.trajectory):
            return self._margin(structure), "margin"
        (c,) = self.function.outputs(self.trajectory.initial, take(self.inputs, slice(0, 1))).shape[1:]
        targets, n = pytree.tree_leaves(self.targets), count(self.inputs)
        if len(targets) != 1 or not targets[0].is_floating_point() or targets[0].numel() != n * c:
            raise InputError(
                f"`label_quality` was given targets of shape {', '.join(str(tuple(t.shape)) for t in targets)} for "
                f"outputs of shape {(n, c)}",
                "A sample of a regression has a target for each output, and one of a classification a single label",
                INSTEAD,
            )
        y = targets[0].reshape(n, c).to(self.function.dtype)
        if self._is_distance(y):
            return _residual, "residual"
        # A loss that the user wrote, of logits and labels as numbers, is one of classes all the same.
        sides = 2 * y - 1
        if c == 1 and bool(((y == 0) | (y == 1)).all()) and self._rises(sides, -sides):
            return self._margin(structure), "margin"
        raise InputError(
            "`label_quality` was given a loss that is not smallest where outputs equal targets, and no class labels",
            "Doubtful are small margins of labels, or large residuals of a regression",
            INSTEAD,
        )

    def _margin(self, structure: OutputStructure) -> OutputFunctional:
        """The margin of a sample's label, which the targets have to be."""
        margin = select_outputs("margin")
        assert isinstance(margin.function, MarginOfOutputs)
        margin.function.structure.returned = structure.returned
        try:
            margin.function.check(self.targets)
        except InputError as refusal:
            raise InputError(refusal.found, refusal.expected, INSTEAD) from None
        return margin.function

    def _is_distance(self, y: Tensor) -> bool:
        """Test that the loss of every sample rises on both sides of its target, (N, C), or on neither (weight 0)."""
        step = 1 + y.abs()
        at, above, below = (self._values(self.loss, z) for z in (y, y + step, y - step))
        return bool(((above > at) == (below > at)).all() and ((above >= at) & (below >= at)).all())

    def _rises(self, start: Tensor, end: Tensor) -> bool:
        """Test that the loss of every sample is larger for the second outputs (N, C)."""
        return bool((self._values(self.loss, end) > self._values(self.loss, start)).all())

    @one_at_a_time
    def result(self) -> dict[str, Any]:
        """The attributes of a `LabelQuality`."""
        self._prepare()
        n = len(self.trajectory.data)
        area, influence, share = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
        total = sum(node.weight for node in self.nodes)
        for node in tqdm(self.nodes, desc="label quality", unit="node", disable=not self.progress):
            step, theta = node.step, node.theta
            metric = self.metric.preconditioner_of(step)
            z, (squared, *scaled) = self._measured(
                self.engine.at(node), theta, [None] if metric is None else [None, metric]
            )
            area += self._values(self.functional, z) * (node.weight / total)
            influence += squared * (node.weight / total)
            share -= (scaled[0] if scaled else squared) * (self.rates.get(node.position, 0.0) / n)
        taken = steps_taken(self.trajectory.store)
        trained = self.function.with_(constants=self.trajectory.final_buffers)
        z = trained.outputs(self.trajectory.final, self.inputs)
        targets, classes = pytree.tree_leaves(self.targets)[0], self.kind == "margin"
        return {
            "area_under_margin": area.numpy(),
            "self_influence": influence.numpy(),
            "self_share": share.numpy(),
            "final_loss": self._values(self.loss, z).numpy(),
            "functional": self.kind,
            "targets": _flat(targets).cpu().numpy(),
            "predictions": (classes_of(z) if classes else _flat(z)).cpu().numpy(),
            "steps": tuple(taken[node.position] for node in self.nodes),
        }

    def _measured(self, engine: Engine, theta: Tensor, metrics: list[Diagonal]) -> tuple[Tensor, list[Tensor]]:
        """Outputs (N, C) at θ, and the squared length of the gradient of each loss under each metric, (N,)."""
        samples = self.inputs, self.targets
        if isinstance(engine, LayerwiseEngine) and self.by_layers:
            z, found = engine.outputs_and_diagonals(theta, *samples, metrics, squares=True)
        else:
            z = engine.function.outputs(theta, self.inputs)
            found = [engine.diagonal(theta, *samples, metric) for metric in metrics]
        return z, [squared.cpu() for squared in found]

    def _values(self, functional: OutputFunctional, z: Tensor) -> Tensor:
        """(N,) float64 of outputs and targets."""
        return values_of(functional, z, self.function.cast(self.targets)).reshape(-1).double().cpu()


def _residual(z: Tensor, target: PyTree) -> Tensor:
    """−‖z − y‖ of one sample."""
    (y,) = pytree.tree_leaves(target)
    return -(z - y.reshape(-1).to(z)).norm()


def _flat(values: Tensor) -> Tensor:
    """One number for each sample as a vector."""
    return values[:, 0] if values.dim() == 2 and values.shape[1] == 1 else values
