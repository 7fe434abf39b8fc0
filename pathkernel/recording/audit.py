"""When a step is taken: whether the gradient at hand is that of the announced samples, and if not, why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathkernel.errors import PathKernelError, SampleIdError, UnsupportedModelError
from pathkernel.functional import ModelFunction, generators_untouched, takes_tensor_floats
from pathkernel.interrupts import attempt
from pathkernel.losses import batch_gradient, coupled_row_blocks, weighted_gradient
from pathkernel.trajectory.cotangents import cotangents_of
from pathkernel.trajectory.gradient_fit import (
    CAPTURED_TOLERANCE,
    GRADIENT_TOLERANCE,
    fit_captured,
    fit_gradient,
    left_over,
)
from pathkernel.trajectory.gradients import samples_of
from pathkernel.trajectory.step import MicroBatch
from pathkernel.trajectory.trajectory import Trajectory

ROWS = 64
"""Samples whose gradients are held at once for their norms."""

DRAWS = 16
"""Passes that show whether random numbers matter for the outputs: a layer that is skipped every other time is found but
once in 65,536 times, one that is skipped once in ten times four times out of five."""


def is_due(index: int, every: int | None) -> bool:
    """Whether a step is audited: every so many, never (0), or, for None, steps 0, 1, 2, 4, 8, … ."""
    if every is None:
        return index & (index - 1) == 0
    return every > 0 and index % every == 0


@dataclass(frozen=True)
class Circumstances:
    """What the recorder knows about a step besides its gradient, from which a cause can be named.

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
    """

    unseen: int = 0
    watched: str = ""
    moved: bool = False
    compiled: bool = False
    drew_from: tuple[str, ...] = ()
    announced_before: MicroBatch | None = None
    taken: bool = False


def audit(
    trajectory: Trajectory,
    index: int,
    batches: Sequence[MicroBatch],
    at: Tensor,
    found: Tensor,
    active: frozenset[str],
    changes: Mapping[str, Tensor],
    differentiated: frozenset[str],
    buffers: Mapping[str, Tensor],
    circumstances: Circumstances,
) -> None:
    r"""Compare a gradient with :math:`\sum_i J_i^\top \lambda_i` of the announced samples, up to clipping.

    Neither the loss nor any other network of the loop is evaluated where λ is on record; the watched one runs on a
    copy of its structure.

    Parameters
    ----------
    trajectory, index
        The record so far, and the number of the step.
    batches
        The announced micro-batches.
    at, found
        θ and the gradient, (P,).
    active
        Names of the parameters that have a gradient; the optimizer skips the others.
    changes, differentiated
        Named changes of the gradient, and which of them backward passes have made; see `Step`.
    buffers
        Buffers that have changed since recording began.
    circumstances
        For the message.

    Raises
    ------
    SampleIdError
        Naming the parameters that differ most, and the cause as far as it can be told.
    UnsupportedModelError
        Where the gradients agree by chance alone: what the network draws decides about its outputs, and is not known.
    """
    function, objective = trajectory.function(), trajectory.objective
    check_captured(trajectory, index, batches, circumstances.watched, circumstances.taken)

    def silenced(vector: Tensor) -> Tensor:
        for name, where in trajectory.layout.slices.items():
            if name not in active:
                vector[..., where] = 0
        return vector

    def of_samples(given: Sequence[MicroBatch]) -> Tensor:
        total = sum((changes[name] for name in differentiated & changes.keys()), torch.zeros_like(at))
        for batch in given:
            if batch.channel in differentiated:  # is in there
                continue
            total += _batch_gradient(trajectory, function, batch, at, buffers)
        return silenced(total)

    samples = of_samples(batches)
    named = [silenced(gradient) for gradient in objective.regularizer_gradients(function, at).values()]
    regularizers = sum(named[1:], named[0]) if named else None
    edits = [change for name, change in changes.items() if name not in differentiated]
    found = found - sum(edits, torch.zeros_like(found))
    types = {trajectory.precision, *(batch.state.autocast[1] for batch in batches if batch.state.autocast)}
    if takes_tensor_floats(trajectory.model, trajectory.precision):
        types.add(torch.float16)  # which has as many bits
    if all(batch.cotangents is not None for batch in batches):
        tolerance = max(CAPTURED_TOLERANCE[dtype] for dtype in types)

        def summed_norms() -> float:
            return sum(_summed_norms(trajectory, function, batch, at, buffers, silenced) for batch in batches)

        fits: Callable[[Tensor], bool] = lambda own: (  # noqa: E731
            fit_captured(trajectory.layout, found, own, regularizers, tolerance, summed_norms) is not None
        )
    else:
        tolerance = max(GRADIENT_TOLERANCE[dtype] for dtype in types)
        largest = max(found.norm().item(), samples.norm().item())

        def fits(own: Tensor) -> bool:
            whole = own if regularizers is None else own + regularizers
            close = fit_gradient(trajectory.layout, found, whole, tolerance).relative <= tolerance
            return close or largest <= 1e3 * torch.finfo(at.dtype).eps

    if fits(samples):
        if circumstances.drew_from and _has_a_state(trajectory, batches[-1], DRAWS):
            raise UnsupportedModelError(
                f"At step {index} the forward pass drew from {' and '.join(circumstances.drew_from)}, and the outputs "
                "depend on what it drew",
                "Passes are run again from the state of torch's random generators, which alone is on record; the "
                f"optimizer has {'moved already' if circumstances.taken else 'not moved'}",
                "Draw from torch's generators in `forward` (`torch.rand(())`), or before it, and hand what was drawn "
                "to the network among its inputs",
            )
        return
    cause = _cause(trajectory, batches, circumstances, lambda given: fits(of_samples(given)))
    expected = samples if regularizers is None else samples + regularizers
    grown = fit_gradient(trajectory.layout, found, expected, tolerance)
    fit = left_over(trajectory.layout, found, expected)
    worst = sorted(fit.parameters, key=lambda name: -fit.parameters[name])[:3]
    if grown.relative <= tolerance and not isinstance(grown.factor, Tensor):
        differs = f"is {grown.factor:.3g} times that of the announced samples"
    else:
        differs = (
            f"differs from that of the announced samples by {fit.relative:.2g} of its norm, "
            f"most in {', '.join(f'`{name}` ({fit.parameters[name]:.2g})' for name in worst)}"
        )
    raise SampleIdError(
        f"At step {index} the gradient {differs}{cause}",
        "The gradient must be the sum over the announced samples of their part of the loss, which may be clipped or "
        f"scaled down as a whole; the optimizer has {'moved already' if circumstances.taken else 'not moved'}",
        "Check that the ids are those of this batch (not shifted or shuffled again), that augmented inputs are "
        "passed as `recorder.batch(ids, inputs=x)`, that terms added to the loss that depend on parameters alone are "
        "named in `regularizers=`, and that backward passes which go round the outputs (penalties on gradients or "
        'hidden layers) and edits of gradients stand inside `with recorder.channel("name")`',
    )


def check_captured(
    trajectory: Trajectory, index: int, batches: Sequence[MicroBatch], watched: str, taken: bool
) -> None:
    """Refuse batches of which neither slopes were seen nor a loss is known that gives them.

    Raises
    ------
    SampleIdError
        With the cause as far as it can be told.
    """
    unseen = sum(not batch.captured for batch in batches)
    if trajectory.objective.known is not None or not unseen:
        return
    raise SampleIdError(
        f"At step {index} no backward pass came through the outputs of the watched {watched} for {unseen} of "
        f"{len(batches)} announced batches",
        "Without a loss, the slopes at the outputs are those of the loop's own backward pass; the optimizer has "
        f"{'moved already' if taken else 'not moved'}",
        "Give the recorder the module that the loop calls (the compiled one, the wrapper), call `backward()` rather "
        "than setting `p.grad`, let `returns=` pick tensors as they were returned, do not change outputs "
        "in place that are views, or write `KernelRecorder(..., loss=loss)`",
    )


def _batch_gradient(
    trajectory: Trajectory, function: ModelFunction, batch: MicroBatch, at: Tensor, buffers: Mapping[str, Tensor]
) -> Tensor:
    inputs, targets = samples_of(batch, trajectory.data)
    replayed = function.replaced(
        constants=buffers if batch.state.buffers is None else batch.state.buffers, state=batch.state
    )
    if batch.captured:
        cotangents = cotangents_of(batch, replayed, at, trajectory.objective, inputs, targets)
        return weighted_gradient(replayed, at, inputs, cotangents, as_trained=True)
    return batch_gradient(replayed, at, trajectory.objective, inputs, targets, batch.weights)


def _summed_norms(
    trajectory: Trajectory,
    function: ModelFunction,
    batch: MicroBatch,
    at: Tensor,
    buffers: Mapping[str, Tensor],
    silenced: Callable[[Tensor], Tensor],
) -> float:
    inputs, _ = samples_of(batch, trajectory.data)
    replayed = function.replaced(
        constants=buffers if batch.state.buffers is None else batch.state.buffers, state=batch.state
    )
    assert batch.cotangents is not None
    blocks = coupled_row_blocks(replayed, at, inputs, batch.cotangents, ROWS)
    return sum(silenced(rows).norm(dim=1).sum().item() for rows in blocks)


def _cause(
    trajectory: Trajectory,
    batches: Sequence[MicroBatch],
    seen: Circumstances,
    explained_by: Callable[[Sequence[MicroBatch]], bool],
) -> str:
    """What the recorder can tell of why a gradient is none of the announced samples, as the end of a sentence."""
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
    before = seen.announced_before
    if before is not None and len(batches) == 1 and len(before.ids) == len(batches[0].ids):
        one = batches[0]
        shifted = MicroBatch(
            before.ids, one.weights, before.inputs, before.targets, one.state, cotangents=one.cotangents
        )
        with generators_untouched():
            ran = attempt(lambda: explained_by([shifted]), (Exception, PathKernelError))
        if ran is True:
            return (
                ". It is that of the batch that was announced before: batches are announced one too early, as by "
                "prefetching"
            )
    return ""


def _has_a_state(trajectory: Trajectory, batch: MicroBatch, again: int = 1) -> bool:
    """Whether a copy of the network returns something else the second time, or at one of several more."""
    inputs, _ = samples_of(batch, trajectory.data)
    function = trajectory.function().replaced(constants=batch.state.buffers, state=batch.state)
    parameters = function.parameters(trajectory.initial)

    def outputs() -> Tensor:
        with function.running(gradients=False):
            return function.batch(parameters, function.cast(inputs))

    with generators_untouched():
        first = attempt(outputs, (Exception,))
        if not isinstance(first, Tensor):
            return False
        return any(attempt(lambda: torch.equal(first, outputs()), (Exception,)) is False for _ in range(again))
