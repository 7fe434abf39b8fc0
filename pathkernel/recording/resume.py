"""Going on with a recording that was cut off: where the live weights lie on the path that is in the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pathkernel.errors import ModelMismatchError, RecordingError, StoreError
from pathkernel.gradients.parameters import ParameterLayout
from pathkernel.gradients.pytrees import moved
from pathkernel.recording.live import LiveParameters
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.header import FUNCTION, Header
from pathkernel.storage.opening import constants_now, known_rule, learn_samples, mismatches, reference_outputs
from pathkernel.trajectory.averages import AverageRecord, averaged_values
from pathkernel.trajectory.frozen_state import FrozenOnReading
from pathkernel.trajectory.replay import Replay, ReplayStore, state_of
from pathkernel.trajectory.run import End, Run, Start
from pathkernel.trajectory.step import LOADED
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.thinned import ThinnedStore
from pathkernel.update_rules.rule import UpdateRule

WINDOW = 300
"""Steps from which the optimizer's memory is recomputed: older gradients have faded."""
FADED = 0.05
"""Size of what the older ones and rounding may amount to, relative to the memory."""


@dataclass(frozen=True)
class Place:
    """Where a recording goes on.

    Attributes
    ----------
    steps
        How many steps of the record are kept.
    end
        θ after the last of them, (P,).
    changes
        Changes made outside the optimizer since then; see `pathkernel.trajectory.step.Step.changes`.
    """

    steps: int
    end: Tensor
    changes: list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Resumed(Place):
    """A recording that goes on there.

    Attributes
    ----------
    run
        The run as it was when its recording began.
    buffers
        Buffers that had changed, as last seen.
    averages
        How averages had moved by then.
    """

    run: Run
    buffers: Mapping[str, Tensor]
    averages: dict[str, AverageRecord]


def resume(run: Run, store: Store, live: LiveParameters, averages: Mapping[str, Any]) -> Resumed:
    """Join a run whose recording is about to begin with the record in its store; what overlaps is cut off there.

    Raises
    ------
    ModelMismatchError
        Where the record is of other objects, or the live weights are nowhere on its path.
    StoreError
        Where somebody else is writing, or the record was finished and would be overwritten from its start.
    """
    replay = store.replay if isinstance(store, ReplayStore) else None
    disk = store.inner if isinstance(store, ReplayStore | ThinnedStore) else store
    if not isinstance(disk, DiskStore):
        raise StoreError(
            f"A {type(disk).__name__} holds steps of an earlier run",
            "A recording goes on in a folder, which tells where the weights lie on its path",
            "Give `store=` a path or a `DiskStore`, or an empty store",
        )
    disk.lock()
    try:
        return _joined(run, disk, live, averages, replay)
    except BaseException:
        disk.unlock()
        raise


def _joined(
    run: Run, store: DiskStore, live: LiveParameters, averages: Mapping[str, Any], replay: Replay | None
) -> Resumed:
    header = store.load()
    if header.schedule != run.schedule:
        raise StoreError(
            f"`{store.path}` holds a recording with `{header.schedule!r}`, and `schedule={run.schedule!r}` was given",
            "A recording goes on as it began: what is kept of its steps is the same from start to end",
            f"Write `KernelRecorder(..., schedule={header.schedule!r})`, give `store=` another path, or delete this "
            "folder",
        )
    _check_identity(run, header, averages, store)
    region = _region(header, live, store)
    layout = header.layouts[region]
    named = {name: live.named[name] for name in layout.names}
    live.named.clear()
    live.add(named)
    store.drop_regions(region)
    store.device = run.device
    start, end = (moved(values, store.device) for values in (store.start_values(), store.end_values()))
    initial = torch.cat([start["initial"], *moved(store.tails, store.device)])
    tail = end["tail"] if end is not None else ()
    store.rule = run.rule
    constants = constants_now(start["constants"], header.layouts[: region + 1])
    run = replace(run, layout=layout, start=Start(initial, constants, start["initial_memory"]))
    if replay is not None:
        replay.run = run
    place = _find(store, live, run, tail, replay)
    if place.steps == 0 and len(store) and end is not None:
        raise StoreError(
            f"`{store.path}` holds a finished recording of {len(store)} steps, and the weights are those of its start",
            "A recording goes on from a checkpoint; from the start, all of it would be overwritten",
            "Load a checkpoint of model and optimizer before `KernelRecorder(...)` starts, delete the folder, or give "
            "another path",
        )
    buffers = moved(_buffers(run.model, store, place.steps, start["constants"], end), store.device)
    learn_samples(run.data, store, place.steps)
    reference = reference_outputs(store, run.data)
    run = replace(run, reference=reference)
    if reference is not None:
        reference.check("KernelRecorder", (run.function(), initial), None)
    records = _averages_then(store, place.steps, averages, start["averages"], end)
    store.resume(run, End(averages=records), place.steps, place.end, buffers)
    return Resumed(place.steps, place.end, place.changes, run, buffers, records)


def _check_identity(run: Run, header: Header, averages: Mapping[str, Any], store: DiskStore) -> None:
    objective = run.objective
    known_rule(header, run.rule)
    problems = mismatches(header, run.model, objective.loss, run.data, objective.regularizers)
    if objective.reduction != header.reduction:
        problems.append(f"reduction: {objective.reduction!r}, not {header.reduction!r}")
    returns = FUNCTION if callable(run.returns) else run.returns
    if header.returns != returns:
        problems.append(f"returns: {returns!r}, not {header.returns!r}")
    if (header.watch, header.batch_axis) != (run.watch, run.batch_axis):
        problems.append(f"watch, batch_axis: {(run.watch, run.batch_axis)}, not {(header.watch, header.batch_axis)}")
    if set(averages) != set(header.averages):
        problems.append(f"averages: {sorted(averages)}, not {sorted(header.averages)}")
    if problems:
        raise ModelMismatchError(
            f"`{store.path}` holds the record of another training run: {'. '.join(problems)}",
            "A recording goes on with the same model, loss and data",
            "Give `store=` another path, or delete this folder",
        )


def _region(header: Header, live: LiveParameters, store: DiskStore) -> int:
    """Index of the θ on record that has the parameters which are trained now."""
    found = [i for i, layout in enumerate(header.layouts) if set(layout.names) == set(live.named)]
    if not bool(found):
        raise ModelMismatchError(
            f"`{store.path}` holds the record of {len(header.layouts[-1].names)} parameters, and {len(live.named)} are "
            "trained now, others among them",
            "A recording goes on with the same parameters in training",
            "Freeze and unfreeze parameters as in the run that was recorded, or give `store=` another path",
        )
    return found[-1]


def _find(
    store: DiskStore, live: LiveParameters, run: Run, tail: tuple[tuple[str, Tensor], ...], replay: Replay | None
) -> Place:
    """Where θ and the optimizer's memory are those of the record, the last such place.

    Where θ alone is on record, it alone tells.
    """
    theta, matched, memory = live.vector(), None, run.initial_memory
    mark = live.checksum() if replay is not None else 0
    for place in _places(store, run.initial, tail):
        if not place.changes and not place.end.numel():  # a step that is trained again
            notes = store.read(place.steps - 1).replay
            same = notes is not None and notes.checksum == mark
        else:
            same = torch.equal(place.changes[-1][1] if place.changes else place.end, theta)
        if same:
            matched = place.steps
            if not place.end.numel():
                assert replay is not None
                end = _trained_again(store, live, replay, place.steps)
                if end is not None:
                    return replace(place, end=end)
            elif getattr(run.schedule, "weights_only", False) or _remembers(store, live, run.rule, place.steps, memory):
                return place
    steps = len(store)
    if matched is not None:
        raise ModelMismatchError(
            f"The weights are those of `{store.path}` after step {matched}, and the optimizer's state is not",
            "A recording goes on from a checkpoint of model and optimizer",
            "Restore the optimizer too, with `optimizer.load_state_dict(...)`, before recording starts",
        )
    newer = _steps_since(store, live, memory) if store.end_values() is None else None
    if newer is not None and newer > 0:
        raise ModelMismatchError(
            f"The checkpoint is {newer} step{'s' * (newer != 1)} newer than the {steps} steps that were in "
            f"`{store.path}` when its process ended",
            "A recording goes on from a point of its path, and steps that had not been written are lost",
            f"Load a checkpoint from step {steps} or earlier before recording starts, or record on from here into "
            "another path (`store=`); next time, call `recorder.flush()` before each `torch.save` of a checkpoint",
        )
    raise ModelMismatchError(
        f"The weights are nowhere on the path of {steps} steps in `{store.path}`",
        "A recording goes on from a point of the path: a checkpoint that was made while it was recorded, and not "
        f"after step {steps}, up to which it is on disk",
        f"Load a checkpoint of model and optimizer from step {steps} or earlier before recording starts, or record on "
        "from here into another path (`store=`); call `recorder.flush()` before each `torch.save` of a checkpoint",
    )


def _steps_since(store: DiskStore, live: LiveParameters, initial: Mapping[str, tuple[Tensor, ...]]) -> int | None:
    """How many steps the optimizer counts since the last on record; None where it counts none, or had begun before."""
    states = [live.optimizer.state.get(p, {}) for p in live.named.values()]
    counts = [state["step"] for state in states if "step" in state]
    frozen = store.read(len(store) - 1).frozen if len(store) else None
    recorded = frozen.state.numbers.get("step") if isinstance(frozen, FrozenOnReading) else None
    if not len(store) and not initial:
        recorded = torch.zeros(1)
    return None if recorded is None or not counts else round(max(map(float, counts)) - float(recorded.max()))


def _trained_again(store: DiskStore, live: LiveParameters, replay: Replay, steps: int) -> Tensor | None:
    """θ after some steps, (P,), where the optimizer's state is what these leave, to the last bit; else None."""
    end = ReplayStore(store.until(steps), replay).read(steps - 1).after
    held, expected = state_of(live.optimizer, live.named), replay.state()
    # What remembers nothing, as SGD without momentum, has an entry or none.
    same = all(_same(held.get(name, {}), expected.get(name, {})) for name in held.keys() | expected.keys())
    return end if same else None


def _same(one: Any, other: Any) -> bool:
    """True where two values of an optimizer's state are equal, wherever they lie."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one.to(other), other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(one == other)


def _places(store: DiskStore, initial: Tensor, tail: tuple[tuple[str, Tensor], ...]) -> Iterator[Place]:
    """All points of the path, from its end."""
    for steps in range(len(store), -1, -1):
        changes = list(tail if steps == len(store) else store.read(steps).changes)
        end = store.read(steps - 1).after if steps else initial
        for count in range(len(changes), -1, -1):
            yield Place(steps, end, changes[:count])


def _remembers(
    store: DiskStore,
    live: LiveParameters,
    rule: UpdateRule,
    steps: int,
    initial: Mapping[str, tuple[Tensor, ...]],
) -> bool:
    """True where the optimizer's memory is that of the record after some steps."""
    if steps:
        frozen = store.read(steps - 1).frozen
        if isinstance(frozen, FrozenOnReading):
            now = live.state_vectors(tuple(frozen.state.after))
            for name in frozen.active & live.layout.slices.keys():
                settings, where = frozen.hyperparameters[frozen.groups[name]], live.layout.slices[name]
                own = rule.of(settings)  # other optimizers may hold something else under the same key
                kept = {
                    key: vector
                    for key, vector in frozen.state.after.items()
                    if own is rule or key in (own.keep_after(settings) or ())
                }
                if any(
                    not torch.equal(now[key][where], vector[where])
                    for key, vector in kept.items()
                    if where.stop <= len(vector)
                ):
                    return False
    held = live.memory(rule)
    expected = _memory_after(store, live.layout, rule, steps, initial)
    for name, slots in expected.items():
        now_held = held.get(name, tuple(torch.zeros_like(slot) for slot in slots))
        for one, other in zip(slots, now_held, strict=True):
            size = max(one.norm().item(), other.double().norm().item())
            if (one - other.double()).norm().item() > FADED * size:
                return False
    return True


def _memory_after(
    store: DiskStore,
    layout: ParameterLayout,
    rule: UpdateRule,
    steps: int,
    initial: Mapping[str, tuple[Tensor, ...]],
) -> dict[str, tuple[Tensor, ...]]:
    """The optimizer's linear memory after some steps, recomputed from the last ones, float64."""
    if not rule.memory or rule.stages > 1:
        return {}
    first = max(0, steps - WINDOW)
    device = store.read(first).before.device if steps else None
    memory = {
        name: tuple(
            initial[name][slot].double()
            if name in initial and not first
            else torch.zeros(shape, dtype=torch.float64, device=device)
            for slot in range(len(rule.memory))
        )
        for name, shape in zip(layout.names, layout.shapes, strict=True)
    }
    for index in range(first, steps):
        step = store.read(index)
        if not step.gradient.numel() or any(name == LOADED for name, _ in step.changes):
            return {}  # it was trained again, or its memory was loaded
        gradients = layout.unflatten(step.gradient.double())
        parameters = layout.unflatten(step.before.double())
        for name in step.active:
            frozen, settings = step.frozen[name], step.hyperparameters_of(name)
            gradient, _ = rule.sourced(gradients[name], parameters[name], frozen, settings)
            memory[name] = rule.step(gradient, memory[name], frozen, settings)[1]
    return memory


def _buffers(
    model: nn.Module, store: DiskStore, steps: int, constants: Mapping[str, Tensor], end: dict[str, Any] | None
) -> Mapping[str, Tensor]:
    """Buffers as they were seen last before a step: by its first forward pass, which may have changed others."""
    if steps < len(store):
        step = store.read(steps)
        seen = step.batches[0].state.buffers if step.batches else None
        return step.buffers if seen is None else seen
    before = store.read(steps - 1).buffers if steps else {}
    if end is None:
        return before
    seen, live = end["final_buffers"], dict(model.named_buffers())
    # A forward pass that Ctrl-C left without its step has changed buffers that are restored now.
    restored = {name for name in seen if name not in before and torch.equal(live[name], constants[name])}
    return {name: buffer for name, buffer in seen.items() if name not in restored} if restored else seen


def _averages_then(
    store: DiskStore,
    steps: int,
    averages: Mapping[str, Any],
    initial: Mapping[str, dict[str, Tensor]],
    end: dict[str, Any] | None,
) -> dict[str, AverageRecord]:
    """How averages had moved after some steps."""
    made, records = store.updates(), {}
    for name, source in averages.items():
        updates = list(end["averages"][name]["updates"]) if end is not None else made[name]
        if len(updates) < steps:
            raise RecordingError(
                f"How the average {name!r} moved is on disk up to step {len(updates)}, and the checkpoint is that of "
                f"step {steps}",
                "What an average did after a step is written with the next block",
                "Load an earlier checkpoint, or leave the average out of `averages=` and give `store=` another path",
            )
        now = {key: value.detach().clone() for key, value in averaged_values(source).items()}
        records[name] = AverageRecord(name, initial[name], [tuple(u) for u in updates[:steps]], now)
    return records
