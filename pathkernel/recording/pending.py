"""Batches that were announced and whose gradients have not reached a step yet."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pathkernel.errors import SampleIdError
from pathkernel.functional import ForwardState
from pathkernel.recording.forward import ForwardWatcher
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.modules import WatchedModules
from pathkernel.trajectory.step import MicroBatch


def checked_ids(ids: Tensor, samples: int) -> Tensor:
    """Sample ids, (B,) int64.

    Raises
    ------
    SampleIdError
        Unless they are a list of integers from 0 to ``samples`` − 1.
    """
    integral = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    low, high = ids.aminmax() if integral and ids.numel() else (0, 0)
    if not integral or ids.dim() != 1 or len(ids) == 0 or int(low) < 0 or int(high) >= samples:
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

    A batch whose gradient has not arrived by the time of the next announcement was not used, and gradients that had
    been cleared before one arrives were skipped. Where several batches wait for a step, a hook on every parameter tells
    when a gradient arrives; in a loop with one batch in each step nobody has to be told.

    Parameters
    ----------
    model
        The module that the loop calls.
    live
        The parameters in training.
    stages
        Gradients that a step takes of the same batch.
    modules
        The submodules of the model.
    dropped
        Called when batches are dropped whose gradients had arrived.
    """

    def __init__(
        self,
        model: nn.Module,
        live: LiveParameters,
        stages: int,
        modules: WatchedModules,
        dropped: Callable[[], None],
    ) -> None:
        self.live, self.dropped, self._modules = live, dropped, modules
        self.batches: list[MicroBatch] = []
        self._forward = ForwardWatcher(model, self._forward_ran, modules, stages)
        self._listening: dict[str, Any] = {}
        self._marks: list[tuple[Any, int]] = []
        self._unseen = ForwardState()  # of a batch of which no pass of the whole model is seen
        self._watching = self._seen = False
        self._arrived = True

    def start(self) -> None:
        """Begin to listen."""
        self._watching = True
        self._forward.start()

    def stop(self) -> None:
        """Take all hooks off and forget what was announced."""
        self._forward.stop()
        self._stop_listening()
        self._watching, self.batches, self._arrived = False, [], True

    def announce(self, batch: MicroBatch) -> None:
        """Take note of the samples of the next backward pass."""
        if self.batches:
            if not (self._arrived or self._gradients_differ()):
                del self.batches[-1:]  # the batch before this one was never used, as after an early `break`
            self._listen()
        modes = self._modules.modes()
        if modes != self._unseen.modes:
            self._unseen = ForwardState(modes)
        self.batches.append(MicroBatch(batch.ids, batch.weights, batch.inputs, batch.targets, self._unseen))
        self._arrived = self._seen = False
        if not self._listening:
            self._mark_gradients()
        self._forward.expect()

    def take(self) -> tuple[MicroBatch, ...]:
        """The batches of a step; nothing is pending afterwards."""
        taken, self.batches = tuple(self.batches), []
        if len(taken) == 1:
            self._stop_listening()
        return taken

    def _forward_ran(self, state: ForwardState) -> None:
        if self.batches:
            batch = self.batches[-1]
            first, later = (batch.state, (*batch.later, state)) if self._seen else (state, ())
            self.batches[-1] = MicroBatch(batch.ids, batch.weights, batch.inputs, batch.targets, first, later)
            self._seen = True

    def _mark_gradients(self) -> None:
        """Remember which gradients there are, without keeping them."""
        found = [p.grad for p in self.live.named.values()]
        self._marks = [(None, 0) if g is None else (weakref.ref(g), g._version) for g in found]

    def _gradients_differ(self) -> bool:
        """Whether a gradient has been made, changed or cleared since they were marked."""
        if self._listening:
            return False
        found = [p.grad for p in self.live.named.values()]
        if len(found) != len(self._marks):
            return True
        return any(
            g is not (mark and mark()) or (g is not None and g._version != version)
            for g, (mark, version) in zip(found, self._marks, strict=True)
        )

    def _listen(self) -> None:
        """Be told when gradients arrive; parameters that are unfrozen or added on the way are met here."""
        for name, p in self.live.named.items():
            if self._watching and p.requires_grad and name not in self._listening:
                self._listening[name] = p.register_hook(self._gradient_arrives)

    def _stop_listening(self) -> None:
        for handle in self._listening.values():
            handle.remove()
        self._listening = {}

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
