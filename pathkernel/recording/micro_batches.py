"""Batches that were announced and whose gradients have not reached a step yet."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pathkernel.errors import InputError, SampleIdError
from pathkernel.gradients.forward_state import ForwardState
from pathkernel.gradients.model_function import ModelFunction
from pathkernel.recording.announced_batch import AnnouncedBatch, Delivery
from pathkernel.recording.forward import ForwardWatcher
from pathkernel.recording.forward_pass import ForwardPass, zero_outputs
from pathkernel.recording.kept_inputs import KeptInputs
from pathkernel.recording.live import LiveParameters
from pathkernel.recording.modules import WatchedModules
from pathkernel.recording.sources import Sources
from pathkernel.trajectory.step import MicroBatch


class PendingBatches:
    """Keeps announced batches until a step takes them, with what the passes of the loop itself say of their gradients.

    A forward pass belongs to the batch that was announced last before it, or, where that one has one already, to one
    that was announced since, before the backward pass. It belongs to the step if its backward pass added to the
    gradients of the parameters after these were cleared last; otherwise nobody takes it.

    Parameters
    ----------
    parts, names
        The modules that the loop calls, one after the other, and their names.
    live
        The parameters in training.
    stages
        Gradients that a step takes of the same batch.
    modules
        The submodules of the model.
    function
        The network.
    inputs
        Decides what is kept of what the network was given.
    sources
        Counts the samples of passes that have no ids.
    keep
        Decides what is kept of λ, (n, C): all of it or some, see `pathkernel.trajectory.cotangents.kept_cotangents`.
    dropped
        Called when batches are dropped whose gradients had arrived.

    Attributes
    ----------
    in_use
        Whether some optimizer has stepped by what is pending, so that it stays when gradients are cleared.
    several
        Whether a network has several optimizers: one may step by a loss before the backward pass of another loss on the
        same outputs.
    first
        Called with the first forward pass of a batch, as it would be kept; None where nobody asks any more.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        names: Sequence[str],
        live: LiveParameters,
        stages: int,
        modules: WatchedModules,
        function: ModelFunction,
        inputs: KeptInputs,
        sources: Sources,
        keep: Callable[[Tensor, MicroBatch], tuple[Tensor | None, Tensor | None]],
        dropped: Callable[[], None],
    ) -> None:
        self.live, self.stages, self.keep, self.dropped, self._modules = live, stages, keep, dropped, modules
        self.inputs, self.sources = inputs, sources
        self.first: Callable[[MicroBatch], None] | None = None
        self.watcher = ForwardWatcher(
            parts,
            names,
            modules,
            function,
            self._ran,
            self._backward_begins,
            self._pass_arrived,
            self._unseen_arrived,
        )
        self._announced: list[AnnouncedBatch] = []
        self._strangers: list[ForwardPass] = []
        self._taken: tuple[MicroBatch, ...] | None = None
        self._unseen_gradients: dict[nn.Parameter, weakref.ref[Tensor]] = {}
        self._scale = 1.0
        self.in_use = self.several = False
        self._spent: AnnouncedBatch | None = None  # has been stepped by, and another optimizer may step by it, too
        self._unseen = ForwardState()  # of a batch of which no pass of the whole model is seen

    def start(self) -> None:
        """Begin to listen."""
        self.watcher.copies = self.inputs.copies(None)
        self.watcher.start()
        self.listen()

    def stop(self) -> None:
        """Take all hooks off and forget what was announced."""
        self.watcher.stop()
        self.forget()

    def listen(self) -> None:
        """Be told of gradients; parameters that are unfrozen or added on the way are met here."""
        if self.watcher.started:
            self.watcher.listen(list(self.live.named.values()))

    def announce(self, batch: MicroBatch, delivery: Delivery) -> None:
        """Take note of the samples of the next backward pass; see `AnnouncedBatch`."""
        waits = None if batch.source is None else self.last  # passes of a source may come before its own
        self._announced = [one for one in self._announced if one.used or one is waits]
        modes = self._modules.modes()
        if modes != self._unseen.modes:
            self._unseen = ForwardState(modes)
        self._announced.append(AnnouncedBatch(batch, self._unseen, delivery))
        if batch.source is None:
            self.inputs.announced(delivery.handed_out)
        self.watcher.copies = self.inputs.copies(delivery.keep) or not batch.has_targets
        self._taken = self._spent = None
        self.listen()

    @property
    def batches(self) -> tuple[MicroBatch, ...]:
        """Batches whose gradients are in that of the parameters.

        Raises
        ------
        SampleIdError
            Where a pass was of another number of samples, or of samples that were not announced.
        """
        if self._taken is None:
            if self._announced:
                self._check_strangers()
            self.inputs.differences = []
            uncounted = self._uncounted()
            for one, batch in zip(uncounted, self.sources.number([one.batch for one in uncounted]), strict=True):
                one.batch = batch
            found = [batch for one in self._announced for batch in self._micro_batches(one)]
            if not found and self._announced:  # nothing was seen: perhaps the gradient was made in another way
                last = self._announced[-1]
                found = [one.unseen for one in self._announced if one.arrived]
                found = found or [self._round_outputs(last) or last.unseen]
            self._taken = tuple(found)
        return self._taken

    @property
    def differentiated(self) -> frozenset[str]:
        """Names under which a backward pass has added to the gradients."""
        return frozenset(self.watcher.differentiated)

    @property
    def passes(self) -> list[ForwardPass]:
        """The forward passes of which these are."""
        return [one for announced in self._announced for one in announced.passes]

    @property
    def named(self) -> list[tuple[MicroBatch, list[Tensor]]]:
        """Samples whose slopes came under a name, with the outputs of their pass, where somebody will ask for these."""
        every = [(one, each) for one in self._announced for each in one.passes]
        return [
            (self._seen(announced, each, channel), each.outputs)
            for announced, each in every
            for channel in each.channels
            if channel is not None and each.outputs is not None
        ]

    @property
    def in_flight(self) -> bool:
        """True where gradients have arrived, or may yet."""
        return any(one.used for one in self._announced)

    @property
    def last(self) -> AnnouncedBatch | None:
        """The batch that was announced last, by the loop itself: passes outside of sources are of none."""
        return next((one for one in reversed(self._announced) if one.batch.source is None), None)

    def scale_of_loss(self, scale: float) -> None:
        """Divide by what the loss of the step at hand was multiplied with: its gradients have been divided by it."""
        if scale != self._scale:
            self._scale, self._taken = scale, None

    def take(self) -> tuple[MicroBatch, ...]:
        """The batches of a step; nothing is pending afterwards, but a batch that was announced ahead of its pass."""
        taken, ahead, uncounted = self.batches, self._ahead, self._uncounted()
        self.sources.count([one.batch for one in uncounted])
        for one in uncounted:
            one.counted = True
        if ahead is not None:
            self._announced.remove(ahead)
        self.forget()
        if ahead is not None:
            self._announced.append(ahead)
        return taken

    def _uncounted(self) -> list[AnnouncedBatch]:
        """Batches of sources whose samples have no ids yet; passes whose gradients were cleared get none."""
        return [one for one in self._announced if one.batch.source is not None and one.passes and not one.counted]

    @property
    def _ahead(self) -> AnnouncedBatch | None:
        """The last batch, where it came while those before it were under way, as loaders that fetch ahead give it."""
        last = self.last
        if last is None or last.ran is not None or last.used:
            return None
        return last if any(one.used for one in self._announced) else None

    def release(self) -> None:
        """No further optimizer steps by a batch that has been stepped by."""
        if self._spent in self._announced:
            self._announced.remove(self._spent)
            self._taken = None
        self._spent = None

    def forget(self) -> None:
        """Let go of what was announced."""
        if self.several and self._announced:
            self._spent = self.last or self._announced[-1]
        for stranger in self._strangers:
            stranger.forget()
        for one in self._announced:
            one.drop()
        self._announced, self._strangers, self._taken, self._unseen_gradients = [], [], None, {}
        self.watcher.differentiated = set()

    # -- forward ------------------------------------------------------------------------------------------------

    def _ran(self, one: ForwardPass) -> None:
        if self.sources.name is not None and one.call is not None:
            counted = self.sources.batch(one.call, self.inputs.reader)
            self.announce(counted, Delivery(keep=True))
            last: AnnouncedBatch | None = self._announced[-1]
        else:
            last = self.last if self._announced else self._spent
        if last is not None:
            last.waiting.append(weakref.ref(one))
            last.ran = one.state, one.shapes
            one.owner = last
            if self.first is not None and one.call is not None:
                first, self.first = self.first, None
                delivery = Delivery(keep=True, rows=last.delivery.rows)
                batch, inputs, shared = self.inputs.of(last.batch, one.call, delivery, due=False)
                first(replace(batch, inputs=inputs, state=replace(one.state, arguments=shared)))

    # -- backward -----------------------------------------------------------------------------------------------

    def forget_cleared(self) -> None:
        """Let go of what arrived where gradients were cleared since: they are nobody's any more."""
        self._forget_cleared(overflowed=False)  # what overflowed has not been cleared, and may be edited yet

    def _backward_begins(self) -> None:
        """Hook before a backward pass adds to gradients: to overflowed ones, nobody who goes on adds any more."""
        self._forget_cleared(overflowed=True)

    def _forget_cleared(self, overflowed: bool) -> None:
        if self.in_use:
            return
        arrived = any(one.passes or one.arrived for one in self._announced)
        named = self.watcher.differentiated  # a penalty need not come through outputs
        if not (arrived or named or self._strangers) or not self._gradients_were_cleared(overflowed):
            return
        # The further stages of a step clear the gradient of the stage before, which has been used.
        kept = self._announced[-1] if self.stages > 1 and self._announced else None
        for stranger in self._strangers:
            stranger.forget()
        for one in self._announced:
            if one is not kept:
                one.drop()
        self._strangers, self._taken, self.watcher.differentiated = [], None, set()
        last = (*self._announced[-1:], self.last)
        self._announced = [one for one in self._announced if one.used or one in last]
        self.dropped()

    def _pass_arrived(self, one: ForwardPass) -> None:
        owner = one.owner
        again = owner is not None and owner.batch.source is None and owner.passes and one not in owner.passes
        if owner is None or (again and self.stages == 1):
            # It may be of a batch that was announced after the pass, and before its backward pass.
            last = self.last
            if last is not None and not last.used:
                owner = one.owner = last
        self._taken = None
        if self.several and owner is not None and owner not in self._announced:
            self._announced.insert(0, owner)  # another optimizer has stepped by these samples already
        if owner is None or owner not in self._announced:
            # What was named is booked under its name, whosesoever samples it is of.
            if one not in self._strangers and self.watcher.channel is None:
                self._strangers.append(one)
        elif one not in owner.passes:
            owner.passes.append(one)
            if len(owner.passes) > 1:
                order = {waiting(): place for place, waiting in enumerate(owner.waiting)}
                owner.passes.sort(key=lambda each: order.get(each, len(order)))

    def _unseen_arrived(self, parameter: nn.Parameter) -> None:
        """A gradient arrived by a backward pass of which no forward pass was seen."""
        gradient = parameter.grad
        before = self._unseen_gradients.get(parameter)
        if gradient is not None and (before is None or before() is not gradient):
            self._unseen_gradients[parameter] = weakref.ref(gradient)
            if before is not None and self._announced and not self._announced[-1].arrived:  # the one before was cleared
                for one in self._announced:
                    one.arrived = False
        if self._announced and not self._announced[-1].used:
            self._announced[-1].arrived, self._taken = True, None

    def _gradients_were_cleared(self, overflowed: bool) -> bool:
        gradients = list(self.live.gradients().values())
        if not gradients:
            return True
        norms = torch.stack(torch._foreach_norm(gradients, float("inf")))
        return bool((norms == 0).all() or (overflowed and not norms.isfinite().all()))

    # -- for the record -----------------------------------------------------------------------------------------

    def _micro_batches(self, announced: AnnouncedBatch) -> list[MicroBatch]:
        """The announced batch, once for each pass, or with the passes of several stages."""
        if not announced.passes:
            return [announced.unseen] if announced.arrived else []
        if self.stages > 1:
            first, *later = [self._seen(announced, one, one.channels[0]) for one in announced.passes[: self.stages]]
            states, cotangents = tuple(one.state for one in later), tuple(one.cotangents for one in later)
            return [replace(first, later=states, later_cotangents=cotangents)]
        return [self._seen(announced, one, channel) for one in announced.passes for channel in one.channels]

    def _round_outputs(self, announced: AnnouncedBatch) -> MicroBatch | None:
        """A batch of whose outputs nothing came back: all that the backward passes brought has a name, as a penalty."""
        batch = announced.batch
        if announced.ran is None or not self.watcher.differentiated or self.stages > 1:
            return None
        state, shapes = announced.ran
        nothing = zero_outputs(shapes, len(batch.ids))
        if nothing is None:
            return None
        cotangents, sampled = self.keep(nothing, batch)
        return replace(batch, state=state, cotangents=cotangents, sampled_cotangents=sampled)

    def _seen(self, announced: AnnouncedBatch, one: ForwardPass, channel: str | None) -> MicroBatch:
        """A batch as a pass ran, with what is kept of the cotangents that came under a name."""
        batch = announced.batch
        n = len(batch.ids)
        try:
            cotangents = one.cotangents(channel, n)
        except InputError as error:
            raise SampleIdError(
                f"{n} samples were announced, and the forward pass after it was of others ({error.found})",
                "Every forward pass is of the samples that were announced last before it, with one row of outputs each",
                "Call `recorder.batch(ids)` right before the forward pass of these samples; where the network returns "
                "more than its outputs, say which they are with `KernelRecorder(..., returns=...)`",
            ) from None
        slope = one.loss_slope(channel)
        if self._scale != 1.0:
            cotangents = None if cotangents is None else cotangents / self._scale
            slope = None if slope is None else slope / self._scale
        whole, some = (None, None) if cotangents is None else self.keep(cotangents, batch)
        inputs, state = batch.inputs, one.state
        if one.call is not None:
            due = one.checksum is not None and channel is None
            batch, inputs, shared = self.inputs.of(batch, one.call, announced.delivery, due)
            state = replace(state, arguments=shared) if shared else state
        return MicroBatch(
            batch.ids,
            batch.weights,
            inputs,
            batch.targets,
            state,
            cotangents=whole,
            sampled_cotangents=some,
            loss_slope=slope,
            channel=channel,
            source=batch.source,
            parts=batch.parts,
        )

    def _check_strangers(self) -> None:
        if any(one.owner is not None for one in self._strangers):
            raise SampleIdError(
                "A backward pass went through the graph of a forward pass from before the last step, which was kept "
                "(`retain_graph=True`, a loss that was kept, or a state that was not detached)",
                "The gradient of a step is of passes at its own weights; what an earlier step has used is on record "
                "there",
                "Detach what is carried from step to step (`h = h.detach()`, `total += loss.item()`), and call "
                "`backward()` before the next `optimizer.step()`",
            )
        if self._strangers:
            shapes = ", ".join(str(tuple(shape)) for shape, _, _ in self._strangers[0].shapes)
            raise SampleIdError(
                f"The gradient holds {len(self._strangers)} backward passes of samples that were not announced "
                f"(outputs of shape {shapes})",
                "Every pass whose gradient a step uses is of samples that were announced before it, and since the last "
                "step",
                "Call `recorder.batch(ids)` before each forward pass, or clear the gradients of other passes "
                "(`optimizer.zero_grad()`) before the backward pass of this step",
            )
