"""Command that finds near-duplicates, within the training samples or between them and test samples."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from torch.utils import _pytree as pytree

from pathkernel._typing import PyTree
from pathkernel.cli.labels import _image, _short, written
from pathkernel.cli.objects import opened, samples
from pathkernel.cli.places import check_picture
from pathkernel.cli.stores import Result, _npz_file
from pathkernel.errors import InputError, check_number
from pathkernel.gradients.pytrees import count, take
from pathkernel.influence.duplicates import NearDuplicates, near_duplicates
from pathkernel.kernels.kernel import KernelFunction
from pathkernel.path_kernel.path_kernel import PathKernel
from pathkernel.runtime.extras import require_extra
from pathkernel.tangent_kernel.tangent_kernel import TangentKernel
from pathkernel.trajectory.trajectory import Trajectory


def duplicates(arguments: argparse.Namespace) -> Result:
    """List the pairs of samples that are near-duplicates under a kernel of the network."""
    check_number("--top", arguments.top, positive=True, whole=True, example=20)
    if arguments.picture is not None:
        check_picture(arguments.picture, "--picture")
        require_extra("plot", "`duplicates --picture`", "matplotlib")
    test = None if arguments.test is None else samples(arguments.test, ("X",))[0]
    test_labels = _labels_in(arguments.test)
    trajectory = opened(arguments)
    X, targets = trajectory.data.everything()
    leaves = pytree.tree_leaves(targets)
    labels = leaves[0].numpy(force=True) if len(leaves) == 1 else None
    compared = labels is not None and (test is None or test_labels is not None)
    found = near_duplicates(
        _kernel(trajectory, arguments),
        X,
        test,
        labels=labels if compared else None,
        other_labels=test_labels if compared else None,
        copies=arguments.copies,
        false_discovery_rate=arguments.false_discovery_rate,
        dimension=arguments.dimension,
        memory=arguments.memory,
        progress=not arguments.quiet,
    )
    rows = [_row(found, place) for place in range(min(arguments.top, len(found)))]
    arrays = {name: getattr(found, name) for name in ("pairs", "cosine", "next_cosine", "p_value", "identical")}
    if arguments.output is not None:
        _npz_file(arguments.output, {**arrays, "redundant": found.redundant})
    drawn = arguments.picture is not None and len(found) > 0
    if drawn:
        _draw(found, X, test, arguments)
    numbers = {
        "samples": count(X),
        "test_samples": None if test is None else len(test),
        "tested": found.tested,
        "kernel": arguments.kernel,
        "dimensions": list(found.dimensions),
        "resolution": found.resolution,
        "false_discovery_rate": arguments.false_discovery_rate,
        "threshold": found.threshold,
        "found": len(found),
        "identical": int(found.identical.sum()),
        "conflicts": int(found.conflicts.sum()) if compared else None,
        "redundant": found.redundant.tolist(),
        "pairs": rows,
        "picture": str(arguments.picture) if drawn else None,
        "output": None if arguments.output is None else str(arguments.output),
    }
    return 0, numbers, "\n".join(_lines(found, numbers, rows))


def _labels_in(path: str | None) -> np.ndarray | None:
    """Labels ``y`` of an .npz file that holds some."""
    if path is None:
        return None
    content = np.load(path, allow_pickle=False)  # which `samples` has read
    if isinstance(content, np.ndarray):
        return None
    with content:
        labelled = "y" in content.files
    return samples(path, ("y",))[0] if labelled else None


def _kernel(trajectory: Trajectory, arguments: argparse.Namespace) -> KernelFunction:
    if arguments.kernel == "inputs":
        return _of_inputs
    if arguments.kernel == "path":
        steps = min(arguments.steps, len(trajectory)) if arguments.steps else None
        return PathKernel(trajectory, steps=steps, memory=arguments.memory, progress=not arguments.quiet)
    at = 0 if arguments.kernel == "initial" else len(trajectory)
    return TangentKernel(trajectory.model, trajectory.parameters(at), memory=arguments.memory)


def _of_inputs(A: PyTree, B: PyTree | None = None) -> np.ndarray:
    """Scalar products of samples as they are, float64 (n, m)."""
    one, other = (_flat(samples) for samples in (A, A if B is None else B))
    return one @ other.T


def _flat(inputs: PyTree) -> np.ndarray:
    if len(pytree.tree_leaves(inputs)) != 1:
        raise InputError(
            f"`--kernel inputs` was given for samples that are a {type(inputs).__name__} of several arrays",
            "The cosine of inputs is that of one array of numbers",
            "Write `--kernel path`, which takes samples as the network does",
        )
    values = np.asarray(pytree.tree_leaves(inputs)[0], dtype=np.float64)
    return values.reshape(len(values), -1)


def _row(found: NearDuplicates, place: int) -> dict[str, Any]:
    identical = bool(found.identical[place])
    row: dict[str, Any] = {
        "sample": int(found.pairs[place, 0]),
        "test_sample" if found.across else "other": int(found.pairs[place, 1]),
        "cosine": float(found.cosine[place]),
        "next_cosine": None if identical else float(found.next_cosine[place]),
        "p_value": float(found.p_value[place]),
        "identical": identical,
    }
    if found.labels is not None:
        one, other = (written(np.asarray(side[place])) for side in found.labels)
        row |= {"label": one, "other_label": other, "labels_disagree": bool(found.conflicts[place])}
    return row


def _lines(found: NearDuplicates, numbers: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    n, q = numbers["samples"], numbers["test_samples"]
    where = f"among {n} training samples" if q is None else f"between {n} training and {q} test samples"
    disagree = "" if numbers["conflicts"] is None else f", {numbers['conflicts']} with labels that disagree"
    lines = [
        f"{len(found)} pairs of near-duplicates {where} under the {numbers['kernel']} kernel, "
        f"{numbers['identical']} of them identical{disagree}"
        + (f" (dimension {found.dimensions[0]:.1f})" if found.dimensions else "")
    ]
    for place, row in enumerate(rows, start=1):
        pair = f"{row['sample']} and " + (f"test {row['test_sample']}" if found.across else str(row["other"]))
        how = "identical" if row["identical"] else (
            f"cosine {row['cosine']:.6f}, next {row['next_cosine']:.4f}; p = {row['p_value']:.2g}"
        )  # fmt: skip
        labels = ""
        if "label" in row:
            one, other = _short(row["label"]), _short(row["other_label"])
            labels = f"; labels {one} and {other} disagree" if row["labels_disagree"] else f"; label {one}"
        lines.append(f"{place:4}. {pair}: {how}{labels}")
    if len(found):
        left = len(found.redundant)
        lines.append(
            f"without {left} of the training samples none of these pairs is left"
            if q is None
            else f"{left} of {q} test samples ({100 * left / q:.1f} %) have a near-duplicate in training"
        )
    return lines


def _draw(found: NearDuplicates, X: PyTree, test: np.ndarray | None, arguments: argparse.Namespace) -> None:
    """Write the picture: the two samples of each pair."""
    import torch

    from pathkernel.plotting.appearance import write_figure
    from pathkernel.plotting.near_duplicates import NearDuplicatesDisplay

    shown = found.pairs[: arguments.top]
    images = {i: _image(take(X, i)) for i in {*shown[:, 0].tolist(), *([] if found.across else shown[:, 1].tolist())}}
    others = None if test is None else {j: _image(torch.as_tensor(test[j])) for j in shown[:, 1].tolist()}
    display = NearDuplicatesDisplay.from_near_duplicates(found, images, others, k=arguments.top)
    write_figure(display.plot().figure_, arguments.picture)
