"""Attributions of pathkernel: scores of training samples for queries, and suspicions that labels are wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _attribution_training import TORCH, Case
from torch import Tensor, nn

import pathkernel as pk
from pathkernel.influence.checkpoint_scores import influence_function_scores, tracin_scores, trak_scores

NODES = 20
"""Points of the path at which kernels are taken."""

CHECKPOINTS = 15
"""Checkpoints of TracInCP: one an epoch of the full benchmark."""

LOSS = nn.CrossEntropyLoss()


@dataclass(frozen=True)
class Trained:
    """A recorded run.

    Attributes
    ----------
    checkpoints
        State of the network along the path, for methods that take several.
    others
        Networks of other seeds, trained as the first; for ensembles.
    """

    case: Case
    model: nn.Module
    trajectory: pk.Trajectory
    checkpoints: Sequence[dict[str, Tensor]]
    others: Callable[[int], list[dict[str, Tensor]]]

    @property
    def samples(self) -> tuple[Tensor, Tensor]:
        return self.case.X, self.case.y

    @property
    def queries(self) -> tuple[Tensor, Tensor]:
        return self.case.X_query, self.case.y_query


Method = Callable[[Trained], Any]


def run(case: Case, recorded: bool) -> tuple[nn.Module, pk.Trajectory | None]:
    """Train the network of a case, as its user does."""
    model = case.network(case.seed)
    optimizer = TORCH[case.optimizer](model.parameters(), **case.settings)
    if not recorded:
        for ids in case.batches(case.seed):
            optimizer.zero_grad()
            LOSS(model(case.X[ids]), case.y[ids]).backward()
            optimizer.step()
        return model, None
    with pk.KernelRecorder(model, optimizer, LOSS, data=(case.X, case.y)) as recorder:
        for ids in case.batches(case.seed):
            x, y = recorder.batch(ids)
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
    return model, recorder.trajectory


def margin_kernel(trained: Trained) -> pk.PathKernel:
    steps = min(NODES, len(trained.trajectory))
    return pk.PathKernel(trained.trajectory, outputs="margin", measure="uniform", steps=steps)


def datamodel(trained: Trained) -> np.ndarray:
    return pk.datamodel(margin_kernel(trained), *trained.samples, trained.queries).scores


def shares(trained: Trained) -> np.ndarray:
    return pk.KernelMachine(trained.trajectory).explain(trained.queries, outputs="margin").shares


def path_kernel_of_losses(trained: Trained) -> pk.PathKernel:
    return pk.PathKernel(trained.trajectory, outputs="loss", steps=min(CHECKPOINTS, len(trained.trajectory)))


SCORES: dict[str, Method] = {
    "datamodel": datamodel,
    "shares": shares,
    "loss path kernel": lambda t: path_kernel_of_losses(t)(t.queries, t.samples),
    "tracin_scores": lambda t: tracin_scores(t.model, LOSS, t.samples, t.queries),
    "trak_scores": lambda t: trak_scores(t.model, t.samples, t.queries),
    "influence_function_scores": lambda t: influence_function_scores(t.model, LOSS, t.samples, t.queries),
}
"""(Q, N) each, from one recorded run or its last checkpoint."""


def left_out_margin(trained: Trained) -> np.ndarray:
    """Margins of the training samples as a datamodel has them without the sample itself, the low ones suspect."""
    found = pk.datamodel(margin_kernel(trained), *trained.samples, trained.samples)
    return found.scores.diagonal() - found.output


SUSPICIONS: dict[str, Method] = {
    "label_quality": lambda t: pk.label_quality(t.trajectory).score,
    "datamodel": left_out_margin,
    "tracin_scores": lambda t: pk.TangentKernel(t.model, outputs="loss", loss=LOSS).diagonal(t.samples),
}
"""(N,) each, the higher, the more suspect."""


def parts_of_label_quality(trained: Trained) -> dict[str, np.ndarray]:
    """What `pathkernel.label_quality` puts together, one by one."""
    return {name: np.asarray(values) for name, values in pk.label_quality(trained.trajectory).doubts.items()}


def trained_again(trained: Trained, weights: np.ndarray) -> Tensor:
    """θ_S of the recorded run under other weights, by the recorded steps."""
    return trained.trajectory.retrain(torch.from_numpy(weights))
