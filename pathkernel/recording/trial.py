"""Trials before the first step is taken: the run can be explained if a step of it can."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from pathkernel.errors import CertificateWarning, PathKernelError, RecordingError, UnsupportedModelError
from pathkernel.gradients.arguments import arguments_of
from pathkernel.gradients.forward_state import ForwardState, generators_untouched
from pathkernel.gradients.gradient_source import weighted_sum
from pathkernel.gradients.pytrees import as_tensors, spread, take
from pathkernel.gradients.sample_wise import SAMPLES, ComparedSamples, check_sample_wise
from pathkernel.recording.audit import MEMORY
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.trajectory.batch_gradients import EngineReplaced, Passes, RecordedGradients
from pathkernel.trajectory.run import Run
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory

FEW = 2
"""Samples of the batch that stand for queries."""


def check_network(trajectory: Trajectory, theta: Tensor, batch: MicroBatch) -> None:
    """Refuse a network whose samples depend on each other, before it is trained; warn of one that compares them."""
    few = batch.ids[spread(len(batch.ids), SAMPLES)]
    with generators_untouched():
        inputs = trajectory.data[few][0] if batch.inputs is None else batch.inputs
    inputs = as_tensors(inputs, trajectory.dtype)
    function = trajectory.run.function()
    if batch.state.arguments:
        function = function.with_(state=ForwardState(arguments=batch.state.arguments))
    ran = result_or_error(lambda: check_sample_wise(function, theta, inputs), (Exception,))
    # Where the loop gives the network something else than these samples, the audit says so.
    if isinstance(ran, ComparedSamples):
        warnings.warn(
            CertificateWarning(
                "The network returns a number for each pair of samples of a batch",
                "Such batches are recorded and taken apart as a whole, exactly; but there is no output of one query "
                "alone to be explained, only that of a part of the network which takes samples one by one",
                'Ask for such a part: `machine.explain(X, outputs="encoder")` with the name of a submodule',
            ),
            stacklevel=4,
        )
    elif isinstance(ran, PathKernelError):
        raise ran


def is_at_hand(run: Run, batch: MicroBatch) -> bool:
    """True where the data hold what the network takes of some samples, so that it can be run before its first pass."""
    if batch.inputs is not None or run.data.announced:
        return batch.inputs is not None and not run.data.announced

    def fits() -> bool:
        few = batch.ids[spread(len(batch.ids), SAMPLES)]
        with generators_untouched():
            arguments, named = arguments_of(run.function().called[0].forward, run.data[few][0])
        inspect.signature(run.function().called[0].forward).bind(*arguments, **named)
        return True

    return result_or_error(fits, (Exception,)) is True


def try_out(trajectory: Trajectory, step: Step) -> None:
    """Take a step apart sample by sample, and the gradients of a few outputs, as `KernelMachine.explain` will.

    On a copy of the network; random generators are left as they are.

    Parameters
    ----------
    trajectory
        The record so far.
    step
        The step that is about to be taken: its batches and gradient.

    Raises
    ------
    PathKernelError
        What an explanation would raise after training.
    UnsupportedModelError
        For what torch raises there, with the cause.
    """

    def explained() -> None:
        with generators_untouched():
            one = Trajectory.of_step(trajectory.run, step.before, step)
            gradients = RecordedGradients(one, one.function(), MEMORY, taken=False)
            if not getattr(trajectory.schedule, "weights_only", False):
                _by_sample(gradients, step)
            _queries(gradients, step)

    ran = result_or_error(explained, (Exception,))
    if isinstance(ran, RecordingError):
        raise ran
    if isinstance(ran, PathKernelError):
        found = f"The first step cannot be explained: {ran.found}"
        raise UnsupportedModelError(found, ran.expected, ran.write) from ran
    if isinstance(ran, Exception):
        raise UnsupportedModelError(
            f"The first step cannot be explained: the network does not run again on its own samples "
            f"({type(ran).__name__}: {str(ran)[:300]})",
            "What was trained is run again when predictions are explained, sample by sample and in evaluation mode",
            "Let `forward` depend on its inputs, parameters and buffers alone and take batches of any size; where the "
            "loop gives it other inputs than the data, announce them with `recorder.batch(ids, inputs=x)`; say of an "
            "argument that all samples share, and that is as long as a batch, `batch_axis={name: None}`",
        ) from ran


def _by_sample(gradients: RecordedGradients, step: Step) -> None:
    largest = max(len(batch.ids) for batch in step.batches)
    row = step.before.numel() * step.before.element_size()
    passes = Passes(max(1, min(largest, MEMORY // max(1, row))), streamed=True)
    for _ in range(2):  # rows that are not their samples' are formed in another way
        try:
            for stage in gradients.stages(replace(step, index=0), rows=True, passes=passes):
                for _part in stage.parts:
                    pass
            return
        except EngineReplaced:
            continue


def _queries(gradients: RecordedGradients, step: Step) -> None:
    function = gradients.function.with_(constants=step.buffers)
    inputs, _ = samples_of(step.batches[0], gradients.trajectory.data)
    alone = result_or_error(lambda: check_sample_wise(function, step.before, function.cast(inputs)), (Exception,))
    if isinstance(alone, ComparedSamples):  # the user was warned
        return
    few = function.cast(take(inputs, slice(0, FEW)))
    outputs = function.outputs(step.before, few)
    weights = torch.zeros_like(outputs)
    weights[:, 0] = 1
    gradients.source.gradients(step.before, few, weighted_sum, weights, None, function).total()
