"""A user's own objects, named on the command line: network, data, and what a store only says the name of.

What is imported was named by the user. Names in a store are looked up in closed tables, see
`pathkernel.storage.known_classes`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import traceback
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from pathkernel.errors import InputError, StoreError, quoted
from pathkernel.gradients.forward_state import generators_untouched
from pathkernel.gradients.sample_wise import check_is_module
from pathkernel.runtime.interrupts import result_or_error
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.header import Header
from pathkernel.storage.known_classes import known_loss
from pathkernel.trajectory.trajectory import Trajectory
from pathkernel.update_rules.rule import UpdateRule


def imported(place: str, flag: str, example: str) -> Any:
    """The object at ``module:name`` or ``file.py:name``.

    Parameters
    ----------
    place
        As the user wrote it, never as a store says it: importing runs code.
    flag
        After which it was written.
    example
        A name that could stand there.

    Raises
    ------
    InputError
        Where there is none.
    """
    found = result_or_error(lambda: _object_at(place), (Exception,))
    if isinstance(found, Exception):
        raise InputError(
            f"`{flag}` {place!r} was given ({_said(found)})",
            "It is the place of a Python object: a module or a file, a colon, a name",
            f"Write for example `{flag} train.py:{example}`",
        ) from found
    return found


def _object_at(place: str) -> Any:
    module_name, _, name = place.rpartition(":")
    found: Any = _module(module_name)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def made_by(made: Any, place: str, flag: str) -> Any:
    """What a function of the user's makes, called without arguments.

    Raises
    ------
    InputError
        Where it cannot be called so, with what it says.
    """
    none = TypeError(f"a {type(made).__name__} is no function")
    found = result_or_error(made, (Exception,)) if callable(made) else none
    if isinstance(found, Exception):
        raise InputError(
            f"`{flag}` {place!r} was called without arguments, and fails ({_said(found)})",
            "It is the object itself, or a function that makes it and needs no arguments",
            "Name a function without arguments, as `def make_model(): return Network(64, 10)`",
        ) from found
    return found


def _said(error: Exception) -> str:
    """What an error in a user's own code says, and where it was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    package = Path(__file__).parent.parent
    outside = frames and not Path(frames[-1].filename).is_relative_to(package)
    where = f", {frames[-1].filename}, line {frames[-1].lineno}" if outside else ""
    known = isinstance(error, (ImportError, AttributeError, OSError, ValueError))
    return f"{'' if known else f'{type(error).__name__}: '}{error}{where}"


def _module(name: str) -> Any:
    if not name.endswith(".py"):
        if "" not in sys.path:
            sys.path.insert(0, "")  # as `python -m` does: modules of the folder one is in
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def samples(path: str, names: tuple[str, ...]) -> tuple[np.ndarray, ...]:
    """Arrays of an ``.npz`` file by name, or the one array of an ``.npy`` file.

    Raises
    ------
    InputError
        Where the file or an array is missing.
    """
    try:
        content = np.load(path, allow_pickle=False)
        arrays = (content,) if isinstance(content, np.ndarray) else tuple(content[name] for name in names)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"Samples were asked of {path!r} ({error})",
            f"They come from an .npz file with arrays {', '.join(map(repr, names))}"
            + (", or from an .npy file" if len(names) == 1 else ""),
            f"Write it with `numpy.savez(path, {', '.join(f'{name}={name}' for name in names)})`",
        ) from error
    return arrays


def opened(arguments: argparse.Namespace) -> Trajectory:
    """The trajectory of a store with the user's objects; the network gets its weights from the store."""
    store = DiskStore.open(arguments.run)
    header = store.header
    assert header is not None
    made = imported(arguments.model, "--model", "make_model")
    model = made if isinstance(made, nn.Module) else made_by(made, arguments.model, "--model")
    check_is_module(model)
    data = imported(arguments.data, "--data", "data") if ":" in arguments.data else samples(arguments.data, ("X", "y"))
    data = made_by(data, arguments.data, "--data") if callable(data) and not hasattr(data, "__len__") else data
    loss = known_loss(header.fingerprints["loss"]) if arguments.loss is None else _loss(arguments.loss)
    rule, optimizer, regularizers = _rule(arguments), _optimizer(arguments), _regularizers(arguments)
    if regularizers is None and header.regularizers:
        raise InputError(
            f"The loss on record had the regularizers {quoted(list(header.regularizers))}, and none were given",
            "They are functions of the parameters, of which a store has the names alone",
            "Write `--regularizers train.py:regularizers` with the mapping that was given to `KernelRecorder`",
        )
    _load(model, store)
    trajectory = Trajectory.open(
        arguments.run, model=model, loss=loss, data=data, rule=rule, regularizers=regularizers, optimizer=optimizer
    )
    if arguments.loss is None:
        _check_loss_of_store(trajectory, header)
    return trajectory


def _loss(place: str) -> Any:
    """The loss that the user named; a class is made with its default settings."""
    if ":" not in place:
        module, _, name = place.rpartition(".")
        place = f"{module}:{name}"
    loss = imported(place, "--loss", "loss")
    return loss() if isinstance(loss, type) else loss


def _check_loss_of_store(trajectory: Trajectory, header: Header) -> None:
    """Check that the loss that a store names suits the outputs and targets at hand."""
    function = trajectory.function()

    def values() -> None:
        for size in (2, 3):  # as many samples as outputs may look like targets of another shape
            inputs, targets = trajectory.data[torch.arange(min(size, len(trajectory.data)))]
            with function.evaluating(gradients=False):
                outputs = function.call(function.parameters(trajectory.initial), function.cast(inputs))
            if trajectory.objective.known is not None:
                trajectory.objective.known(outputs, function.cast(targets))

    with generators_untouched():
        found = result_or_error(values, (Exception,))
    if isinstance(found, Exception):
        raise StoreError(
            f"The loss on record is {quoted(header.fingerprints['loss']['name'])}, which fails on the outputs and the "
            f"targets of a few training samples ({str(found)[:300]})",
            "A loss takes the network's outputs and the targets of a batch",
            "Write `--loss train.py:loss` with the loss of the training, and look for damage with `pathkernel verify`",
        )


def _rule(arguments: argparse.Namespace) -> UpdateRule | None:
    """The update rule that the user named; None where `Trajectory.open` is to find it by its name."""
    if arguments.rule is None:
        return None
    found = imported(arguments.rule, "--rule", "YourRule")
    is_class = isinstance(found, type) and issubclass(found, UpdateRule)
    rule = made_by(found, arguments.rule, "--rule") if is_class else found
    if not isinstance(rule, UpdateRule):
        raise InputError(
            f"`--rule` {arguments.rule!r} is a {type(rule).__name__}",
            "It is an `UpdateRule`, or a class of such that is made without arguments",
            "Write `--rule train.py:YourRule` with the rule that was given to `KernelRecorder`",
        )
    return rule


def _optimizer(arguments: argparse.Namespace) -> type[Optimizer] | None:
    """The class of the optimizer that the user named, which only a recording with keyframes needs; else None."""
    if arguments.optimizer is None:
        return None
    found = imported(arguments.optimizer, "--optimizer", "YourOptimizer")
    if not isinstance(found, type) or not issubclass(found, Optimizer):
        raise InputError(
            f"`--optimizer` {arguments.optimizer!r} is no class of optimizers",
            "It is a subclass of `torch.optim.Optimizer`, the one that took the steps",
            "Write `--optimizer train.py:YourOptimizer`",
        )
    return found


def _regularizers(arguments: argparse.Namespace) -> Mapping[str, Any] | None:
    """The regularizers that the user named."""
    if arguments.regularizers is None:
        return None
    regularizers = imported(arguments.regularizers, "--regularizers", "regularizers")
    if not isinstance(regularizers, Mapping):
        raise InputError(
            f"`--regularizers` {arguments.regularizers!r} is a {type(regularizers).__name__}",
            "It is a mapping of names to functions of the parameters",
            "Write `--regularizers train.py:regularizers` with what was given to `KernelRecorder`",
        )
    return regularizers


def _load(model: nn.Module, store: DiskStore) -> None:
    """Give a network the values at the end of the recording."""
    header, start, end = store.header, store.start_values(), store.end_values()
    assert header is not None
    buffers = end["final_buffers"] if end else {}
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {**start["constants"], **buffers, **header.layouts[-1].unflatten(store.final())}
    wrong = [name for name in values if name not in live or live[name].shape != values[name].shape]
    if wrong:
        raise InputError(
            f"`--model` made a {type(model).__name__} without {', '.join(f'`{name[:100]}`' for name in wrong[:5])} as "
            "recorded",
            "It must be the architecture that was recorded",
            "Name the function that made the network for training",
        )
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)
