"""Rows of `recording/test_refusals.py` for analyses, pictures, engines, levels of record and observers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cases import BATCHES, LOSSES, OPTIMIZERS, SAMPLES, make_inputs, make_model, record
from torch import nn

import pathkernel as pk
from pathkernel import analysis, errors, plotting
from pathkernel.kernel_machine.attributions import Attributions
from pathkernel.optimizers import Momentum
from pathkernel.recording.cost_table import parse_size, plan_table, state_numbers
from pathkernel.trajectory.memory import MemoryStore

Row = tuple[Callable[[], Any], type[Exception], tuple[str, str, str]]
EYE = np.eye(3)
Refusal = errors.PathKernelError


def observed(
    *observers: Any, optimizer: str = "sgd", schedule: Any = None, batches: Any = BATCHES[:2]
) -> pk.Trajectory:
    model, case = make_model(), LOSSES["ce_mean"]
    opt, data = OPTIMIZERS[optimizer](model.parameters()), (make_inputs(SAMPLES), case.targets(SAMPLES))
    with pk.KernelRecorder(model, opt, case.loss, data=data, schedule=schedule, observers=observers) as recorder:
        for ids in batches:
            x, target = recorder.announce(list(ids))
            opt.zero_grad()
            case.loss(model(x), target).backward()
            opt.step()
    return recorder.trajectory


def observed_afterwards() -> None:
    store = MemoryStore()
    store.exists = True
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = make_inputs(SAMPLES), LOSSES["ce_mean"].targets(SAMPLES)
    pk.KernelRecorder(
        model, optimizer, LOSSES["ce_mean"].loss, data=data, store=store, observers=[pk.StreamingGram(X2)]
    )


def why(n: int = 4, output: float = 0.0) -> Attributions:
    zero = np.zeros(1)
    return Attributions(np.ones((1, n)), {"initial": zero}, zero + output, np.zeros(1, int), np.zeros(1, int), zero)


def shown(**options: Any) -> plotting.AttributionDisplay:
    return plotting.AttributionDisplay.from_attributions(why(), 0, **options)


def on_axes_by_hand() -> None:
    display = shown(images=np.zeros((4, 2, 2)))
    figure = plt.figure()
    try:
        display.plot(ax=figure.add_axes((0, 0, 1, 1)))
    finally:
        plt.close(figure)


def reported_nowhere() -> None:
    plotting.write_report(
        Path("no") / "folder" / "r.html", title="t", subtitle="s", key_figures=[], table=[], sections=[], settings={}
    )


def evolving(steps: list[int], curve: list[float]) -> plotting.KernelEvolutionDisplay:
    return plotting.KernelEvolutionDisplay(np.array(steps), np.array(curve), np.array(curve), None)


def features_unseen() -> None:
    features = pk.StreamingFeatures(make_inputs(2))
    features.begin(record(optimizer="sgd").trajectory, ())
    _ = features.result


X2 = make_inputs(2)
OUTSIDE: dict[str, Row] = {
    # analyses of kernel matrices
    "a matrix that is none": (
        lambda: analysis.kernel_alignment(np.zeros(3), EYE),
        Refusal, ("has shape (3,)", "shape (n, m)", "K = kernel(X, X)"),
    ),
    "a kernel value that is infinite": (
        lambda: analysis.kernel_alignment(EYE * np.inf, EYE),
        Refusal, ("at row 0, column", "is finite", "leave its row and column out"),
    ),
    "a Gram matrix that is not square": (
        lambda: analysis.effective_rank(np.ones((2, 3))),
        Refusal, ("has shape (2, 3)", "is square", "not kernel(X_test, X_train)"),
    ),
    "a Gram matrix that is not symmetric": (
        lambda: analysis.effective_rank(np.triu(np.ones((3, 3)))),
        Refusal, ("differs from its transpose by up to 1", "is symmetric", "Use PathKernel"),
    ),
    "a kernel of zeros": (
        lambda: analysis.kernel_alignment(0 * EYE, EYE),
        Refusal, ("is zero everywhere", "must be positive", "Leave this kernel out"),
    ),
    "kernels of other samples": (
        lambda: analysis.kernel_alignment(EYE, np.eye(2)),
        Refusal, ("shapes (3, 3) and (2, 2)", "the same samples", "on the same X"),
    ),
    "targets that are none": (
        lambda: analysis.target_kernel(np.zeros((3, 2), dtype=int)),
        Refusal, ("`y` has shape (3, 2)", "shape (n,)", "argmax(axis=1)"),
    ),
    "a kernel that is constant": (
        lambda: analysis.centered_kernel_alignment(np.ones((3, 3)), EYE),
        Refusal, ("is constant once", "varies between samples", "two classes"),
    ),
    "an effective rank of nothing": (
        lambda: analysis.effective_rank(0 * EYE),
        Refusal, ("Every eigenvalue of `K` is zero", "at least one direction", "Leave this kernel out"),
    ),
    "a spectrum that is negative": (
        lambda: analysis.cumulative(-EYE),
        Refusal, ("lie between -1 and -1", "non-negative up to rounding", "Use PathKernel"),
    ),
    "one time for two kernels": (
        lambda: analysis.kernel_velocity([EYE, EYE], np.zeros(1)),
        Refusal, ("There are 2 kernels", "one time for each", "shape (len(grams),)"),
    ),
    "times that stand still": (
        lambda: analysis.kernel_velocity([EYE, EYE], np.zeros(2)),
        Refusal, ("`times` is [0. 0.]", "strictly increasing", "Sort the kernels"),
    ),
    # pictures
    "no sample on either side": (
        lambda: shown(images=np.zeros((4, 2, 2)), k=0), Refusal, ("`k` is 0", "on either side", "Write k=5"),
    ),
    "pictures of other samples": (
        lambda: shown(images=np.zeros((3, 2, 2))),
        Refusal, ("There are 3 images for 4", "in id order", "whole training set"),
    ),
    "pictures that are none": (
        lambda: shown(images=np.zeros((4, 4))).plot(),
        Refusal, ("has shape (4,)", "(height, width)", "Reshape flat rows"),
    ),
    "axes placed by hand": (on_axes_by_hand, Refusal, ("placed by hand", "divides the cell", "plt.subplots")),
    "an account that is not finite": (
        lambda: plotting.CompletenessDisplay.from_attributions(why(output=np.nan)),
        Refusal, ("not finite in", "are finite", "leave it out"),
    ),
    "steps that do not rise": (
        lambda: evolving([2, 1], [0.0, 0.0]), Refusal, ("not a rising sequence", "strictly increase", "in order"),
    ),
    "a curve of other steps": (
        lambda: evolving([1, 2], [0.0]), Refusal, ("for 2 steps", "One value per step", "at the same steps"),
    ),
    "half a run beside a flow": (
        lambda: plotting.FlowDisplay([0, 1], [1, 0], [[0, 0], [1, 1]], run_times=[0, 1]),
        Refusal, ("Part of a recorded run", "come together", "FlowDisplay.from_flow(flow, trajectory)"),
    ),
    "labels of other rows": (
        lambda: plotting.GramDisplay.from_gram(EYE, np.zeros(2)),
        Refusal, ("for a Gram matrix of 3 samples", "One label per sample", "y=None"),
    ),
    "a cosine with zero": (
        lambda: plotting.GramDisplay.from_gram(np.diag([1.0, 0.0]), normalize=True),
        Refusal, ("Sample 1 has K_ii = 0", "positive diagonal", "normalize=False"),
    ),
    "a report without a folder": (
        reported_nowhere, Refusal, ("There is no folder", "into a folder that exists", "mkdir(parents=True)"),
    ),
    "a query that was not explained": (
        lambda: plotting.AttributionDisplay.from_attributions(why(), 3, np.zeros((4, 2, 2))),
        Refusal, ("`query` is 3", "queries 0 to 0", "machine.explain"),
    ),
    # engines, probes and optimizers
    "a projection of no columns": (
        lambda: pk.Projection(0), errors.InputError, ("dim=0", "an integer from 1 upwards", "Projection("),
    ),
    "a projection of another kind": (
        lambda: pk.Projection(8, kind="fourier"), errors.InputError, ("kind='fourier'", "Kinds are", "Write"),
    ),
    "no output probes": (
        lambda: pk.OutputProbes(0), errors.InputError, ("OutputProbes(", "`count` is an integer", "Write"),
    ),
    "half precision": (
        lambda: pk.TangentKernel(make_model(), dtype=torch.float16),
        errors.InputError, ("`dtype=torch.float16`", "float64, in float32", "dtype"),
    ),
    "a floating type of another name": (
        lambda: pk.TangentKernel(make_model(), dtype="half"),
        errors.InputError, ("`dtype='half'`", 'and "tf32"', "dtype=torch.float32"),
    ),
    "TensorFloat-32 on the CPU": (
        lambda: pk.TangentKernel(make_model(), dtype="tf32"),
        errors.InputError, ("on cpu, which does not", "compute capability 8.0", 'first, `model.to("cuda")`'),
    ),
    "TensorFloat-32 of a path on the CPU": (
        lambda: pk.PathKernel(observed(), dtype="tf32"),
        errors.InputError, ("on cpu, which does not", "compute capability 8.0", "dtype=torch.float32"),
    ),
    "a budget below one sample": (
        lambda: pk.TangentKernel(make_model(), engine="jacobian", memory=10)(X2),
        errors.InputError, ("One sample takes", "at least one sample", "memory"),
    ),
    "parameters of another model": (
        lambda: pk.TangentKernel(make_model(), {"head": torch.zeros(2)}),
        errors.ModelMismatchError, ("`parameters` holds", "Names and shapes", "trajectory.parameters(s)"),
    ),
    "no trainable parameter": (
        lambda: pk.TangentKernel(nn.Tanh()), errors.InputError, ("no trainable parameters", "made of gradients", ""),
    ),
    "a filter that says no": (
        lambda: pk.TangentKernel(make_model(), lambda name, p: False),
        errors.InputError, ("said no to each of 4", "make up θ", ""),
    ),
    "a pattern without a match": (
        lambda: pk.TangentKernel(make_model(), "head.*"),
        errors.InputError, ("'head.*', which matches no trainable", "", ""),
    ),
    "outputs without a gradient": (
        lambda: pk.TangentKernel(make_model(), outputs=lambda z: z.argmax().double())(X2),
        errors.InputError, ("without a gradient", "`argmax`", "lambda z: z[0] - z[1]"),
    ),
    "a method that needs a closure": (
        lambda: Momentum([torch.zeros(1, requires_grad=True)], lr=0.1).step(),
        errors.InputError, ("without a closure", "in the middle of its step", "optimizer.step(closure)"),
    ),
    # levels of record
    "an interval of none": (lambda: pk.Every(0), errors.InputError, ("`Every(0)`", "from 1 upwards", "`Every()`")),
    "half a state": (
        lambda: pk.Every(state="half"), errors.InputError, ("state='half'", "its update rule needs", "`Keyframes(32)`"),
    ),
    "half a keyframe": (
        lambda: pk.Keyframes(1.5), errors.InputError, ("`Keyframes(1.5)`", "from 1 upwards", "`Keyframes(32)`"),
    ),
    "keyframes for no run": (
        lambda: pk.Schedule.keyframes_for(0),
        errors.InputError, ("keyframes_for(0)", "from 1 upwards", "epochs * len(loader)"),
    ),
    "a level that is none": (
        lambda: pk.Schedule(keep="all"), errors.InputError, ("keep='all'", "or \"nothing\"", "`WeightsOnly()`"),
    ),
    "two levels at once": (
        lambda: pk.Schedule(every=2, keyframes=3), errors.InputError, ("keyframes=3", "leaves steps out", "`Every(2)`"),
    ),
    "a schedule that is none": (
        lambda: observed(schedule=10), errors.InputError, ("`schedule=10`", "`Every(n)`", "schedule=Keyframes(32)"),
    ),
    "nothing kept and nobody there": (
        lambda: observed(schedule=pk.Nothing()),
        errors.InputError, ("`Streaming()`", "somebody has to look on", "observers=[StreamingGram(X_train)]"),
    ),
    "an observer that is none": (
        lambda: observed("gram"), errors.InputError, ("A str", "another `StepObserver`", "observers=["),
    ),
    "a thinned path": (
        lambda: pk.KernelMachine(observed(schedule=pk.Every(2))),
        errors.TrajectoryError, ("thinned with `Every(2)`", "nor their gradients", "Record again with `Every()`"),
    ),
    "weights alone": (
        lambda: pk.KernelMachine(observed(schedule=pk.WeightsOnly())),
        errors.TrajectoryError, ("`WeightsOnly()` kept the weights alone", "analyses of the path", "`Keyframes(32)`"),
    ),
    "no record at all": (
        lambda: pk.PathKernel(observed(pk.StreamingGram(X2), schedule=pk.Nothing())),
        errors.TrajectoryError, ("was streamed with", "fixed in advance", "Ask the observers"),
    ),
    "a step that is gone": (
        lambda: observed(pk.StreamingGram(X2), schedule=pk.Nothing()).store.read(0),
        errors.TrajectoryError, ("Step 0 was asked for", "its last step only", "Ask the observers"),
    ),
    # observers
    "streamed shares under a tolerance": (
        lambda: pk.StreamingShares(X2, quadrature="adaptive"),
        errors.InputError, ("while training runs", "is not known yet", "quadrature="),
    ),
    "streamed shares of momentum": (
        lambda: observed(pk.StreamingShares(X2), optimizer="momentum"),
        errors.TrajectoryError, ("SGD, which remembers", "a sweep backward", "`Keyframes(32)`"),
    ),
    "streamed shares of no step": (
        lambda: pk.StreamingShares(X2).result,
        errors.TrajectoryError, ("has not seen a step", "looks on", "observers=[shares]"),
    ),
    "a streamed Gram matrix of few steps": (
        lambda: pk.StreamingGram(X2, steps=3),
        errors.InputError, ("`StreamingGram(steps=...)`", "every step is used", "`Every(10)`"),
    ),
    "a streamed Gram matrix of probes": (
        lambda: pk.StreamingGram(X2, outputs=pk.OutputProbes(2)),
        errors.InputError, ("OutputProbes", "drawn afresh", "StreamingFeatures"),
    ),
    "a streamed Gram matrix of no step": (
        lambda: pk.StreamingGram(X2).result,
        errors.TrajectoryError, ("no step with a positive weight", "looks on", "observers=[gram]"),
    ),
    "streamed features of no step": (
        features_unseen, errors.TrajectoryError, ("no step with a positive weight", "looks on", "observers=[features]"),
    ),
    "streamed features of no sample": (
        lambda: observed(pk.StreamingFeatures(X2[:0])),
        errors.InputError, ("`StreamingFeatures` was given no samples", "One sample or more", "Leave the call out"),
    ),
    "observers of an earlier run": (
        observed_afterwards,
        errors.RecordingError, ("holds steps of an earlier run", "as they are taken", "leave out `observers`"),
    ),
    # what a recording will cost
    "a size that is none": (lambda: parse_size("many"), errors.InputError, ("The size 'many'", "", "")),
    "an optimizer that is none": (
        lambda: state_numbers("lbfgs"), errors.InputError, ("`optimizer='lbfgs'`", "", ""),
    ),
    "a batch of none": (
        lambda: plan_table(10, 10, batch_size=0),
        errors.InputError, ("`batch_size=0`", "from 1 upwards", "plan_table("),
    ),
}  # fmt: skip
