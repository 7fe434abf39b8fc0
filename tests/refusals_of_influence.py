"""Rows of `recording/test_refusals.py` for margins, self-shares, targets, and what `pathkernel.influence` is asked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import make_inputs, make_model, record
from torch import nn

import pathkernel as pk
from pathkernel import analysis, errors
from pathkernel.influence.checkpoint_scores import tracin_scores, trak_scores
from pathkernel.influence.retraining import retrain

Row = tuple[Callable[[], Any], type[Exception], tuple[str, str, str]]

X, LABELS = make_inputs(3), torch.tensor([0, 1, 2])
CE = nn.CrossEntropyLoss()


@functools.cache
def run() -> Any:
    """A recorded run that no row changes."""
    return record(optimizer="adam")


@functools.cache
def machine() -> pk.KernelMachine:
    return pk.KernelMachine(run().trajectory)


def added(y: Any) -> Any:
    return machine().add_samples(X, y)


def scored(y: Any, loss: Any = CE) -> Any:
    return tracin_scores(run().model, loss, (X, LABELS), (X, y))


def spans(targets: Any, outputs: int) -> Any:
    """New samples of a regression, with targets of some shape."""
    return pk.KernelMachine(record(optimizer="sgd", loss="mse_mean").trajectory).add_samples(X, targets)


INFLUENCE: dict[str, Row] = {
    "a margin of a label that there is none of": (
        lambda: pk.TangentKernel(make_model(), outputs="margin")((X, LABELS + 1)),
        errors.InputError,
        ("int64 and shape (3,) from 1 to 3", "integers from 0 to 2", 'outputs="loss"'),
    ),
    "a margin among several rows of outputs": (
        lambda: pk.TangentKernel(nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2))).double(), outputs="margin")(
            (X, LABELS)
        ),
        errors.InputError,
        ("returns (1, 2, 2) for one sample", "C outputs in one row", "`outputs=lambda z: ...`"),
    ),
    "a self-share of an output": (
        lambda: pk.KernelMachine(record().trajectory).self_shares("trace"),
        errors.InputError,
        ("`outputs='trace'` was given", "'loss' or 'margin'", "`machine.self_shares()`"),
    ),
    # targets that the loss does not take
    "classes that there are none of": (
        lambda: added(LABELS + 1),
        errors.InputError,
        (
            "`CrossEntropyLoss` was given targets of type int64 and shape (3,) from 1 to 3, and has no class 3",
            "one for each sample, here for outputs of shape (3,)",
            "from 0 to C - 1",
        ),
    ),
    "classes of a checkpoint's queries that there are none of": (
        lambda: scored(LABELS - 1),
        errors.InputError,
        ("from -1 to 1, and has no class -1", "as in training", "from 0 to C - 1"),
    ),
    "targets of another type": (
        lambda: scored(LABELS.double()),
        errors.InputError,
        ("of type float64 and shape (3,) from 0 to 2, and fails: expected target dtype", "as in training", "int64"),
    ),
    "targets of a loss of one argument": (
        lambda: scored(LABELS, lambda z: z.sum()),
        errors.InputError,
        ("`<lambda>` was given targets", "as in training", "its documentation says"),
    ),
    "targets of another number": (
        lambda: added(LABELS[:2]),
        errors.InputError,
        ("`add_samples` was given arrays of shape (3, 4), (2,)", "one row for each sample", "`X[None]`"),
    ),
    "targets that are not finite": (
        lambda: added(torch.full((3, 3), torch.nan, dtype=torch.float64)),
        errors.InputError,
        ("`add_samples` was given targets with NaN", "have to be finite", "leave these rows out"),
    ),
    "targets that would be broadcast": (
        lambda: spans(torch.zeros(3, 1).double(), 2),
        errors.InputError,
        (
            "`add_samples` was given targets of type float64 and shape (3, 1)",
            "shape (1, 2) for one sample",
            "the same form as in training",
        ),
    ),
    "new samples of which there are none": (
        lambda: machine().add_samples(X[:0], LABELS[:0]),
        errors.InputError,
        ("`KernelMachine` was given no samples", "One sample or more", "where X is empty"),
    ),
    "no queries of a datamodel of margins": (
        lambda: pk.datamodel(
            pk.PathKernel(run().trajectory, outputs="margin", steps=1), run().X, run().y, (X[:0], LABELS[:0])
        ),
        errors.InputError,
        ("`datamodel` was given no samples", "One sample or more", "where X is empty"),
    ),
    "no queries of a datamodel of outputs": (
        lambda: pk.datamodel(pk.PathKernel(run().trajectory, steps=1), run().X, run().y, X[:0]),
        errors.InputError,
        ("`datamodel` was given no samples", "One sample or more", "where X is empty"),
    ),
    "no queries of a checkpoint": (
        lambda: trak_scores(run().model, (X, LABELS), (X[:0], LABELS[:0])),
        errors.InputError,
        ("was given no samples", "One sample or more", "where X is empty"),
    ),
    "samples by name, of a network that takes an array": (
        lambda: machine().explain({"x": X}),
        errors.InputError,
        ("samples with the keys 'x'", "one array", "the array that the network takes"),
    ),
    # other objects
    "a file in the place of a network": (
        lambda: pk.TangentKernel(Path("model.pt")),
        errors.InputError,
        ("`model` is a PosixPath", "an instance of `torch.nn.Module`", "load_state_dict"),
    ),
    "weights in the place of a network that is recorded": (
        lambda: pk.KernelRecorder(make_model().state_dict(), None, CE),
        errors.InputError,
        ("`model` is a OrderedDict", "an instance of `torch.nn.Module`", "load_state_dict"),
    ),
    "a class in the place of a network": (
        lambda: trak_scores(nn.Linear, (X, LABELS), (X, LABELS)),
        errors.InputError,
        ("`model` is the class Linear", "an instance of `torch.nn.Module`", "load_state_dict"),
    ),
    "a folder in the place of a trajectory": (
        lambda: pk.PathKernel("runs/digits"),
        errors.InputError,
        ("`trajectory` is a str", "a run that was recorded", "Trajectory.open"),
    ),
    "a recorder in the place of a trajectory": (
        lambda: pk.KernelMachine(pk.KernelRecorder(make_model(), None, CE), at=1),
        errors.InputError,
        ("`trajectory` is a KernelRecorder", "a run that was recorded", "`recorder.trajectory`"),
    ),
    "a network in the place of a trajectory of labels": (
        lambda: pk.label_quality(make_model()),
        errors.InputError,
        ("`trajectory` is a Sequential", "a run that was recorded", "`recorder.trajectory`"),
    ),
    "a folder in the place of a trajectory to prune": (
        lambda: pk.influence.prune("runs/digits"),
        errors.InputError,
        ("`trajectory` is a str", "a run that was recorded", "Trajectory.open"),
    ),
    "a recorder in the place of a trajectory to label more for": (
        lambda: pk.influence.label_next(pk.KernelRecorder(make_model(), None, CE), X),
        errors.InputError,
        ("`trajectory` is a KernelRecorder", "a run that was recorded", "`recorder.trajectory`"),
    ),
    "nothing in the place of a trajectory": (
        lambda: analysis.kernel_regime(None),
        errors.InputError,
        ("`trajectory` is a NoneType", "a run that was recorded", "`recorder.trajectory`"),
    ),
    "a class in the place of a trajectory": (
        lambda: retrain(pk.Trajectory, torch.ones(1, 3)),
        errors.InputError,
        ("`trajectory` is the class Trajectory", "a run that was recorded", "`recorder.trajectory`"),
    ),
    "a matrix in the place of a kernel": (
        lambda: pk.datamodel(np.eye(3), X, LABELS, (X, LABELS)),
        errors.InputError,
        ("`kernel` is a ndarray", "those of sums of kernels and of matrices are not", 'outputs="margin"'),
    ),
    "an array of names of parameters": (
        lambda: pk.TangentKernel(make_model(), np.ones(2)),
        errors.InputError,
        ("`parameters=array([1., 1.])`", "a name or a glob", '`parameters="*.weight"`'),
    ),
    # arrays
    "a kernel matrix of text": (
        lambda: analysis.effective_rank("gram.npz"),
        errors.InputError,
        ("`K` is str, which is no array of real numbers", "A kernel matrix holds real numbers", "floating point"),
    ),
    "rows of different lengths": (
        lambda: analysis.mmd_squared(np.eye(4), [[True], [True, False]]),
        errors.InputError,
        ("`first` is a list, which is no array", "as many entries", "one array"),
    ),
    "labels of near-duplicates in rows of different lengths": (
        lambda: pk.influence.near_duplicates(pk.TangentKernel(make_model()), X, labels=[[0], [1, 2], [3]]),
        errors.InputError,
        ("`labels` is a list, which is no array", "as many entries", "one array"),
    ),
    "labels that are none": (
        lambda: analysis.target_kernel([None, "a"]),
        errors.InputError,
        ("`y` is of type object", "whole numbers or names", "argmax"),
    ),
    "a negative diagonal": (
        lambda: analysis.loss_path_bound([np.diag([1.0, -1.0])], [0.1]),
        errors.PathKernelError,
        ("`kernels[0]` is -1 between sample 1 and itself", "no diagonal entry is below 0", "RepairedKernel"),
    ),
    "kernels that are one number": (
        lambda: analysis.kernel_velocity(3, [0, 1]),
        errors.PathKernelError,
        ("`grams` is a int", "a sequence of kernel matrices", "a list of matrices"),
    ),
}
