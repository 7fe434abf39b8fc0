"""When a step is taken: whether the gradient at hand is that of the announced samples, and if not, why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pathkernel.errors import SampleIdError, UnsupportedModelError
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.returned import batch_outputs
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.trajectory.batch_gradients import ComparedGradient, RecordedGradients
from pathkernel.trajectory.gradient_fit import fit_gradient, left_over
from pathkernel.trajectory.samples import samples_of
from pathkernel.trajectory.step import MicroBatch, Step
from pathkernel.trajectory.trajectory import Trajectory

MEMORY = 2**28
"""Bytes for gradients of samples, where a step is compared or tried out."""

DRAWS = 16
"""Passes that show whether random numbers matter for the outputs: a layer that is skipped every other time is found but
once in 65,536 times, one that is skipped once in ten times four times out of five."""


OUTPUT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Difference between the outputs of a batch that is run again and those of the loop, over the largest of them, that is
rounding: the former are computed by other kernels."""


def is_due(index: int, every: int | None) -> bool:
    """True where a step is audited: every so many, never (0), or, for None, steps 0, 1, 2, 4, 8, … ."""
    if every is None:
        return index & (index - 1) == 0
    return every > 0 and index % every == 0


@dataclass(frozen=True)
class Circumstances:
    """Facts about a step besides its gradient, from which a cause can be named.

    Attributes
    ----------
    unseen
        How many batches had no forward pass of the watched module.
    watched
        The type of that module.
    moved
        Whether θ was another one at the forward pass than at the step.
    compiled
        Whether the module is compiled with random numbers of the compiler's own.
    drew_from
        Random generators that a forward pass drew from and that no record holds.
    announced_before
        The batch that was announced before these, if any.
    taken
        Whether the optimizer has moved already.
    differs
        In what the network was given something else than the data hold; empty where that is not known.
    several
        Whether it is one of several.
    """

    unseen: int = 0
    watched: str = ""
    moved: bool = False
    compiled: bool = False
    drew_from: tuple[str, ...] = ()
    announced_before: MicroBatch | None = None
    taken: bool = False
    differs: str = ""
    several: bool = False


def audit(trajectory: Trajectory, step: Step, seen: Circumstances) -> None:
    r"""Compare a gradient with :math:`\sum_i J_i^\top \lambda_i` of the announced samples, up to clipping.

    As an explanation will compare it. Neither the loss nor any other network of the loop is evaluated where λ is on
    record; the watched one runs on a copy of its structure.

    Parameters
    ----------
    trajectory
        The record so far.
    step
        The step that is about to be taken, or has been, as far as it is known before.
    seen
        For the message.

    Raises
    ------
    SampleIdError
        Naming the parameters that differ most, and the cause as far as it can be told.
    UnsupportedModelError
        Where the gradients agree by chance alone: what the network draws decides about its outputs, and is not known.
    """
    one = Trajectory.of_step(trajectory.run, step.before, step)
    gradients = RecordedGradients(one, one.function(), MEMORY, taken=False)
    compared, moved = gradients.compared(step), "moved already" if seen.taken else "not moved"
    if compared.fit is not None or _is_nothing(step, compared):
        if seen.drew_from and _has_a_state(trajectory, step.batches[-1], DRAWS):
            raise UnsupportedModelError(
                f"At step {step.index} the forward pass drew from {' and '.join(seen.drew_from)}, and the outputs "
                "depend on what it drew",
                "Passes are run again from the state of torch's random generators, which alone is on record; the "
                f"optimizer has {moved}",
                "Draw from torch's generators in `forward` (`torch.rand(())`), or before it, and hand what was drawn "
                "to the network among its inputs",
            )
        return
    layout, recorded, expected = trajectory.layout, compared.recorded, compared.expected
    grown, fit = fit_gradient(layout, recorded, expected, compared.tolerance), left_over(layout, recorded, expected)
    worst = sorted(fit.parameters, key=lambda name: -fit.parameters[name])[:3]
    if grown.relative <= compared.tolerance and not isinstance(grown.factor, Tensor):
        differs = f"is {grown.factor:.3g} times that of the announced samples"
    else:
        differs = (
            f"differs from that of the announced samples by {fit.relative:.2g} of its norm, "
            f"most in {', '.join(f'`{name}` ({fit.parameters[name]:.2g})' for name in worst)}"
        )
    raise SampleIdError(
        f"At step {step.index} the gradient {differs}{_cause(trajectory, step, gradients, seen)}",
        "The gradient must be the sum over the announced samples of their part of the loss, which may be clipped or "
        f"scaled down as a whole; the optimizer has {moved}",
        "Check that the ids are those of this batch (not shifted or shuffled again), that augmented inputs are "
        "passed as `recorder.batch(ids, inputs=x)`, that terms added to the loss that depend on parameters alone are "
        "named in `regularizers=`, and that backward passes which go round the outputs (penalties on gradients or "
        'hidden layers) and edits of gradients stand inside `with recorder.channel("name")`',
    )


def check_outputs(trajectory: Trajectory, step: Step, batch: MicroBatch, seen: Sequence[Tensor], taken: bool) -> None:
    """Compare outputs of a forward pass with those of the announced samples.

    What samples do not explain of a backward pass in a channel is the channel's, so that gradients tell nothing of
    wrong samples there.

    Raises
    ------
    SampleIdError
        Where they are others.
    """
    one = Trajectory.of_step(trajectory.run, step.before, step)
    function = RecordedGradients(one, one.function(), MEMORY, taken=False).replayed(step, batch)
    inputs, _ = samples_of(batch, trajectory.data)
    with generators_untouched(), function.evaluating(gradients=False):
        found = function.batch(function.parameters(step.before), function.cast(inputs)).double()
    expected = batch_outputs(list(seen), len(batch.ids)).to(found)
    low = {leaf.dtype for leaf in seen} | ({batch.state.autocast[1]} if batch.state.autocast else set())
    largest = max(found.abs().max().item(), expected.abs().max().item())
    off = (found - expected).abs().max().item() / largest if largest > 0 else 0.0
    if off <= max(OUTPUT_TOLERANCE.get(dtype, 0.0) for dtype in {*low, step.before.dtype}):
        return
    raise SampleIdError(
        f"At step {step.index} the outputs of the network for the announced samples differ by {off:.2g} of the largest "
        f"from those of the loop's pass in the channel `{batch.channel}`",
        "A backward pass in a channel is of the announced samples, as any other; the optimizer has "
        f"{'moved already' if taken else 'not moved'}",
        "Check that the ids are those of this batch (not shifted or shuffled again), and that inputs which differ from "
        "the data are passed as `recorder.batch(ids, inputs=x)`",
    )


def check_inputs(trajectory: Trajectory, differences: Sequence[str], taken: bool) -> None:
    """Refuse a step whose network was given something else than the data hold under the announced ids.

    The gradient need not tell: with a bias, inputs on another scale look like the clipping of single parameters.

    Raises
    ------
    SampleIdError
        With the argument that differs.
    """
    if not differences:
        return
    raise SampleIdError(
        f"At step {len(trajectory)} the network was given something else than `data` holds under the announced "
        f"ids: {differences[0]}",
        "The samples that the network sees are those of the announced ids; inputs that are not in `data` are kept "
        f"where the recorder is told so; the optimizer has {'moved already' if taken else 'not moved'}",
        "If they are to differ (augmented, scaled, padded), write `recorder.track(loader, keep=True)`, "
        "`KernelRecorder(..., keep=True)`, or `recorder.announce(ids, inputs=x)`; otherwise check the ids, and "
        "call `next` on `track` right before the forward pass",
    )


def _is_nothing(step: Step, compared: ComparedGradient) -> bool:
    """True where both are so small that a loss which was evaluated again says nothing of them."""
    largest = max(compared.recorded.norm().item(), compared.expected.norm().item())
    evaluated = any(batch.cotangents is None for batch in step.batches)
    return evaluated and largest <= 1e3 * torch.finfo(step.before.dtype).eps


def check_captured(trajectory: Trajectory, batches: Sequence[MicroBatch], watched: str, taken: bool) -> None:
    """Refuse batches of which neither slopes were seen nor a loss is known that gives them.

    Raises
    ------
    SampleIdError
        With the cause as far as it can be told.
    """
    at_hand = not trajectory.data.announced and all([batch.has_targets for batch in batches])
    if (trajectory.objective.known is not None and at_hand) or all([batch.captured for batch in batches]):
        return
    unseen = sum(not batch.captured for batch in batches)
    raise SampleIdError(
        f"At step {len(trajectory)} no backward pass came through the outputs of the watched {watched} for {unseen} of "
        f"{len(batches)} announced batches",
        "Without a loss, the slopes at the outputs are those of the loop's own backward pass; the optimizer has "
        f"{'moved already' if taken else 'not moved'}",
        "Give the recorder the module that the loop calls (the compiled one, the wrapper), call `backward()` rather "
        "than setting `p.grad`, let `returns=` pick tensors as they were returned, do not change outputs "
        "in place that are views, or write `KernelRecorder(..., loss=loss)`",
    )


def _cause(trajectory: Trajectory, step: Step, gradients: RecordedGradients, seen: Circumstances) -> str:
    """The cause, as far as it can be told, that a gradient is none of the announced samples: the end of a sentence."""
    batches, before = step.batches, seen.announced_before
    if seen.unseen:
        return (
            f". No forward pass of the watched {seen.watched} was seen for {seen.unseen} of {len(batches)} batches: "
            "give the recorder the module that the loop calls"
        )
    if seen.moved:
        return (
            ". The parameters were other ones at the forward pass than at the step: another optimizer, or a method "
            "that looks ahead (SAM), moved them in between"
        )
    if seen.compiled and any(batch.state.generators for batch in batches):
        return (
            ". The module is compiled, and the compiler draws random numbers of its own: set "
            "`torch._inductor.config.fallback_random = True`"
        )
    if seen.drew_from:
        return f". The network drew from {' and '.join(seen.drew_from)}, whose state no record holds"
    if _has_a_state(trajectory, batches[-1]):
        return (
            ". The network's outputs for the same samples change from one pass to the next in training: it keeps a "
            "state in its attributes, which no record holds (keep it in a buffer)"
        )
    if before is not None and len(batches) == 1 and len(before.ids) == len(batches[0].ids):
        shifted = replace(batches[0], ids=before.ids, inputs=before.inputs, targets=before.targets)
        with generators_untouched():
            ran = result_or_error(lambda: gradients.compared(replace(step, batches=(shifted,))), (Exception,))
        if isinstance(ran, ComparedGradient) and ran.fit is not None:
            return (
                ". It is that of the batch that was announced before: batches are announced one too early, as by "
                "prefetching"
            )
    if seen.differs:
        return (
            f". What the network was given is not what `data` holds under these ids: {seen.differs}. If that is what "
            "it is to be (augmented, scaled, padded), write `recorder.track(loader, keep=True)`"
        )
    if trajectory.returns is not None:
        return (
            ". Slopes were taken at what `returns=` picks out of what the network returned: a loss on the rest goes "
            "round these outputs"
        )
    if seen.several:
        return (
            ". Of several optimizers each uses gradients of passes that were made since the others moved: clear what "
            "earlier passes left there (`optimizer.zero_grad()` before `backward()`)"
        )
    return ""


def _has_a_state(trajectory: Trajectory, batch: MicroBatch, again: int = 1) -> bool:
    """True where a copy of the network returns something else the second time, or at one of several more."""
    inputs, _ = samples_of(batch, trajectory.data)
    function = trajectory.function().with_(constants=batch.state.buffers, state=batch.state)
    parameters = function.parameters(trajectory.initial)

    def outputs() -> Tensor:
        with function.evaluating(gradients=False):
            return function.batch(parameters, function.cast(inputs))

    with generators_untouched():
        first = result_or_error(outputs, (Exception,))
        if not isinstance(first, Tensor):
            return False
        return any(result_or_error(lambda: torch.equal(first, outputs()), (Exception,)) is False for _ in range(again))
