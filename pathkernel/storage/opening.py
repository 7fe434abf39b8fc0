"""A recorded trajectory from its folder, joined with the live objects that it was recorded with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, Parameters
from pathkernel.errors import CorruptBlockError, ModelMismatchError, StoreError, brief, quoted
from pathkernel.gradients.forward_state import device_of, generators_untouched
from pathkernel.gradients.losses import Objective, check_recorded_loss
from pathkernel.gradients.parameters import ParameterLayout, constants_of
from pathkernel.gradients.pytrees import moved
from pathkernel.gradients.returned import Returns, check_returns
from pathkernel.storage import fingerprints as identity
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import damaged
from pathkernel.storage.header import FUNCTION, Header, rule_identity
from pathkernel.storage.known_classes import OPTIMIZERS, UPDATE_RULES, current_name
from pathkernel.trajectory.averages import AverageRecord
from pathkernel.trajectory.reference_outputs import ReferenceOutputs
from pathkernel.trajectory.replay import Replay, ReplayStore
from pathkernel.trajectory.run import End, RecordedOptimizer, Run, Start
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.store import Store
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.joint import JointRule
from pathkernel.update_rules.rule import UpdateRule

T = TypeVar("T")


def open_trajectory(
    path: str | os.PathLike[str],
    model: nn.Module,
    loss: Loss | str | None,
    data: Any,
    rule: UpdateRule | None,
    regularizers: Mapping[str, Callable[[Parameters], Tensor]] | None,
    optimizer: type[Optimizer] | None = None,
    returns: Returns = None,
    at: int | None = None,
) -> Trajectory:
    """Open a trajectory; see `Trajectory.open`."""
    store = DiskStore.open(path)
    header = store.header
    assert header is not None
    samples = Samples(data, header.dtype)
    check_recorded_loss(loss)
    problems = mismatches(header, model, loss, samples, regularizers or {})
    if not problems and at is None and header.end is not None and header.end.weights != identity.weights(model):
        problems = ["weights: they are not those at the end of the recording"]
    if problems:
        raise ModelMismatchError(
            f"`{path}` was recorded with other objects: {'. '.join(problems)}",
            "A trajectory is read with the network at the end of its recording, and with the loss and the data of the "
            "recording, so that nobody explains one network with another one's history",
            "Load the weights that training ended with, and pass the same `loss=`, `data=` and `regularizers=`; for "
            "those of a checkpoint that was kept, say after how many steps: `at=step`",
        )
    recorded_rule = known_rule(header, rule)
    store.rule = recorded_rule
    objective = Objective(loss, header.reduction, dict(regularizers or {}))
    replayed = None
    if header.replay is not None:
        kind, threads = known_optimizer(header.replay["optimizer"], optimizer), header.replay["threads"]
        replayed = RecordedOptimizer(kind, store.optimizer_constants(), threads or None)
    run = Run(
        model=model,
        objective=objective,
        data=samples,
        rule=recorded_rule,
        layout=header.layouts[-1],
        start=cache(lambda: _sensible(store, lambda: start_of(store, model))),
        returns=known_returns(header, returns),
        task=header.task,
        schedule=header.schedule,
        optimizer=replayed,
        watch=known_parts(header, model),
        batch_axis=header.batch_axis,
    )
    if samples.holds_integers:
        samples.suit(run.function(), run.initial)
    run = replace(run, reference=reference_outputs(store, samples))
    store.run = run
    learn_samples(samples, store)
    if at is None:
        check_outputs(f"Trajectory.open({str(path)!r})", run, header)
    kept: Store = store
    if replayed is not None:
        kept = ReplayStore(store, Replay(run, replayed.kind, replayed.constants), replayed.threads)
    whole = Trajectory(run, kept, lambda: _sensible(store, lambda: end_of(store, run)))
    return whole if at is None else _until(whole, at, f"Trajectory.open({str(path)!r}, at={at})")


def _until(whole: Trajectory, at: int, asker: str) -> Trajectory:
    """The path up to a step, whose weights the network has."""
    first = whole.until(at)
    if not torch.equal(first.run.live_parameters(first.dtype).to(first.final), first.final):
        raise ModelMismatchError(
            f"`{asker}` was given a network with other weights than after step {at}",
            "The network of a checkpoint has the weights that training had when it was made",
            "Load the checkpoint, or say after how many steps it was made",
        )
    first.check_model(asker)
    return first


def mismatches(
    header: Header,
    model: nn.Module,
    loss: Loss | str | None,
    data: Samples,
    regularizers: Mapping[str, Any],
) -> list[str]:
    """Differences between live objects and those of a recording; weights are not looked at."""
    recorded = header.fingerprints
    problems = identity.compared(recorded["model"], identity.architecture(model), "model")
    if loss is not None and recorded["loss"]["name"]:  # what needs a loss that was not given says so
        problems += identity.compared(recorded["loss"], identity.loss_identity(loss), "loss")
    problems += identity.compared(recorded["data"], identity.data_identity(data), "data")
    if set(regularizers) != set(header.regularizers):
        problems.append(f"regularizers: {sorted(regularizers)}, not {sorted(header.regularizers)}")
    return problems


def check_outputs(asker: str, run: Run, header: Header) -> None:
    """Compare what the network makes of a few samples with what it did at the end of the recording.

    The network stands there, so that nothing needs to be read; one that was cut off is compared at its start.
    """
    reference = run.reference
    if reference is None:
        return
    if header.end is None:
        reference.check(asker, (run.function(), run.initial), None)
        return
    constants = constants_of(run.model, run.layout)
    function = run.function_of(constants, header.dtype)
    reference = replace(reference, final=outputs_at_the_end(header))
    reference.check(asker, None, (function, run.live_parameters(header.dtype)))


def outputs_at_the_end(header: Header) -> Tensor | None:
    """Outputs of the network at the end of the recording, of the samples of its reference outputs."""
    if header.end is None or header.end.outputs is None:
        return None
    return torch.tensor(header.end.outputs, dtype=torch.float64)


def reference_outputs(store: DiskStore, data: Samples) -> ReferenceOutputs | None:
    """Outputs of a few samples when recording began, as far as the store tells."""
    header = store.header
    if header is None or header.outputs is None:
        return None
    samples = header.outputs["samples"]
    if not samples or max(samples) >= len(data):
        raise damaged(store.path / "zarr.json", "its outputs are of samples that there are none of")
    with generators_untouched():
        inputs = data[torch.tensor(samples)][0]
    if header.outputs["varying"]:
        try:
            leaves, structure = store.start_values()["reference_inputs"], pytree.tree_structure(inputs)
            inputs = pytree.tree_unflatten(leaves, structure)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(store.path / "start", f"its reference inputs make no sense ({str(error)[:100]})") from None
    initial = torch.tensor(header.outputs["values"], dtype=torch.float64)
    return ReferenceOutputs(tuple(samples), inputs, initial, None, header.outputs["varying"])


def known_rule(header: Header, rule: UpdateRule | None) -> UpdateRule:
    """The rule of a recording: one of the package by its name, or the one that is passed."""
    recorded = _renamed(header.rule)
    if rule is None:
        rule = _rule_by_name(recorded)
    if rule is None or rule_identity(rule) != recorded:
        raise StoreError(
            f"The steps were recorded under the update rule {quoted(recorded['name'])} ({brief(recorded['class'])}), "
            f"and {'none' if rule is None else identity.named(type(rule))} was passed; what a store names is not "
            "imported",
            "A store runs nothing: rules of the package are found by their name; a rule of your own has to be passed "
            "again",
            "Write `Trajectory.open(path, ..., rule=YourRule())`, or `--rule train.py:YourRule` on the command line",
        )
    return rule


def _renamed(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A rule as a header has it, by the names that classes have now."""
    found = {**recorded, "class": current_name(recorded["class"])}
    return {**found, "parts": list(map(_renamed, found["parts"]))} if "parts" in found else found


def _rule_by_name(recorded: Mapping[str, Any]) -> UpdateRule | None:
    """A rule of the package, or several of them that are joint; None where some part is none of the package's."""
    if recorded["class"] != identity.named(JointRule):
        return UPDATE_RULES[recorded["class"]]() if recorded["class"] in UPDATE_RULES else None
    parts = [UPDATE_RULES.get(part["class"]) for part in recorded.get("parts", ())]
    return JointRule([part() for part in parts if part is not None]) if parts and None not in parts else None


def known_optimizer(recorded: str, optimizer: type[Optimizer] | None) -> type[Optimizer]:
    """The class of the optimizer of a recording: one of torch by its name, or the one that is passed."""
    recorded = current_name(recorded)
    found = OPTIMIZERS.get(recorded) if optimizer is None else optimizer
    if found is None or identity.named(found) != recorded:
        raise StoreError(
            f"The steps were taken by an optimizer of the class {brief(recorded)}, and "
            f"{'none' if optimizer is None else identity.named(optimizer)} was passed; what a store names is not "
            "imported",
            "A store runs nothing: steps are trained again by an optimizer of torch or of the package, which is found "
            "by its name; one of your own has to be passed again",
            "Write `Trajectory.open(path, ..., optimizer=YourOptimizer)`, or `--optimizer train.py:YourOptimizer` on "
            "the command line",
        )
    return found


def known_returns(header: Header, returns: Returns) -> Returns:
    """Place of the outputs in what the network returns: as on record, or the function that is passed."""
    recorded = header.returns
    if not (callable(check_returns(returns)) if recorded == FUNCTION else returns is None or returns == recorded):
        raise ModelMismatchError(
            f"The outputs of the recorded network are {'a function' if recorded == FUNCTION else f'{recorded!r}'} of "
            f"what it returns, and `returns={returns!r}` was passed",
            "A trajectory is read with the outputs that it was recorded with; a function has to be passed again",
            "Write `Trajectory.open(path, ..., returns=...)` as for the recorder",
        )
    return returns if recorded == FUNCTION else recorded


def learn_samples(data: Samples, store: DiskStore, steps: int | None = None) -> None:
    """Tell samples what is on record of them: how many were counted, and how they look.

    Parameters
    ----------
    data, store
        The samples, and the record.
    steps
        How many records of it count; all by default. Those behind a checkpoint that is gone on from come again.
    """
    assert store.header is not None
    count, lengths = (0, []) if store.header.end is None else store.header.end.samples
    steps = len(store) if steps is None else steps
    if count and steps == len(store):
        data.meet(torch.tensor([count - 1]))
    else:
        count = 0
    if lengths:
        data.note_lengths(lengths)
    if data.announced:
        counted = steps if data.limit is None and not count else 0
        for index in range(max(counted, min(1, len(store)))):
            for batch in store.read(index).batches:
                if index < counted and batch.source is None:  # others are counted by their sources
                    data.meet(batch.ids)
                if batch.inputs is not None:
                    data.note(batch.inputs)


def known_parts(header: Header, model: nn.Module) -> tuple[str, ...]:
    """Submodules that the loop called in place of the network."""
    names = {name for name, _ in model.named_modules()}
    if missing := [name for name in header.watch if name not in names]:
        raise ModelMismatchError(
            f"The recorded loop called the submodules {', '.join(map(quoted, header.watch))}, and the model has no "
            f"{', '.join(map(quoted, missing))}",
            "A trajectory is read with the network that it was recorded with",
            "Pass the same `model=`",
        )
    return header.watch


def _sensible(store: DiskStore, read: Callable[[], T]) -> T:
    """A value of a store, or an error that says where; a damaged one may hold anything."""
    try:
        return read()
    except CorruptBlockError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise damaged(store.path, f"its start or end makes no sense ({str(error)[:100]})") from None


def start_of(store: DiskStore, model: nn.Module) -> Start:
    """Where the path begins, on the network's device."""
    assert store.header is not None
    device, values = device_of(model), store.start_values()
    initial = torch.cat([values["initial"], *store.tails]).to(device)
    constants = constants_now(moved(values["constants"], device), store.header.layouts)
    return Start(initial, constants, moved(values["initial_memory"], device))


def constants_now(constants: dict[str, Tensor], layouts: tuple[ParameterLayout, ...]) -> dict[str, Tensor]:
    """Constants without the parameters that joined θ later."""
    return {name: value for name, value in constants.items() if name not in layouts[-1].slices}


def end_of(store: DiskStore, run: Run) -> End:
    """Where the path ends; where recording was cut off, buffers are those that the last step found.

    Of averages nothing is known then, since their last values are not.
    """
    assert store.header is not None
    values = store.end_values()
    if values is None:
        return End(final_buffers=store.read(len(store) - 1).buffers if len(store) else {})
    ended = moved(values["averages"], run.device)
    initial = moved(store.start_values()["averages"], run.device) if ended else {}
    averages = {
        name: AverageRecord(name, initial[name], list(own["updates"]), own["last"]) for name, own in ended.items()
    }
    tail = moved(values["tail"], run.device)
    return End(tail, values["final_buffers"], averages, outputs_at_the_end(store.header))
