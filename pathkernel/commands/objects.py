"""A user's own objects, named on the command line: network, loss and data."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pathkernel.errors import InputError, check
from pathkernel.trajectory.disk import DiskStore
from pathkernel.trajectory.trajectory import Trajectory


def imported(place: str, what: str) -> Any:
    """The object at ``module:name`` or ``file.py:name``.

    Raises
    ------
    InputError
        Where there is none.
    """
    module_name, _, name = place.rpartition(":")
    try:
        found: Any = _module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        raise InputError(
            f"{what} {place!r} was given ({error})",
            "It is the place of a Python object: a module or a file, a colon, a name",
            "Write for example `--model train.py:make_model`",
        ) from error
    return found


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
    except (OSError, ValueError, KeyError) as error:
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
    made = imported(arguments.model, "`--model`")
    model = made if isinstance(made, nn.Module) else made()
    data = imported(arguments.data, "`--data`") if ":" in arguments.data else samples(arguments.data, ("X", "y"))
    data = data() if callable(data) and not hasattr(data, "__len__") else data
    loss = _loss(arguments.loss or header.fingerprints["loss"]["name"])
    _load(model, store)
    return Trajectory.open(arguments.run, model=model, loss=loss, data=data)


def _loss(place: str) -> Any:
    """The loss; one of `torch.nn` is made with its default settings."""
    path, _, name = place.replace(":", ".").rpartition(".")
    if path.startswith("torch.nn") and isinstance(getattr(nn, name, None), type):
        return getattr(nn, name)()
    loss = imported(place if ":" in place else f"{path}:{name}", "`--loss`")
    return loss() if isinstance(loss, type) else loss


def _load(model: nn.Module, store: DiskStore) -> None:
    """Give a network the values at the end of the recording."""
    header, start, end = store.header, store.start_values(), store.end_values()
    assert header is not None
    buffers = end["final_buffers"] if end else {}
    live = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {**start["constants"], **buffers, **header.layouts[-1].unflatten(store.final())}
    wrong = [name for name in values if name not in live or live[name].shape != values[name].shape]
    check(
        not wrong,
        InputError,
        f"`--model` made a {type(model).__name__} without {', '.join(f'`{name}`' for name in wrong[:5])} as recorded",
        "It must be the architecture that was recorded",
        "Name the function that made the network for training",
    )
    with torch.no_grad():
        for name, value in values.items():
            live[name].copy_(value)
