"""Commands that need the store alone: info, verify, export."""

from __future__ import annotations

import argparse
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pathkernel.errors import CorruptBlockError, InputError, StoreError, brief, quoted
from pathkernel.gradients.pytrees import memory_bytes
from pathkernel.runtime.extras import require_extra
from pathkernel.storage.disk import DiskStore
from pathkernel.storage.format import replaced
from pathkernel.trajectory.schedule import EVERY_STEP

Result = tuple[int, dict[str, Any], str]
"""Exit code, numbers, and text."""


def info(arguments: argparse.Namespace) -> Result:
    """Contents of a store."""
    store = DiskStore.open(arguments.run)
    header = store.header
    assert header is not None
    layout = header.layouts[-1]
    ended = header.end is not None and header.end.steps == len(store)
    numbers = {
        "path": str(arguments.run),
        "steps": len(store),
        "ended": ended,
        "parameters": layout.size,
        "dtype": str(header.dtype).removeprefix("torch."),
        "rule": header.rule["name"],
        "schedule": repr(header.schedule),
        "reduction": header.reduction,
        "regularizers": list(header.regularizers),
        "averages": list(header.averages),
        "loss": header.fingerprints["loss"]["name"],
        "samples": header.fingerprints["data"]["count"],
        "bytes": store.size_bytes(),
        "versions": dict(header.versions),
        "table": [
            {"name": name, "shape": list(shape)} for name, shape in zip(layout.names, layout.shapes, strict=True)
        ],
    }
    kept = "" if header.schedule == EVERY_STEP else f", kept with {header.schedule!r}"
    state = "ended" if ended else "cut off, or still going on: the steps that are committed are valid"
    lines = [
        f"{arguments.run}: {len(store)} steps committed ({state}){kept}",
        f"rule {_line(numbers['rule'])}, loss {_line(numbers['loss'])}, {numbers['samples']} training samples",
        f"{layout.size} parameters, {numbers['dtype']}; {store.size_bytes() / 1e6:.1f} MB on disk, "
        f"{store.size_bytes() / max(1, len(store)) / 1e3:.1f} kB a step",
        "written by " + _line(", ".join(f"{name} {version}" for name, version in header.versions.items())),
        *(f"  {_line(row['name']):40} {tuple(row['shape'])}" for row in numbers["table"]),
    ]
    return 0, numbers, "\n".join(lines)


def _line(name: str) -> str:
    """A name from a store on one line of no great length."""
    return brief(" ".join(name.splitlines()))


def verify(arguments: argparse.Namespace) -> Result:
    """Read everything; exit code 1 where something is damaged."""
    try:
        store = DiskStore.open(arguments.run)
        steps, problems = len(store), store.verify()
    except CorruptBlockError as error:
        steps, problems = 0, [error]
    numbers = {"path": str(arguments.run), "steps": steps, "damage": [str(problem) for problem in problems]}
    if not problems:
        return 0, numbers, f"{arguments.run}: {steps} steps, every checksum right"
    lines = [f"{arguments.run}: {len(problems)} damaged", *(f"  {problem}" for problem in problems)]
    return 1, numbers, "\n".join(lines)


def export(arguments: argparse.Namespace) -> Result:
    """Weights along the path as .npz or .safetensors, or a table of the steps as .parquet or .csv."""
    store, path = DiskStore.open(arguments.run), Path(arguments.file)
    writers: dict[str, Callable[[DiskStore, Path, argparse.Namespace], int]] = {
        ".npz": _npz,
        ".safetensors": _safetensors,
        ".parquet": _table,
        ".csv": _table,
    }
    if path.suffix not in writers:
        raise InputError(
            f"The file to write is `{path}`",
            f"Its ending tells the format: {', '.join(writers)}",
            "Write for example `pathkernel export runs/digits weights.safetensors`",
        )
    count = writers[path.suffix](store, path, arguments)
    size, what = path.stat().st_size, "steps" if writers[path.suffix] is _table else "points of the path"
    return 0, {"file": str(path), "steps": count, "bytes": size}, f"{path}: {count} {what}, {size / 1e6:.1f} MB"


def _points(store: DiskStore, arguments: argparse.Namespace) -> list[int]:
    """Points of the path: all, or those asked for; negative ones count from the end."""
    length = len(store)
    try:
        asked = range(length + 1) if arguments.steps is None else [int(s) for s in arguments.steps.split(",")]
    except ValueError:
        raise InputError(
            f"`--steps {arguments.steps}` was given",
            "Points of the path are whole numbers with commas between them",
            "Write for example `--steps 0,-1` for the untrained and the trained network",
        ) from None
    points = [s + length + 1 if s < 0 else s for s in asked]
    outside = [s for s in points if not 0 <= s <= length]
    if outside:
        raise InputError(
            f"Points {outside} of the path were asked for",
            f"It has the points 0 to {length}",
            "Write for example `--steps 0,-1` for the untrained and the trained network",
        )
    return points


def _weights(store: DiskStore, arguments: argparse.Namespace) -> tuple[list[int], dict[str, Tensor]]:
    """Some points of the path, and θ there as recorded: (points, *shape) by parameter name."""
    header = store.header
    assert header is not None
    points, layout = _points(store, arguments), header.layouts[-1]
    needed, budget = len(points) * layout.size * header.dtype.itemsize * 2, memory_bytes(arguments.memory)
    if needed > budget:
        raise InputError(
            f"{len(points)} points of {layout.size} numbers take {needed / 1e6:.0f} MB",
            f"The budget is {budget / 1e6:.0f} MB",
            "Write for example `--steps 0,100,-1` for some of them, or `--memory 8GB`",
        )
    outside = [name for name in layout.names if not _is_member(name)]
    if outside:
        raise InputError(
            f"Parameters of the names {quoted(outside[:3])} were to be written",
            "A file of weights is an archive by name, and these names are too long for it, no Unicode text, or lead "
            "out of the folder that it is unpacked in",
            "Read them with `Trajectory.open(path, ...).vector(step)` instead",
        )
    vectors = [store.vector(s) if s < len(store) else store.final() for s in points]
    named = [layout.unflatten(vector) for vector in vectors]
    return points, {name: torch.stack([one[name] for one in named]) for name in layout.names}


def _is_member(name: str) -> bool:
    """Test that a parameter's name can be that of a file in an archive."""
    fits = len(name) <= 1000 and not any(c in "\0\\" or "\ud800" <= c <= "\udfff" for c in name)
    return fits and not {"", ".."} & set(name.split("/"))


def _named_points(names: Collection[str]) -> str:
    """Name under which the numbers of the points stand beside the parameters."""
    name = "steps"
    while name in names:
        name += "_"
    return name


def _npz(store: DiskStore, path: Path, arguments: argparse.Namespace) -> int:
    points, weights = _weights(store, arguments)
    # numpy has no bfloat16, and float32 holds it exactly
    arrays = {name: (w.float() if w.dtype == torch.bfloat16 else w).numpy() for name, w in weights.items()}
    _npz_file(path, {_named_points(arrays): np.array(points), **arrays})
    return len(points)


def _safetensors(store: DiskStore, path: Path, arguments: argparse.Namespace) -> int:
    require_extra("export", "`export RUN file.safetensors`", "safetensors")
    from safetensors.torch import save_file

    points, weights = _weights(store, arguments)
    _whole(path, lambda place: save_file({_named_points(weights): torch.tensor(points), **weights}, place))
    return len(points)


def _table(store: DiskStore, path: Path, arguments: argparse.Namespace) -> int:
    """One row for each step: settings, lengths, and sample ids."""
    require_extra("export", "A table of the steps", "pandas", "pyarrow")
    import pandas

    header = store.header
    assert header is not None
    if header.replay is not None:
        raise StoreError(
            f"A table of the steps in `{store.path}` was asked for, which keeps θ at keyframes only",
            "Steps between keyframes are trained again, which takes the network, the loss and the data",
            "Read `Trajectory.open(path, model=model, loss=loss, data=data).steps()` instead",
        )
    rows = []
    for index in range(len(store)):
        step = store.read(index)
        displacement = step.after.double() - step.before.double()
        row: dict[str, Any] = {
            "step": index,
            "length": step.length,
            "displacement": displacement.norm().item(),
            "gradient": step.gradient.double().norm().item() if len(step.gradient) else None,
            "ids": [int(i) for batch in step.batches for i in batch.ids.reshape(-1)],
        }
        for group, settings in enumerate(step.hyperparameters):
            # Settings are keywords; a text that begins with "=" would be run as a formula by what opens the table.
            numbers = {k: v for k, v in settings.items() if isinstance(v, (int, float)) and k.isidentifier()}
            row |= {f"{key}_{group}": float(value) for key, value in numbers.items()}
        rows.append(row)
    table = pandas.DataFrame(rows)
    if path.suffix == ".csv":
        _whole(path, lambda place: table.to_csv(place, index=False))
    else:
        try:
            _whole(path, lambda place: table.to_parquet(place, index=False))
        except ImportError as error:
            raise InputError(
                f"`{path}` is to be written, and no library for parquet is installed",
                "pandas writes parquet with pyarrow",
                "Write `pip install pyarrow`, or a file that ends in .csv",
            ) from error
    return len(rows)


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """A file at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as beside:
        write(beside)


def _npz_file(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays by name; under a path that is given to numpy it would write to another one that ends in .npz."""

    def write(place: Path) -> None:
        # As `numpy.savez` does, which has arguments of its own under some of the names that a parameter may have.
        with zipfile.ZipFile(place, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)

    _whole(path, write)
