r"""Steps that are not stored but trained again from a keyframe when they are read.

A keyframe holds θ and the optimizer's state; of the steps up to the next one only batches, settings and a checksum are
kept. With keyframes every k steps a run of S steps takes O(S/k · P) to keep and O(k · P) to read: :math:`\sqrt S`
each at the best k.

Floating-point sums depend on the number of threads and on the machine, so what is trained again is not believed: the
gradient of every step and θ after it are compared with their checksums, and θ with the next keyframe bit by bit.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pathkernel.errors import SENSELESS, PathKernelError, RecordingError, TrajectoryError
from pathkernel.runtime.checksum import checksum
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.trajectory.retraining import Replay
from pathkernel.trajectory.retraining import state_of as state_of
from pathkernel.trajectory.run import End, Extension, Run
from pathkernel.trajectory.step import ReplayNotes, Step
from pathkernel.trajectory.store import StepSummary, Store


def abridged(
    step: Step, notes: ReplayNotes, *, keyframe: Mapping[str, Any] | None = None, gradient: bool = False
) -> Step:
    """Leave out what a replay gives back.

    Parameters
    ----------
    step
        A step; its vectors may be missing already.
    notes
        See `ReplayNotes`.
    keyframe
        The optimizer's state before the step by parameter name; with it θ is kept, too.
    gradient
        Keep the gradient: the loop changed it in a way that only the loop knows.
    """
    nothing = torch.empty(0, dtype=step.before.dtype)  # a view would keep the whole
    return replace(
        step,
        before=step.before if keyframe is not None else nothing,
        after=nothing,
        gradient=step.gradient if gradient else nothing,
        frozen=keyframe or {},
        replay=notes,
    )


class ReplayStore(Store):
    """A store that holds abridged steps, and gives them back in full.

    Parameters
    ----------
    inner
        Where abridged steps are kept; full steps among them are given back as they are.
    replay
        How steps are taken again.
    threads
        Number of threads that the run was recorded with, for the message of a replay that differs.

    Notes
    -----
    Reading a step replays its block; the two blocks read last are kept, since a sweep looks at both ends of a step.
    Time: one forward and backward pass and one optimizer step for each step of the block. Memory: two blocks.
    """

    replays = True
    _end: tuple[int, Tensor] | None = None  # for how many steps, and where they end

    def __init__(self, inner: Store, replay: Replay, threads: int | None = None) -> None:
        self.inner, self.replay, self.threads = inner, replay, threads
        self._blocks: OrderedDict[int, list[Step]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_blocks": OrderedDict(), "_end": None}

    @property
    def stopped(self) -> bool:  # type: ignore[override]
        """True where the inner store takes no more steps."""
        return self.inner.stopped

    @property
    def exists(self) -> bool:  # type: ignore[override]
        """True where the inner store holds steps of an earlier run."""
        return self.inner.exists

    def begin(self, run: Run) -> None:
        """Begin the inner store; see `Store.begin`."""
        self.replay.run = run
        self.inner.begin(run)

    def note_end(self, end: End) -> None:
        """Hand on."""
        self.inner.note_end(end)

    def append(self, step: Step) -> None:
        """Put a step, abridged or full, behind the others."""
        self.inner.append(step)

    def __len__(self) -> int:
        return len(self.inner)

    def until(self, length: int) -> ReplayStore:
        """The first steps alone, so many of them; what comes after the last is not trained again."""
        return ReplayStore(self.inner.until(length), self.replay, self.threads)

    def extend(self, tail: Tensor, pad: Extension) -> None:
        """Refuse: checksums on record are of the parameters that there were.

        Raises
        ------
        RecordingError
            Always.
        """
        raise RecordingError(
            f"{tail.numel()} parameters joined the optimizer during a recording with keyframes",
            "Steps are replayed with the parameters that were there when recording began",
            "Give the optimizer all parameters at the start (they may stay frozen until later), or record with "
            "`Schedule(every=1)`",
        )

    def flush(self) -> None:
        """Write what waits to be written."""
        self.inner.flush()

    def write_end(self) -> None:
        """Write the end of the inner store; see `Store.write_end`."""
        self.inner.write_end()

    def close(self) -> None:
        """Close the inner store; see `Store.close`."""
        self.inner.close()

    def read(self, index: int) -> Step:
        """The step with this index, in full.

        Raises
        ------
        TrajectoryError
            Where the replay differs from the run, naming the first step that does.
        """
        index = range(len(self.inner))[index]
        step = self.inner.read(index)
        if step.replay is None:
            return step
        start = step.replay.keyframe
        block = self._blocks.pop(start, [])
        if index - start >= len(block):
            block = self._replayed(start)
        self._blocks[start] = block
        while len(self._blocks) > 2:
            self._blocks.popitem(last=False)
        return block[index - start]

    def end_of_steps(self) -> Tensor:
        """θ after the last step: that of the live network, where it has the checksum on record, as after training."""
        length = len(self.inner)
        if self._end is None or self._end[0] != length:
            self._end = length, self._live_end(self.inner.read(length - 1))
        return self._end[1]

    def _live_end(self, last: Step) -> Tensor:
        run = self.replay.run
        live = dict(run.model.named_parameters(remove_duplicate=False))
        if last.replay is not None and all(name in live for name in run.layout.names):
            parameters = {name: live[name].detach() for name in run.layout.names}
            if checksum(parameters.values()) == last.replay.checksum:
                return run.layout.flatten(parameters, run.initial.dtype).clone()
        return self.read(len(self.inner) - 1).after

    def summary(self, index: int) -> StepSummary:
        """Step as it is on record; nothing is trained."""
        index = range(len(self.inner))[index]
        step = self.inner.read(index)
        if step.replay is None or step.replay.keyframe != index:
            return StepSummary(step)
        return StepSummary(step, step.frozen)

    def _replayed(self, start: int) -> list[Step]:
        """All steps of the block that begins with a keyframe."""
        taken = result_or_error(lambda: self._taken_again(start), (*SENSELESS, NotImplementedError))
        if isinstance(taken, PathKernelError):
            raise taken
        if isinstance(taken, Exception):  # of an optimizer that is not this one, or a state that it cannot have had
            raise TrajectoryError(
                f"Steps from {start} on cannot be trained again ({type(taken).__name__}: {str(taken)[:200]})",
                "The optimizer, its state on record, the network and the loss must be those of the recording",
                "Read it with the objects of the recording, and look for damage with `pathkernel verify`",
            ) from taken
        return taken

    def _taken_again(self, start: int) -> list[Step]:
        first = self.inner.read(start)
        self.replay.restore(first.before, self.summary(start).state or {})
        self._check_keyframe(start, first)
        block: list[Step] = []
        for index in range(start, len(self.inner)):
            record = self.inner.read(index)
            notes = record.replay
            if notes is None or notes.keyframe != start:
                if not record.changes and record.before.numel():
                    self._check(torch.equal(block[-1].after, record.before), index - 1)
                    block[-1] = replace(block[-1], after=record.before)  # one tensor for both, as in a full record
                break
            block.append(self.replay.take(record))
            # A gradient that is another one by a few last bits may well lead to the same θ.
            self._check(notes.gradient is None or notes.gradient == self.replay.received, index)
            self._check(notes.checksum == self.replay.checksum(), index)
        return block

    def _check_keyframe(self, start: int, first: Step) -> None:
        """Compare a keyframe with where the step before ended, or with where the path begins."""
        if first.changes:
            return
        if start == 0:
            self._check(torch.equal(first.before, self.replay.run.initial), 0)
        elif (before := self.inner.read(start - 1).replay) is not None:
            self._check(self.replay.checksum() == before.checksum, start)

    def _check(self, same: bool, index: int) -> None:
        threads = torch.get_num_threads()
        other = f" (recorded with {self.threads} threads, now {threads})" if self.threads not in (None, threads) else ""
        if not same:
            raise TrajectoryError(
                f"Step {index} came out differently when it was trained again from its keyframe{other}",
                "A replay gives the recorded weights to the last bit; rounding depends on the number of threads, the "
                "machine, the versions of torch, and on data and model being what they were",
                f"Write `torch.set_num_threads({self.threads or 'n'})` with the number of the recording and read on "
                "the machine that recorded, or record with `Schedule(every=1)`",
            )
