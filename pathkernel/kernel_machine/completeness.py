"""Completeness of an explanation: little has no name, and the sum is what the network returns."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from pathkernel.errors import CertificateWarning, TrajectoryError
from pathkernel.kernel_machine.accumulator import Accumulator
from pathkernel.kernel_machine.curves import Curve
from pathkernel.quadrature import DiscreteGradient
from pathkernel.trajectory.batch_gradients import RecordedGradients
from pathkernel.trajectory.discrepancies import Discrepancies
from pathkernel.trajectory.trajectory import Trajectory

ROUNDING_LIMIT = 0.1
"""Part of the change of the outputs beyond which differences between recorded and recomputed gradients are no rounding.

Each step's gradient is checked by itself, but the gradients of a step may be small beside the largest of the run and
still move the outputs. A bias before BatchNorm under Adam in float32 takes a few per cent.
"""

LOW_ROUNDING_LIMIT = 1.0
"""The same for passes that were rounded to eight or eleven bits, and whose slopes are on record.

Each step of theirs has been compared at its own scale, to 5e-2. Samples are rounded one by one there, which the sum
that the loop took is not, and Adam divides what is left by itself wherever samples cancel: one run in twenty of a small
network goes beyond a tenth, with ids that are right. More than all that moved the outputs is no account of them.
"""

END = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Part of the outputs by which what is added up may miss them, beside what the recorded θ were rounded by.

Values of f telescope along the path. What is left are roundings of the optimizer's own arithmetic and of inner
products: 84 roundings in float32, and in float64 what a network that amplifies them may make of as many.
"""

ROUNDED = 16.0
"""Factor by which the rounding of θ may have moved the outputs further than in proportion to θ itself."""


def check_unexplained(accumulator: Accumulator, output: Tensor, recorded: RecordedGradients, allowed: float) -> None:
    """Fail loudly where too much of the sum has no name.

    Parameters
    ----------
    accumulator
        The sum.
    output
        What the network returns at the end, (Q,).
    recorded
        The gradients that it is of.
    allowed
        Part of the change of the outputs that may be unexplained.

    Warns
    -----
    CertificateWarning
        Where more of it is the rounding of passes in few bits than would be let through in float32.

    Raises
    ------
    TrajectoryError
        Naming the largest change without a name; and where outputs or shares are not finite, the step that led there.
    """
    moved = (output - accumulator.channels["initial"]).norm().item()
    rounding = accumulator.channels["rounding"].norm().item() if "rounding" in accumulator.channels else 0.0
    size = accumulator.channels["unexplained"].norm().item() if "unexplained" in accumulator.channels else 0.0
    finite = bool(np.isfinite([moved, rounding, size]).all())
    if not finite and bool(accumulator.channels["initial"].isfinite().all()):  # else it is the query that is not
        raise _diverged(recorded.trajectory)
    limit = LOW_ROUNDING_LIMIT if recorded.rounded_to else ROUNDING_LIMIT
    if rounding > max(limit, allowed) * moved:
        part = rounding / max(moved, 1e-300)
        expected = f"They are rounding, and {ROUNDING_LIMIT:.0%} is more than rounding"
        write = (
            "Record with `KernelRecorder(..., audit_every=1)`, which tells at which step ids, inputs or loss are not "
            "those of the loop, or in float64"
        )
        if recorded.rounded_to:
            types = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in recorded.rounded_to))
            expected = f"They are the rounding of {types}, of which a sum over samples says nothing beyond {limit:.0%}"
            write = (
                "Leave out parameters whose gradient is nothing but rounding (`bias=False` before BatchNorm), train "
                f"in float32, or allow more with `KernelMachine(..., unexplained={float(f'{2 * part:.1g}')})`"
            )
        raise TrajectoryError(
            f"{part:.1%} of what moved these outputs are differences between the recorded gradients and those of the "
            "recorded samples",
            expected,
            write,
        )
    if rounding > max(ROUNDING_LIMIT, allowed) * moved:
        warnings.warn(
            CertificateWarning(
                f"{rounding / max(moved, 1e-300):.1%} of what moved these outputs are the rounding of the passes in "
                "training",
                "Shares account for the rest; in float32 rounding takes less than a per cent",
                'See `why.channels["rounding"]`; train in float32 where shares are to account for all',
            ),
            stacklevel=5,
        )
    if size <= allowed * moved:
        return
    where, write = _most_unexplained(recorded.trajectory, recorded.discrepancies)
    part = size / max(moved, 1e-300)  # changes that took back what training did are larger than what is left
    enough = max(1.0, float(f"{2 * part:.1g}"))
    raise TrajectoryError(
        f"{part:.1%} of what moved these outputs is unexplained; most of it is {where}",
        f"No more than {allowed:.1%} may come from changes that no sample and no named channel stands for",
        f"{write}, or allow more with `KernelMachine(..., unexplained={enough})`",
    )


def _diverged(trajectory: Trajectory) -> TrajectoryError:
    """Error for outputs that are not finite along the path, with the step that led there, and how to ask before it.

    It is the step that moved the parameters farthest, or first out of the finite numbers: from where it leads to,
    passes, their gradients and products of these overflow.
    """
    farthest, step = -1.0, 0
    before = trajectory.vector(0).double()
    for s in range(len(trajectory)):
        after = trajectory.vector(s + 1).double()
        distance = float((after - before).norm())
        if not np.isfinite(distance):
            farthest, step = distance, s
            break
        if distance > farthest:
            farthest, step = distance, s
        before = after
    write = (
        f"Write `KernelMachine(trajectory, at={step})` or `trajectory.until({step})`, of a game "
        f"`game.machine(player, at={step})`; at an earlier step where it had diverged by then"
    )
    if step == 0:  # a path to where it starts has no steps
        write = "Record training with smaller steps: before step 0 the network is untrained, and no sample has a share"
    return TrajectoryError(
        f"Outputs along this path are not finite numbers: training diverged. Step {step} moved the parameters "
        f"farthest, by {farthest:.2g} from a norm of {float(trajectory.vector(step).double().norm()):.2g}",
        "A network that diverged is no sum of finite shares; what it was before that is",
        write,
    )


def _most_unexplained(trajectory: Trajectory, discrepancies: Discrepancies) -> tuple[str, str]:
    """The largest change without a name, and how such changes get one."""
    layout = trajectory.layout
    size, step, name = discrepancies.largest()
    where = "where the gradient is zero and the optimizer moved all the same"
    write = 'Make such changes inside `with recorder.channel("projection"):`'
    if size:
        where = (
            f"at step {step}, which moved `{name}` by {size:.2g} otherwise than {trajectory.rule.name} does with "
            "the recorded gradients"
        )
        write = (
            "Make a new KernelRecorder where the optimizer's state was edited, from which on it is the channel "
            '"memory"; check a rule of your own with `pathkernel.testing.check_update_rule`'
        )
    changes = [s for s in trajectory.segments() if s.step is None and s.channel == "unexplained"]
    if changes:
        largest = max(changes, key=lambda change: change.displacement.norm().item())
        by_name = layout.unflatten(largest.displacement)
        worst = max(by_name, key=lambda name: by_name[name].norm().item())
        if by_name[worst].norm().item() >= size:
            following = [s.step.index for s in trajectory.segments() if s.step and s.start is largest.end]
            before = f"before step {following[0]}" if following else "after the last step"
            where = f"a change of `{worst}` by {by_name[worst].norm().item():.2g} {before}"
            write = 'Make such changes inside `with recorder.channel("projection"):`'
    return where, write


def check_end(accumulator: Accumulator, curve: Curve, output: Tensor, discrepancies: Discrepancies) -> None:
    """Compare the sum of a forward sweep along a curve with the network at the end of the record.

    Raises
    ------
    TrajectoryError
        Where they differ by more than rounding, and more than the quadrature missed.
    """
    trajectory = curve.trajectory
    known = output.isfinite()  # a network may return −∞ for what cannot be
    found, output = sum(accumulator.channels.values(), torch.zeros(()))[known], output[known]
    missed = accumulator.quadrature_error[known]
    if not len(output):
        return
    types = {trajectory.precision, curve.queries.function.dtype}
    moved = (output - accumulator.channels["initial"][known]).abs().max().item()
    # What θ was rounded by in all its steps is on record, and moved the outputs about as far, in proportion.
    went = (trajectory.final.double() - trajectory.initial.double()).norm().item()
    rounded = discrepancies.rounding / max(went, torch.finfo(torch.float64).tiny)
    allowed = max(END[dtype] for dtype in types) * max(moved, output.abs().max().item())
    allowed += ROUNDED * rounded * moved
    off = found.sub(output).abs()
    if not isinstance(curve.quadrature, DiscreteGradient):  # which makes up for what it missed
        off = off - missed
    worst = off.nan_to_num(nan=torch.inf).max().item()
    if worst > allowed:
        largest = output.abs().max().item()
        raise TrajectoryError(
            f"Samples and channels add up to outputs that are up to {worst:.2g} off those of the network at the "
            f"end of the record, the largest of which is {largest:.2g}",
            f"They are its outputs to rounding, here {allowed:.1g}: the steps on record are then what the update "
            "rule makes of the recorded samples",
            "Record with `KernelRecorder(..., audit_every=1)`, which tells at which step ids, inputs or loss are "
            "not those of the loop; check a rule of your own with `pathkernel.testing.check_update_rule`",
        )
