"""A recorded trajectory from its folder, joined with the live objects that it was recorded with."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pathkernel._typing import Loss, Parameters
from pathkernel.errors import CorruptBlockError, ModelMismatchError, StoreError, brief, check, quoted
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.losses import Objective, check_recorded_loss
from pathkernel.gradients.model_function import ModelFunction
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
from pathkernel.trajectory.samples import Samples
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import UpdateRule


def open_trajectory(
    path: str | os.PathLike[str],
    model: nn.Module,
    loss: Loss | str | None,
    data: Any,
    rule: UpdateRule | None,
    regularizers: Mapping[str, Callable[[Parameters], Tensor]] | None,
    optimizer: type[Optimizer] | None = None,
    returns: Returns = None,
) -> Trajectory:
    """See `Trajectory.open`."""
    store = DiskStore.open(path)
    header = store.header
    assert header is not None
    samples = Samples(data, header.dtype)
    check_recorded_loss(loss)
    problems = mismatches(header, model, loss, samples, regularizers or {})
    if not problems and header.end is not None and header.end.weights != identity.weights(model):
        problems = ["weights: they are not those at the end of the recording"]
    check(
        not problems,
        ModelMismatchError,
        f"`{path}` was recorded with other objects: {'. '.join(problems)}",
        "A trajectory is read with the network at the end of its recording, and with the loss and the data of the "
        "recording, so that nobody explains one network with another one's history",
        "Load the weights that training ended with, and pass the same `loss=`, `data=` and `regularizers=`",
    )
    store.rule = known_rule(header, rule)
    objective = Objective(loss, header.reduction, dict(regularizers or {}))
    trajectory = assembled(store, model, objective, samples, known_returns(header, returns))
    if samples.holds_integers:
        samples.suit(trajectory.function(), trajectory.initial)
        trajectory.reference = reference_outputs(store, samples)
    check_outputs(f"Trajectory.open({str(path)!r})", trajectory, store)
    if header.replay is not None:
        replay = Replay(trajectory, known_optimizer(header.replay["optimizer"], optimizer), store.optimizer_constants())
        trajectory.store = ReplayStore(store, replay, header.replay["threads"] or None)
    return trajectory


def mismatches(
    header: Header,
    model: nn.Module,
    loss: Loss | str | None,
    data: Samples,
    regularizers: Mapping[str, Any],
) -> list[str]:
    """What differs between live objects and those of a recording; weights are not looked at."""
    recorded = header.fingerprints
    problems = identity.compared(recorded["model"], identity.architecture(model), "model")
    if loss is not None and recorded["loss"]["name"]:  # what needs a loss that was not given says so
        problems += identity.compared(recorded["loss"], identity.loss_identity(loss), "loss")
    problems += identity.compared(recorded["data"], identity.data_identity(data), "data")
    if set(regularizers) != set(header.regularizers):
        problems.append(f"regularizers: {sorted(regularizers)}, not {sorted(header.regularizers)}")
    return problems


def check_outputs(asker: str, trajectory: Trajectory, store: DiskStore) -> None:
    """Compare what the network makes of a few samples with what it did at the end of the recording.

    The network stands there, so that nothing needs to be read; one that was cut off is compared at its start.
    """
    header, reference = store.header, trajectory.reference
    if header is None or reference is None:
        return
    if header.end is None:
        reference.check(asker, (trajectory.function(), trajectory.initial), None)
        return
    model, layout = trajectory.model, trajectory.layout
    live = dict(model.named_parameters(remove_duplicate=False))
    theta = layout.flatten({name: live[name].detach() for name in layout.names}, header.dtype)
    function = ModelFunction(model, layout, constants_of(model, layout), header.dtype, returns=trajectory.returns)
    reference.check(asker, None, (function, theta))


def reference_outputs(store: DiskStore, data: Samples) -> ReferenceOutputs | None:
    """What the network made of a few samples, as far as the store tells."""
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
    ended = header.end is not None and header.end.outputs is not None
    final = torch.tensor(header.end.outputs, dtype=torch.float64) if ended else None  # type: ignore[union-attr]
    return ReferenceOutputs(tuple(samples), inputs, initial, final, header.outputs["varying"])


def known_rule(header: Header, rule: UpdateRule | None) -> UpdateRule:
    """The rule of a recording: one of the package by its name, or the one that is passed."""
    recorded = {**header.rule, "class": current_name(header.rule["class"])}
    if rule is None and recorded["class"] in UPDATE_RULES:
        rule = UPDATE_RULES[recorded["class"]]()
    check(
        rule is not None and rule_identity(rule) == recorded,
        StoreError,
        f"The steps were recorded under the update rule {quoted(recorded['name'])} ({brief(recorded['class'])}), and "
        f"{'none' if rule is None else identity.named(type(rule))} was passed; what a store names is not imported",
        "A store runs nothing: rules of the package are found by their name; a rule of your own has to be passed again",
        "Write `Trajectory.open(path, ..., rule=YourRule())`, or `--rule train.py:YourRule` on the command line",
    )
    assert rule is not None
    return rule


def known_optimizer(recorded: str, optimizer: type[Optimizer] | None) -> type[Optimizer]:
    """The class of the optimizer of a recording: one of torch by its name, or the one that is passed."""
    recorded = current_name(recorded)
    found = OPTIMIZERS.get(recorded) if optimizer is None else optimizer
    check(
        found is not None and identity.named(found) == recorded,
        StoreError,
        f"The steps were taken by an optimizer of the class {brief(recorded)}, and "
        f"{'none' if optimizer is None else identity.named(optimizer)} was passed; what a store names is not imported",
        "A store runs nothing: steps are trained again by an optimizer of torch or of the package, which is found by "
        "its name; one of your own has to be passed again",
        "Write `Trajectory.open(path, ..., optimizer=YourOptimizer)`, or `--optimizer train.py:YourOptimizer` on the "
        "command line",
    )
    assert found is not None
    return found


def known_returns(header: Header, returns: Returns) -> Returns:
    """What of the returned the outputs are: as on record, or the function that is passed."""
    recorded = header.returns
    check(
        callable(check_returns(returns)) if recorded == FUNCTION else returns is None or returns == recorded,
        ModelMismatchError,
        f"The outputs of the recorded network are {'a function' if recorded == FUNCTION else f'{recorded!r}'} of what "
        f"it returns, and `returns={returns!r}` was passed",
        "A trajectory is read with the outputs that it was recorded with; a function has to be passed again",
        "Write `Trajectory.open(path, ..., returns=...)` as for the recorder",
    )
    return returns if recorded == FUNCTION else recorded


def assembled(
    store: DiskStore, model: nn.Module, objective: Objective, data: Samples, returns: Returns = None
) -> Trajectory:
    """A trajectory whose parts are read when they are asked for."""
    header = store.header
    assert header is not None and store.rule is not None
    trajectory = Trajectory.__new__(Trajectory)
    trajectory.model, trajectory.objective, trajectory.data = model, objective, data
    trajectory.layout, trajectory.rule, trajectory.store = header.layouts[-1], store.rule, store
    trajectory.schedule, trajectory.lock = header.schedule, threading.RLock()
    trajectory.returns, trajectory.task = returns, header.task
    trajectory.reference = reference_outputs(store, data)
    store.attach(trajectory)
    start, end = cache(store.start_values), cache(store.end_values)

    def guarded(read: Callable[[], Any]) -> Callable[[], Any]:
        def checked() -> Any:
            try:
                return read()
            except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
                if isinstance(error, CorruptBlockError):
                    raise
                raise damaged(store.path, f"its start or end makes no sense ({str(error)[:100]})") from None

        return checked

    def start_of(key: str) -> Any:
        return moved(start()[key], trajectory.device)

    def ending(key: str, without: Any) -> Callable[[], Any]:
        return guarded(lambda: without if (values := end()) is None else moved(values[key], trajectory.device))

    vars(trajectory)["_deferred"] = {
        "initial": guarded(lambda: torch.cat([start()["initial"], *store.tails]).to(trajectory.device)),
        "constants": guarded(lambda: constants_now(start_of("constants"), header.layouts)),
        "initial_memory": guarded(lambda: start_of("initial_memory")),
        "tail": ending("tail", ()),
        "final_buffers": guarded(lambda: final_buffers(store, end())),
        "averages": guarded(lambda: averages(store, start_of("averages"), moved(end(), trajectory.device))),
    }
    return trajectory


def constants_now(constants: dict[str, Tensor], layouts: tuple[ParameterLayout, ...]) -> dict[str, Tensor]:
    """Constants without the parameters that joined θ later."""
    return {name: value for name, value in constants.items() if name not in layouts[-1].slices}


def final_buffers(store: DiskStore, end: dict[str, Any] | None) -> Mapping[str, Tensor]:
    """Buffers at the end; where recording was cut off, as the last step found them."""
    if end is not None:
        return end["final_buffers"]
    return store.read(len(store) - 1).buffers if len(store) else {}


def averages(
    store: DiskStore, initial: dict[str, dict[str, Tensor]], end: dict[str, Any] | None
) -> dict[str, AverageRecord]:
    """How averages moved; none where recording was cut off, since their last values are not known then."""
    if end is None:
        return {}
    return {
        name: AverageRecord(name, initial[name], list(end["averages"][name]["updates"]), end["averages"][name]["last"])
        for name in initial
    }
