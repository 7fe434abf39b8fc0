"""Batches that were announced and whose gradients have not reached a step yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pathkernel.errors import SampleIdError
from pathkernel.functional import ForwardState, modes_of
from pathkernel.recording.forward import ForwardWatcher
from pathkernel.recording.live import LiveParameters
from pathkernel.trajectory.step import MicroBatch


def checked_ids(ids: Tensor, samples: int) -> Tensor:
    """Sample ids, (B,) int64.

    Raises
    ------
    SampleIdError
        Unless they are a list of integers from 0 to ``samples`` − 1.
    """
    integral = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not integral or ids.dim() != 1 or len(ids) == 0 or ids.min() < 0 or ids.max() >= samples:
        raise SampleIdError(
            f"Sample ids {ids.tolist() if ids.numel() <= 8 else f'of shape {tuple(ids.shape)}'} "
            f"({str(ids.dtype).removeprefix('torch.')}) were announced"
            + (f", from {ids.min().item()} to {ids.max().item()}" if ids.numel() else ""),
            f"Ids are a list of integers from 0 to {samples - 1}, the rows of `data`",
            "Write `recorder.batch(ids)` with the positions of the batch's samples in `data`",
        )
    return ids.to(torch.int64).cpu().clone()


class PendingBatches:
    """Keeps announced batches until a step takes them, and drops those whose gradients never got there.

    A hook on every parameter tells when a gradient arrives: a batch whose gradient has not arrived by the time of
    the next announcement was not used, and gradients that had been cleared before one arrives were skipped.

    Parameters
    ----------
    model
        The module that the loop calls.
    live
        The parameters in training.
    stages
        Gradients that a step takes of the same batch.
    buffers
        Gives the buffers that have changed since recording began.
    dropped
        Called when batches are dropped whose gradients had arrived.
    """

    def __init__(
        self,
        model: nn.Module,
        live: LiveParameters,
        stages: int,
        buffers: Callable[[], Mapping[str, Tensor]],
        dropped: Callable[[], None],
    ) -> None:
        self.model, self.live, self.dropped = model, live, dropped
        self.batches: list[MicroBatch] = []
        self._forward = ForwardWatcher(model, self._forward_ran, buffers, stages)
        self._listening: dict[str, Any] | None = None
        self._arrived, self._seen = True, False

    def start(self) -> None:
        """Begin to listen."""
        self._listening = {}
        self._forward.start()

    def stop(self) -> None:
        """Take all hooks off and forget what was announced."""
        for handle in (self._listening or {}).values():
            handle.remove()
        self._forward.stop()
        self._listening, self.batches, self._arrived = None, [], True

    def announce(self, batch: MicroBatch) -> None:
        """Take note of the samples of the next backward pass."""
        self._listen()
        if not self._arrived:
            del self.batches[-1:]  # the batch before this one was never used, as after an early `break`
        self.batches.append(replace(batch, state=ForwardState(modes_of(self.model))))
        self._arrived = self._seen = False
        self._forward.expect()

    def take(self) -> tuple[MicroBatch, ...]:
        """The batches of a step; nothing is pending afterwards."""
        taken, self.batches = tuple(self.batches), []
        return taken

    def _forward_ran(self, state: ForwardState) -> None:
        if self.batches:
            batch = self.batches[-1]
            now = replace(batch, later=(*batch.later, state)) if self._seen else replace(batch, state=state)
            self.batches[-1], self._seen = now, True

    def _listen(self) -> None:
        """Be told when gradients arrive; parameters that are unfrozen or added on the way are met here."""
        for name, p in self.live.named.items():
            if self._listening is not None and p.requires_grad and name not in self._listening:
                self._listening[name] = p.register_hook(self._gradient_arrives)

    def _gradient_arrives(self, gradient: Tensor) -> None:
        """Called before a gradient is added to `.grad`, at which moment it shows whether those before were cleared."""
        if not self._arrived and len(self.batches) > 1 and self._gradients_were_cleared():
            del self.batches[:-1]  # a skipped step, or one that overflowed under loss scaling
            self.dropped()
        self._arrived = True

    def _gradients_were_cleared(self) -> bool:
        gradients = list(self.live.gradients().values())
        if not gradients:
            return True
        norms = torch.stack(torch._foreach_norm(gradients, float("inf")))
        return bool((norms == 0).all() or not norms.isfinite().all())
